"""What grouping saves: comparisons of one prompt trained together, against the same pairs kept apart.

    python benchmarks/groups.py --model MODEL_DIRECTORY --data convarg.jsonl.gz arena.jsonl.gz

Three runs of the same number of steps from the same weights: `grouped` lays out each distinct response of a
step once; `apart` takes the same comparisons in the same steps, but every pair brings its own prompt and
both responses, so its numbers must be the same and only the time differs; `shuffled` is what one does
without groups: all pairs in random order, each by itself. Accuracy is on held-out prompts.
"""

import argparse
import dataclasses
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from hafrm.data.encoding import Encoder
from hafrm.data.reader import read_preferences
from hafrm.data.splits import split_by_prompt
from hafrm.engine.model import HybridModel
from hafrm.preferences import Comparison, TokenizedGroup
from hafrm.recipe_file import build_recipe
from hafrm.scoring.forward import run_forward
from hafrm.statistics import Estimate, accuracy_interval
from hafrm.training.methods import get_method
from hafrm.training.passes import reference_logps
from hafrm.training.setup import build_model
from hafrm.training.step import NonFiniteCheck, build_optimizer, take_step
from hafrm.training.step_batches import ComparisonOrder, ComparisonRef, build_micro_batch, plan_step

BATCH = 16


@dataclass(frozen=True)
class Run:
    """What one way of laying out comes to."""

    seconds: float
    tokens: int
    loss: float
    accuracy: Estimate
    """On held-out prompts, resampled by prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--per-prompt", type=int, default=16)
    parser.add_argument("--method", default="haf")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    lines = []
    for data in args.data:
        lines += compare(args, data)
    print(
        f"\n{args.method}, {args.steps} steps of {BATCH}, {args.per_prompt} comparisons of a prompt"
    )
    print("| data | run | seconds | tokens | x grouped | last losses | held-out accuracy [95 %] |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))


def compare(args: argparse.Namespace, data: str) -> list[str]:
    """Table rows of one data set."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    encoder = Encoder(tokenizer, max_length=args.max_length)
    train, test = split_by_prompt(read_preferences([data]).groups, 0.25, seed=0)
    groups, held_out = encoder.encode(train)[0], encoder.encode(test)[0]
    together = ComparisonOrder(groups, per_prompt=args.per_prompt, seed=0)
    window = together.window(0, args.steps * BATCH)
    pairs = apart(groups)
    place = {(p.group, p.comparison): i for i, p in enumerate(all_picks(groups))}
    same = [ComparisonRef(place[pick.group, pick.comparison], 0) for pick in window]
    random = np.random.default_rng(0).permutation(len(pairs))
    shuffled = [ComparisonRef(int(random[i % len(random)]), 0) for i in range(args.steps * BATCH)]
    name = Path(data).name.split(".")[0]
    runs = {
        "grouped": train_on(args, groups, window, held_out, encoder),
        "apart, same steps": train_on(args, pairs, same, held_out, encoder),
        "shuffled pairs": train_on(args, pairs, shuffled, held_out, encoder),
    }
    base = runs["grouped"].seconds
    rows = []
    for kind, run in runs.items():
        rows.append(
            f"| {name} | {kind} | {run.seconds:.1f} | {run.tokens} | {run.seconds / base:.2f} | "
            f"{run.loss:.5f} | {run.accuracy} |"
        )
    return rows


def all_picks(groups: Sequence[TokenizedGroup]) -> list[ComparisonRef]:
    """Every comparison that can be trained on."""
    return [
        ComparisonRef(i, c)
        for i, group in enumerate(groups)
        for c, comparison in enumerate(group.comparisons)
        if not comparison.tie
    ]


def apart(groups: Sequence[TokenizedGroup]) -> list[TokenizedGroup]:
    """Each comparison as a pair of its own."""
    pairs = []
    for pick in all_picks(groups):
        group = groups[pick.group]
        c = group.comparisons[pick.comparison]
        pairs.append(
            dataclasses.replace(
                group,
                response_ids=(group.response_ids[c.chosen], group.response_ids[c.rejected]),
                comparisons=(Comparison(0, 1, margin=c.margin, weight=c.weight),),
            )
        )
    return pairs


def train_on(
    args: argparse.Namespace,
    groups: Sequence[TokenizedGroup],
    picks: Sequence[ComparisonRef],
    held_out: Sequence[TokenizedGroup],
    encoder: Encoder,
) -> Run:
    """Train on the picks in order, BATCH to a step; the clock runs over the steps alone."""
    used = {index: place for place, index in enumerate(dict.fromkeys(p.group for p in picks))}
    groups = [
        groups[index] for index in used
    ]  # so that the reference pass is no longer than needed
    picks = [ComparisonRef(used[p.group], p.comparison) for p in picks]
    recipe = build_recipe(
        {
            "model": {"path": args.model},
            "data": {"train": ["unused.jsonl"], "max_length": args.max_length},
        }
    )
    method = get_method(args.method)
    model = build_model(recipe, method, encoder, torch.device("cpu"))
    references = reference_logps(model, groups, max_tokens=8192) if method.needs_reference else None
    optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate
    guard, tokens, losses = NonFiniteCheck(torch.device("cpu")), 0, []
    start = time.perf_counter()
    for step in range(args.steps):
        (plan,) = plan_step(groups, picks[step * BATCH : (step + 1) * BATCH], max_tokens=4096)
        batches = [build_micro_batch(parts, references) for parts in plan]
        result = take_step(
            model,
            optimizer,
            batches,
            method,
            num_comparisons=BATCH,
            max_grad_norm=1.0,
            nonfinite=guard,
        )
        tokens += result.num_tokens
        losses.append(result.sums[0] / BATCH)
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s, {tokens} tokens", file=sys.stderr, flush=True)
    last = float(torch.stack(losses[-20:]).mean())
    return Run(seconds, tokens, last, held_out_accuracy(model, held_out))


def held_out_accuracy(model: HybridModel, groups: Sequence[TokenizedGroup]) -> Estimate:
    """Comparisons whose chosen response gets the higher reward."""
    scores = run_forward(model.eval(), groups, max_tokens=8192)
    assert scores.rewards is not None
    right, prompts = [], []
    for number, (group, first) in enumerate(zip(groups, scores.first, strict=True)):
        for c in group.comparisons:
            if not c.tie:
                right.append(scores.rewards[first + c.chosen] > scores.rewards[first + c.rejected])
                prompts.append(number)
    return accuracy_interval(np.array(right), np.array(prompts))


if __name__ == "__main__":
    main()
