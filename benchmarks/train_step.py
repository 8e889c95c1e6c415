"""Time the joint step against TRL's trainers and a naive hybrid: same comparisons, same model, one process.

    python benchmarks/train_step.py --data preferences.jsonl --tokenizer MODEL_DIRECTORY

On a CPU every contender trains a Llama of 6 layers and width 384 (random weights, float32, two threads)
in optimiser steps of 16 comparisons; on a GPU `--shape phi-2` or `--shape mistral-7b --lora-rank 16`,
in bfloat16. `--model DIRECTORY` trains a real model instead. The total time of the steps is compared,
since a median would hide long batches. TRL runs as shipped and tuned (no checkpointing, length-
grouped). `--ladder N` adds the ablation over N steps. Peak memory is the growth of a contender over its
loaded model; on a CPU only the first one's is known, since processes keep what they free: name one with
`--only`. With `--out` each row is in FOLDER/train-NAME.jsonl as soon as it is measured.
"""

import argparse
import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import CONTENDERS, LADDER, Marks, peak_growth
from step_flops import count, step_flops, work_of
from workload import (
    BATCH,
    Peaks,
    Rows,
    Workload,
    add_model_options,
    load,
    measure_peaks,
    model_options,
)

from hafrm.engine.model import HybridModel, new_reward_head
from hafrm.recipe import LoraSection
from hafrm.training.memory_plan import count_weights
from hafrm.training.setup import inject_lora

JOINT = "hafrm joint (haf)"
GIB = 2**30
TARGETS = {
    "cpu": {
        "TRL RewardTrainer, as shipped": 5.0,
        "TRL RewardTrainer, tuned": 3.5,
        "TRL DPOTrainer, as shipped": 6.0,
        "naive hybrid": 8.0,
    },
    "cuda": {
        "TRL RewardTrainer, as shipped": 2.8,
        "TRL DPOTrainer, as shipped": 3.5,
        "naive hybrid": 6.0,
    },
}
"""Times the joint step's seconds that a contender should take at least."""


def main() -> None:
    args = parse()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    peak = measure_peaks(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    rows = Rows(args.out, f"train-{args.name}", seconds=args.seconds)
    print(describe(args, peak), file=sys.stderr)
    for data, steps in zip(args.data, args.steps * len(args.data), strict=False):
        for contenders, length in ((CONTENDERS, steps), (LADDER, args.ladder)):
            if length:
                w = workload(args, data, length, device)
                measure(args, rows, w, contenders, peak)
    print(f"\n{describe(args, peak)}")
    for title in dict.fromkeys(row["table"] for row in rows.rows):
        print(table([row for row in rows.rows if row["table"] == title], device.type))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, nargs="+", help="preference data, a table each")
    add_model_options(parser, "small")
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[24], help="of 16, for each data set"
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="of one of our micro-batches")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="contenders whose name contains one of these")
    parser.add_argument("--ladder", type=int, default=0, help="steps of the ablation (0: none)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing later")
    parser.add_argument("--out", type=Path, help="folder for the rows")
    return model_options(parser)


def workload(args: argparse.Namespace, data: str, steps: int, device: torch.device) -> Workload:
    return load(
        data,
        args.tokenizer,
        shape=args.shape,
        steps=steps,
        max_tokens=args.max_tokens,
        max_length=args.max_length,
        device=device,
        lora_rank=args.lora_rank,
    )


def measure(
    args: argparse.Namespace, rows: Rows, w: Workload, contenders: dict[str, Any], peak: Peaks
) -> None:
    """A row for each contender, whatever becomes of the others."""
    kind = "contenders" if contenders is CONTENDERS else "ladder"
    for name, contender in contenders.items():
        skipped = args.only and not any(part in name for part in args.only)
        if skipped or (name == "+ bf16" and w.device.type == "cuda"):
            continue  # on a GPU all are in bfloat16

        def timed(name: str = name, contender: Any = contender) -> dict[str, Any]:
            marks = Marks()
            seconds = contender(w, marks)
            row = {"seconds": seconds, "tokens": marks.tokens, "reference": marks.reference}
            if w.device.type == "cuda" or not rows.rows:
                row["peak_growth"] = peak_growth(marks, w)
            return row | (efficiency(w, peak, seconds) if name == JOINT else {})

        what = {
            "table": f"{w.name}, {w.num_comparisons} comparisons in {w.steps} steps, {kind}",
            "contender": name,
            "comparisons": w.num_comparisons,
            "shape": args.name,
            "lora_rank": args.lora_rank,
            "max_tokens": args.max_tokens,
            "machine": machine(args),
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        }
        rows.add(what, timed)


def efficiency(w: Workload, peak: Peaks, seconds: float) -> dict[str, float]:
    """MFU (useful FLOPs over the data sheet's peak) and the floor: at the measured peaks, the useful FLOPs,
    and weights, gradients and moments moved once."""
    with torch.device("meta"):
        causal = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(w.config))
        backbone, head = causal.base_model, causal.get_output_embeddings()
        if w.lora_rank:
            causal.requires_grad_(False)
            inject_lora(LoraSection(rank=w.lora_rank), backbone)
        model = HybridModel(backbone, reward_head=new_reward_head(1), policy_head=head)
    weights = count_weights(model)
    work = work_of([(len(g.prompt_ids), [len(r) for r in g.response_ids]) for g in w.encoded])
    flops = step_flops(count(model), work).total
    # Read in forward and backward, the gradient written and read, two moments and the weight likewise.
    moved = w.steps * 4 * (2 * weights.total + 8 * weights.trainable)
    return {
        "flops": flops,
        "mfu": flops / seconds / peak.nominal,
        "of_measured_peak": flops / seconds / peak.flops,
        "floor": peak.floor(flops, moved),
    }


def machine(args: argparse.Namespace) -> str:
    on_gpu = args.device.startswith("cuda")
    return torch.cuda.get_device_name() if on_gpu else f"{args.threads} CPU threads"


def describe(args: argparse.Namespace, peak: Peaks) -> str:
    lora = f", LoRA rank {args.lora_rank}" if args.lora_rank else ""
    return (
        f"{args.name}{lora}, steps of {BATCH} comparisons, at most {args.max_length} tokens a sequence, "
        f"{machine(args)}: {peak.flops / 1e9:.0f} GFLOP/s and {peak.bandwidth / 1e9:.0f} GB/s measured; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def table(rows: list[dict[str, Any]], device: str) -> str:
    """Contenders relative to the joint step, with targets; rungs of the ladder to the naive hybrid."""
    seconds = {row["contender"]: row["seconds"] for row in rows if "seconds" in row}
    is_ladder = rows[0]["table"].endswith("ladder")
    base = seconds.get("naive hybrid" if is_ladder else JOINT, float("nan"))
    ratio = "x faster than naive" if is_ladder else "x joint"
    lines = [
        f"\n{rows[0]['table']}\n",
        f"| contender | seconds | comparisons/s | {ratio} | target | tokens run | reference pass, s "
        "| peak growth, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["contender"]
        if "error" in row:
            lines.append(f"| {name} | {row['error'].splitlines()[0][:100]} | | | | | | |")
            continue
        took, grown = row["seconds"], row.get("peak_growth")
        factor = base / took if is_ladder else took / base
        target = None if is_ladder else TARGETS[device].get(name)
        lines.append(
            f"| {name} | {took:.2f} | {row['comparisons'] / took:.2f} | {factor:.2f} | "
            f"{'' if target is None else f'>= {target:g}'} | {row['tokens'] or ''} | "
            f"{row['reference']:.1f} | {'' if grown is None else f'{grown / GIB:.2f}'} |"
        )
        if "floor" in row:
            over = took / row["floor"]
            lines.append(f"| x its floor here | | | {over:.2f} | <= 1.15 | | | |")
            lines.append(f"| its MFU | | | {row['mfu']:.2f} | >= 0.50 | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
