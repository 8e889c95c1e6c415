"""Time the joint step against TRL's RewardTrainer and DPOTrainer: same pairs, same model, one process.

    python benchmarks/train_step.py --data preferences.jsonl --tokenizer tokenizer.json

Every contender trains a Llama of 6 layers and width 384 (random weights, float32) on the same 384 pairs in
24 optimiser steps of 16, AdamW, two threads; total time of the steps is compared, since a median would
hide long batches. TRL runs as shipped (but for float32) and tuned (no checkpointing, length-grouped).
Peak memory is the growth of each contender's own process over its loaded model, in a second pass.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hafrm.data.encoding import EncodedGroup, Encoder
from hafrm.data.groups import Group
from hafrm.data.readers import read
from hafrm.engine.model import HybridModel, hidden_size, new_reward_head, split_causal_lm
from hafrm.training.batches import ComparisonOrder, build, plan_step
from hafrm.training.methods import get_method
from hafrm.training.reference import reference_logps
from hafrm.training.step import build_optimizer, take_step

BATCH, STEPS, WIDTH, LAYERS = 16, 24, 384, 6
RATE = 1e-5


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    base: Path
    encoder: Encoder
    groups: list[Group]
    encoded: list[EncodedGroup]
    max_tokens: int


def setting(args: argparse.Namespace, folder: Path) -> Setting:
    if args.tokenizer.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(args.tokenizer), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    encoder = Encoder(tokenizer, max_length=1024)
    groups = [g for g in read([args.data]).groups if len(g.comparisons) == 1]
    groups = groups[: BATCH * STEPS]
    encoded, _ = encoder.encode(groups)
    base = folder / "base"
    if not base.is_dir():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(encoder.tokenizer),
            hidden_size=WIDTH,
            intermediate_size=1024,
            num_hidden_layers=LAYERS,
            num_attention_heads=6,
            max_position_embeddings=2048,
            pad_token_id=encoder.pad_id,
            eos_token_id=encoder.eos_id,
        )
        LlamaForCausalLM(config).save_pretrained(base)
        encoder.export_tokenizer(base)
    return Setting(base, encoder, groups, encoded, args.max_tokens)


def run_hafrm(s: Setting, method_name: str, steps: int, marks: dict[str, float]) -> float:
    """Seconds of the steps; the reference pass, once per data set, goes to marks."""
    method = get_method(method_name)
    backbone, head = split_causal_lm(LlamaForCausalLM.from_pretrained(s.base, dtype=torch.float32))
    model = HybridModel(
        backbone,
        reward_head=new_reward_head(hidden_size(backbone.config)) if method.trains_reward else None,
        policy_head=head if method.trains_policy else None,
    )
    references = None
    mark_loaded(marks)
    if method.needs_reference:
        start = time.perf_counter()
        references = reference_logps(model, s.encoded, max_tokens=4 * s.max_tokens)
        marks["reference"] = time.perf_counter() - start
    optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    order = ComparisonOrder(s.encoded, per_prompt=4, seed=0)
    start = time.perf_counter()
    for step in range(steps):
        picks = order.window(step * BATCH, BATCH)
        (plan,) = plan_step(s.encoded, picks, s.max_tokens)
        batches = [build(parts, references) for parts in plan]
        take_step(model, optimizer, batches, method, num_comparisons=BATCH, max_grad_norm=1.0)
    return time.perf_counter() - start


class Clock(TrainerCallback):
    """Time from the first step to the end of training."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def trl_arguments(steps: int, *, tuned: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": RATE,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 1024,
    }
    if tuned:
        arguments |= {
            "gradient_checkpointing": False,
            "train_sampling_strategy": "group_by_length",
            "remove_unused_columns": False,  # the sampler needs the column of lengths
        }
    return arguments


def run_reward_trainer(s: Setting, tuned: bool, steps: int, marks: dict[str, float]) -> float:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        s.base, num_labels=1, dtype=torch.float32
    )
    rows = [
        {
            "chosen_ids": [*g.prompt_ids.tolist(), *g.response_ids[c.chosen].tolist()],
            "rejected_ids": [*g.prompt_ids.tolist(), *g.response_ids[c.rejected].tolist()],
        }
        for g in s.encoded
        for c in g.comparisons
    ]
    for row in rows:
        row["length"] = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    mark_loaded(marks)
    clock = Clock()
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**trl_arguments(steps, tuned=tuned)),
        train_dataset=Dataset.from_list(rows),
        processing_class=s.encoder.tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


def run_dpo_trainer(s: Setting, tuned: bool, steps: int, marks: dict[str, float]) -> float:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = LlamaForCausalLM.from_pretrained(s.base, dtype=torch.float32)
    rows = [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in g.prompt],
            "chosen": [{"role": "assistant", "content": g.responses[c.chosen]}],
            "rejected": [{"role": "assistant", "content": g.responses[c.rejected]}],
        }
        for g in s.groups
        for c in g.comparisons
    ]
    lengths = [len(g.prompt_ids) + max(len(r) for r in g.response_ids) for g in s.encoded]
    for row, length in zip(rows, lengths, strict=True):
        row["length"] = length
    mark_loaded(marks)
    clock = Clock()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**trl_arguments(steps, tuned=tuned)),
        train_dataset=Dataset.from_list(rows),
        processing_class=s.encoder.tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


CONTENDERS: dict[str, Callable[[Setting, int, dict[str, float]], float]] = {
    "hafrm joint (haf)": lambda s, n, m: run_hafrm(s, "haf", n, m),
    "hafrm reward only (bt)": lambda s, n, m: run_hafrm(s, "bt", n, m),
    "TRL RewardTrainer, as shipped": lambda s, n, m: run_reward_trainer(s, False, n, m),
    "TRL RewardTrainer, tuned": lambda s, n, m: run_reward_trainer(s, True, n, m),
    "TRL DPOTrainer, as shipped": lambda s, n, m: run_dpo_trainer(s, False, n, m),
    "TRL DPOTrainer, tuned": lambda s, n, m: run_dpo_trainer(s, True, n, m),
}


def mark_loaded(marks: dict[str, float]) -> None:
    """Memory from here on is the contender's own."""
    marks["loaded_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(name: str, argv: list[str]) -> float:
    """MiB that the contender's process grew over its loaded model."""
    command = [sys.executable, __file__, *argv, "--memory-of", name]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(run.stdout.splitlines()[-1])["grown_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="preference pairs, as hafrm reads them")
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        help="a model directory, or a tokenizer.json with <s>, </s>, <unk>",
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="of one of our micro-batches")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="*", help="contenders whose name contains one of these")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        s = setting(args, Path(folder))
        if args.memory_of:
            marks: dict[str, float] = {}
            CONTENDERS[args.memory_of](s, min(args.steps, 8), marks)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"grown_mib": peak - marks["loaded_mib"]}))
            return
        results = []
        for name, contender in CONTENDERS.items():
            if args.only and not any(part in name for part in args.only):
                continue
            gc.collect()
            marks = {}
            seconds = contender(s, args.steps, marks)
            results.append(
                {"name": name, "seconds": seconds, "reference": marks.get("reference", 0)}
            )
            print(f"{name:32} {seconds:8.2f} s", file=sys.stderr, flush=True)
    if not args.no_memory:
        argv = ["--data", args.data, "--tokenizer", str(args.tokenizer)]
        argv += ["--max-tokens", str(args.max_tokens)]
        for result in results:
            result["grown_mib"] = measure_memory(str(result["name"]), argv)
    report(results, args)


def report(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    joint = results[0]["seconds"]
    pairs = args.steps * BATCH
    print(f"\n{pairs} pairs of {Path(args.data).name}, {args.steps} steps of {BATCH}, float32")
    print("| contender | seconds | pairs/s | x joint | reference pass, s | peak growth, MiB |")
    print("|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['name']} | {r['seconds']:.1f} | {pairs / r['seconds']:.2f} | "
            f"{r['seconds'] / joint:.2f} | {r['reference']:.1f} | {r.get('grown_mib', float('nan')):.0f} |"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
