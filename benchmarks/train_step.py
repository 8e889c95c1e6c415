"""Time the joint step against TRL's trainers and a naive hybrid: same comparisons, same model, one process.

    python benchmarks/train_step.py --data preferences.jsonl --tokenizer MODEL_DIRECTORY

On a CPU every contender trains a Llama of 6 layers and width 384 (random weights, float32, two threads) in
optimiser steps of 16 comparisons; on a GPU `--shape phi-2` or `--shape mistral-7b --lora-rank 16`, in
bfloat16. The total time of the steps is compared, since a median would hide long batches. TRL runs as
shipped and tuned (no checkpointing, length-grouped). `--ladder N` adds the ablation over N steps. Peak
memory is the growth of each contender's own process over its loaded model, in a second pass.
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peaks
import torch
import transformers
from contenders import CONTENDERS, LADDER, Marks, peak_growth
from workload import BATCH, SHAPES, Workload, load

from hafrm.engine.model import HybridModel, new_reward_head
from hafrm.recipe import LoraSection
from hafrm.training.costs import step_flops, work_of
from hafrm.training.prepare import inject_lora
from hafrm.training.shadow import count

MEMORY_STEPS = 8
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One contender's result."""

    name: str
    seconds: float
    comparisons: int
    tokens: int
    reference: float
    grown: float | None = None
    floor: float | None = None


def main() -> None:
    args = parse()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.memory_of:
        print(json.dumps(measure_memory_here(args, device)))
        return
    peak = peaks.measure(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    say(f"peaks: {peak.flops / 1e9:.0f} GFLOP/s, {peak.bandwidth / 1e9:.0f} GB/s")
    results = []
    for data, steps in zip(args.data, args.steps * len(args.data), strict=False):
        w = workload(args, data, steps, device)
        rows = list(timed(w, CONTENDERS, args.only, peak))
        if not args.no_memory:
            rows = [replace(row, grown=measure_memory(row.name)) for row in rows]
        ladder = []
        if args.ladder:
            ladder = list(timed(workload(args, data, args.ladder, device), LADDER, args.only, peak))
        results.append({"data": w.name, "rows": rows, "ladder": ladder, "workload": w})
    print(f"\n{describe(args, peak)}")
    for result in results:
        print(table(result["workload"], result["rows"], "x joint", base=0))
        if result["ladder"]:
            print(table(result["workload"], result["ladder"], "x faster than naive", base=None))
    if args.json:
        kept = [
            {
                k: [asdict(r) for r in v] if isinstance(v, list) else v
                for k, v in r.items()
                if k != "workload"
            }
            for r in results
        ]
        args.json.write_text(json.dumps({"peaks": asdict(peak), "results": kept}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, nargs="+", help="preference data, a table each")
    parser.add_argument(
        "--tokenizer", required=True, type=Path, help="model directory or tokenizer.json"
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
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
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


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


def timed(
    w: Workload, contenders: dict[str, Any], only: list[str] | None, peak: peaks.Peaks
) -> Iterator[Row]:
    for name, contender in contenders.items():
        if only and not any(part in name for part in only):
            continue
        gc.collect()
        if w.device.type == "cuda":
            torch.cuda.empty_cache()
        marks = Marks()
        try:
            seconds = contender(w, marks)
        except torch.OutOfMemoryError:
            seconds = float("nan")
        floor = floor_of(w, peak) if name == "hafrm joint (haf)" else None
        say(f"{w.name:12} {name:32} {seconds:8.2f} s   {marks.tokens} tokens")
        yield Row(name, seconds, w.num_comparisons, marks.tokens, marks.reference, None, floor)


def floor_of(w: Workload, peak: peaks.Peaks) -> float:
    """Seconds of the joint steps at the peaks: useful FLOPs, and weights, gradients and moments moved."""
    with torch.device("meta"):
        causal = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(w.config))
        backbone, head = causal.base_model, causal.get_output_embeddings()
        if w.lora_rank:
            causal.requires_grad_(False)
            inject_lora(LoraSection(rank=w.lora_rank), backbone)
        model = HybridModel(backbone, reward_head=new_reward_head(1), policy_head=head)
    counts = count(model)
    work = work_of([(len(g.prompt_ids), [len(r) for r in g.response_ids]) for g in w.encoded])
    # Read in forward and backward, the gradient written and read, two moments and the weight likewise.
    moved = w.steps * 4 * (2 * counts.total + 8 * counts.trainable)
    return peak.floor(step_flops(counts, work).total, moved)


def measure_memory(name: str) -> float | None:
    """Bytes that the contender's own process grew over its loaded model."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(json.loads(run.stdout.splitlines()[-1])) if run.returncode == 0 else None


def measure_memory_here(args: argparse.Namespace, device: torch.device) -> float:
    w = workload(args, args.data[0], min(args.steps[0], MEMORY_STEPS), device)
    marks = Marks()
    CONTENDERS[args.memory_of](w, marks)
    return peak_growth(marks, w)


def describe(args: argparse.Namespace, peak: peaks.Peaks) -> str:
    device = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads"
    )
    lora = f", LoRA rank {args.lora_rank}" if args.lora_rank else ""
    return (
        f"{args.shape}{lora}, steps of {BATCH} comparisons, at most {args.max_length} tokens a sequence, "
        f"{device}: {peak.flops / 1e9:.0f} GFLOP/s and {peak.bandwidth / 1e9:.0f} GB/s measured; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def table(w: Workload, rows: list[Row], ratio: str, base: int | None) -> str:
    lines = [
        f"\n{w.name}, {rows[0].comparisons} comparisons in {rows[0].comparisons // BATCH} steps\n",
        f"| contender | seconds | comparisons/s | {ratio} | tokens run | reference pass, s "
        "| peak growth, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        factor = row.seconds / rows[0].seconds if base == 0 else rows[0].seconds / row.seconds
        grown = "" if row.grown is None else f"{row.grown / GIB:.2f}"
        lines.append(
            f"| {row.name} | {row.seconds:.1f} | {row.comparisons / row.seconds:.2f} | {factor:.2f} | "
            f"{row.tokens or ''} | {row.reference or 0:.1f} | {grown} |"
        )
        if row.floor:
            lines.append(
                f"| its floor on this machine | {row.floor:.1f} | | {row.floor / row.seconds:.2f} | | | |"
            )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
