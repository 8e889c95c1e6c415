"""Is `alpha: auto` less sensitive than a fixed alpha? Accuracy on held-out data over a grid of each.

    python benchmarks/alpha.py --model MODEL_DIRECTORY --data preferences.jsonl --out study

Every run takes as many steps from the same base model; only the weight of the policy loss and the seed of
head and order differ, and what is measured is the last step, not a chosen one. A run is a file in
OUT/cells: called again, the script goes on where it was ended. Prints one table and writes OUT/alpha.json.
"""

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from hafrm.atomic import atomic_write
from hafrm.data.encoding import Encoder
from hafrm.data.reader import read_preferences
from hafrm.data.splits import split_by_prompt
from hafrm.engine.model import HybridModel
from hafrm.preferences import TokenizedGroup
from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe
from hafrm.scoring.forward import run_forward
from hafrm.statistics import Estimate, accuracy_interval, seeded_mean
from hafrm.training.balance import Balance, Weighing, new_balance
from hafrm.training.batches import ComparisonOrder, References, build, plan_step
from hafrm.training.methods import GRADIENT_RATIO, Method, get_method
from hafrm.training.prepare import build_model, load_tokenizer
from hafrm.training.reference import reference_logps
from hafrm.training.schedule import learning_rate
from hafrm.training.step import build_optimizer, losses_of, take_step

CPU = torch.device("cpu")
ALPHAS = (0.01, 0.05, 0.2, 1.0, 5.0)
RATIOS = (0.05, 0.2, 0.5, 1.0, 4.0)
LOSSES = ("dpo", "sft", "ipo", "simpo")
PROBED = 32
"""Comparisons on which the ratio of gradients is measured, before the first step and after the last."""


@dataclass(frozen=True)
class Setting:
    """One policy loss and one way of weighing it."""

    policy_loss: str
    kind: str
    """alpha (a fixed one) or ratio (alpha auto)."""
    value: float

    @property
    def name(self) -> str:
        return f"{self.policy_loss}-{self.kind}-{self.value:g}"

    def method(self) -> Method:
        weight: dict[str, Any] = {"alpha": self.value}
        if self.kind == "ratio":
            weight = {"alpha": "auto", "gradient_ratio": self.value}
        return get_method("haf", policy_loss=self.policy_loss, **weight)


VALUES = {
    "alpha": [Setting("dpo", "alpha", value) for value in ALPHAS],
    "ratio": [Setting("dpo", "ratio", value) for value in RATIOS],
}
"""Both grids, with DPO."""
DEFAULTS = {
    "alpha": [Setting(loss, "alpha", 0.2) for loss in LOSSES],
    "ratio": [Setting(loss, "ratio", GRADIENT_RATIO) for loss in LOSSES],
}
"""Every policy loss, with what stands where nobody says anything."""


def settings() -> list[Setting]:
    """All of them once."""
    return list(
        dict.fromkeys(s for grid in (VALUES, DEFAULTS) for each in grid.values() for s in each)
    )


class Parts(NamedTuple):
    """Encoded data and what the reference says of it."""

    train: list[TokenizedGroup]
    test: list[TokenizedGroup]
    train_references: References
    test_references: References


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--test", nargs="*", default=[], help="default: a fifth of --data")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--num-test", type=int, default=400, help="most comparisons tested on")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    check_setting(args)
    cells = list(every_cell(args))
    report = summary(args, cells)
    atomic_write(args.out / "alpha.json", json.dumps(report, indent=1).encode())
    print(table(args, report))


def check_setting(args: argparse.Namespace) -> None:
    """Cells of another setting are not gone on with."""
    setting = {k: v for k, v in vars(args).items() if k not in ("out", "threads", "seeds")}
    file = args.out / "setting.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if file.is_file() and json.loads(file.read_text()) != setting:
        raise SystemExit(f"{args.out} holds a study with another setting; give another --out")
    atomic_write(file, json.dumps(setting, indent=1).encode())


def every_cell(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs' findings, those of an earlier call read from disk."""
    wanted = [(setting, seed) for seed in args.seeds for setting in settings()]
    parts: Parts | None = None
    cells = []
    for number, (setting, seed) in enumerate(wanted, 1):
        file = args.out / "cells" / f"{setting.name}-seed-{seed}.json"
        if not file.is_file():
            parts = parts or prepare(args)
            file.parent.mkdir(exist_ok=True)
            start = time.perf_counter()
            found = run(args, setting, seed, parts)
            found["seconds"] = time.perf_counter() - start
            atomic_write(file, json.dumps(found).encode())
            right = np.mean(np.array(found["margins"]) > 0)
            print(f"{number}/{len(wanted)} {file.stem}: {right:.3f}", flush=True)
        cells.append(json.loads(file.read_text()))
    return cells


def recipe_of(args: argparse.Namespace, seed: int) -> Recipe:
    return build_recipe(
        {
            "model": {"path": args.model},
            "data": {"train": list(args.data), "max_length": args.max_length},
            "training": {"seed": seed, "learning_rate": args.learning_rate, "steps": args.steps},
        }
    )


def prepare(args: argparse.Namespace) -> Parts:
    """Read, split by prompt, encode, and run the reference once."""
    recipe = recipe_of(args, 0)
    encoder = Encoder(load_tokenizer(recipe), max_length=args.max_length)
    train, test = (
        read_preferences(args.data).groups,
        read_preferences(args.test).groups if args.test else [],
    )
    if not args.test:
        train, test = split_by_prompt(train, 0.2, seed=0)
    few = np.random.default_rng(0).permutation(len(test))[: args.num_test]
    groups = encoder.encode(train)[0], encoder.encode([test[i] for i in sorted(few)])[0]
    model = build_model(recipe, get_method("haf"), encoder, CPU)
    references = [reference_logps(model, part, max_tokens=4096) for part in groups]
    args.encoder = encoder
    return Parts(*groups, *references)


def run(args: argparse.Namespace, setting: Setting, seed: int, parts: Parts) -> dict[str, Any]:
    """Train from the base model and score the test comparisons."""
    recipe, method = recipe_of(args, seed), setting.method()
    model = build_model(recipe, method, args.encoder, CPU)
    ratios = [measured_ratio(model, method, method.alpha, parts)]
    optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    order = ComparisonOrder(parts.train, per_prompt=4, seed=seed)
    balance, alphas = new_balance(method, CPU), []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.training, step, args.steps)
        picks = order.window(step * args.batch_size, args.batch_size)
        (plan,) = plan_step(parts.train, picks, max_tokens=2048)
        result = take_step(
            model,
            optimizer,
            [build(part, parts.train_references) for part in plan],
            method,
            num_comparisons=args.batch_size,
            max_grad_norm=1.0,
            balance=balance,
        )
        balance = result.balance
        alphas.append(method.alpha if result.alpha is None else float(result.alpha))
    ratios.append(measured_ratio(model, method, alphas[-1], parts))
    found = {"setting": asdict(setting), "seed": seed, "alphas": alphas, "ratios": ratios}
    return found | score(model, method, parts)


def measured_ratio(model: HybridModel, method: Method, alpha: float, parts: Parts) -> float:
    """||alpha * g_policy|| / ||g_reward|| where the heads read, whoever sets alpha."""
    weighing = Weighing(Balance(1.0, alpha, torch.zeros(2)), CPU)
    picks = ComparisonOrder(parts.train, per_prompt=1, seed=2**31).window(0, PROBED)
    (plan,) = plan_step(parts.train, picks, max_tokens=2048)
    for part in plan:
        batch = build(part, parts.train_references)
        losses_of(
            model(batch.layout, weighing.watch), batch, method, weighing.alpha
        ).total.sum().backward()
    model.zero_grad(set_to_none=True)
    reward, policy = weighing.squares().tolist()
    return float(alpha * (policy / reward) ** 0.5)


def score(model: HybridModel, method: Method, parts: Parts) -> dict[str, list[float]]:
    """Both heads' margins on the test comparisons."""
    scores = run_forward(model.eval(), parts.test, max_tokens=4096)
    assert scores.rewards is not None
    assert scores.logps is not None
    implicit = method.implicit_rewards(
        torch.from_numpy(scores.logps),
        torch.from_numpy(scores.lengths),
        torch.from_numpy(parts.test_references.logps),
    ).numpy()
    sides = [
        (first + c.chosen, first + c.rejected, number)
        for number, (group, first) in enumerate(zip(parts.test, scores.first, strict=True))
        for c in group.comparisons
        if not c.tie
    ]
    chosen, rejected, prompts = np.array(sides).T
    return {
        "margins": (scores.rewards[chosen] - scores.rewards[rejected]).tolist(),
        "implicit_margins": (implicit[chosen] - implicit[rejected]).tolist(),
        "prompts": prompts.tolist(),
    }


def summary(args: argparse.Namespace, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row for each setting, and how far accuracy and log-loss spread over values and over losses."""
    rows, margins = [], {}
    for setting in settings():
        mine = [cell for cell in cells if cell["setting"] == asdict(setting)]
        values = margins[setting] = np.array([cell["margins"] for cell in mine])
        implicit = np.array([cell["implicit_margins"] for cell in mine])
        prompts = np.array(mine[0]["prompts"])
        rows.append(
            {
                **asdict(setting),
                "alpha": float(np.mean([cell["alphas"] for cell in mine])),
                "ratios": np.mean([cell["ratios"] for cell in mine], axis=0).tolist(),
                "accuracy": asdict(share(values > 0, prompts)),
                "log_loss": float(np.logaddexp(0.0, -values).mean()),
                "implicit_accuracy": asdict(share(implicit > 0, prompts)),
            }
        )
    measures = {"accuracy": lambda m: m > 0, "log_loss": lambda m: np.logaddexp(0.0, -m)}
    spreads = {
        f"{name} over {over}": spread_of(
            {k: np.stack([of(margins[s]).mean(0) for s in each]) for k, each in grid.items()},
            prompts,
        )
        for over, grid in (("values, with dpo", VALUES), ("policy losses", DEFAULTS))
        for name, of in measures.items()
    }
    return {
        "num_test": len(prompts),
        "seeds": args.seeds,
        "steps": args.steps,
        "rows": rows,
        "spreads": spreads,
        "seconds": sum(cell["seconds"] for cell in cells),
    }


def share(right: NDArray[np.bool_], prompts: NDArray[Any]) -> Estimate:
    """Of [seeds, comparisons], with the interval that suits the number of seeds."""
    return seeded_mean(right, prompts) if len(right) > 1 else accuracy_interval(right[0], prompts)


def spread_of(grids: dict[str, NDArray[Any]], prompts: NDArray[Any]) -> dict[str, list[float]]:
    """Largest less smallest mean of [settings, comparisons], for each grid, and the difference of the two.

    The 95 % intervals draw prompts, the same for all settings. Noise alone gives any grid a spread above
    0, the same for grids of one size; the seeds are not drawn.
    """
    _, index = np.unique(prompts, return_inverse=True)
    draw = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {"alpha": [], "ratio": [], "difference": []}
    for resample in range(2001):
        counts = np.ones(index.max() + 1)
        if resample:
            counts = np.bincount(draw.integers(0, len(counts), len(counts)), minlength=len(counts))
        weights = counts[index] / counts[index].sum()
        for kind, values in grids.items():
            drawn[kind].append(float(np.ptp(values @ weights)))
        drawn["difference"].append(drawn["alpha"][-1] - drawn["ratio"][-1])
    return {
        name: [values[0], *np.percentile(values[1:], [2.5, 97.5]).tolist()]
        for name, values in drawn.items()
    }


def table(args: argparse.Namespace, report: dict[str, Any]) -> str:
    """The study as Markdown."""
    lines = [
        f"\n{report['num_test']} test comparisons, {args.steps} steps of {args.batch_size}, "
        f"seeds {args.seeds}, {report['seconds']:.0f} s",
        "| policy loss | set | mean alpha | gradient ratio, first and last | reward accuracy [95 %] "
        "| log-loss | implicit accuracy [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        first, last = row["ratios"]
        words = (Estimate(**row[name]) for name in ("accuracy", "implicit_accuracy"))
        accuracy, implicit = map(str, words)
        lines.append(
            f"| {row['policy_loss']} | {row['kind']} {row['value']:g} | {row['alpha']:.3g} | "
            f"{first:.3g}, {last:.3g} | {accuracy} | {row['log_loss']:.3f} | {implicit} |"
        )
    for name, spreads in report["spreads"].items():
        shown = {
            kind: "{:.3f} [{:.3f}, {:.3f}]".format(*values) for kind, values in spreads.items()
        }
        lines.append(
            f"\nspread of {name} [95 %]: with a fixed alpha {shown['alpha']}, with auto {shown['ratio']}, "
            f"difference {shown['difference']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
