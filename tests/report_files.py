"""Folders as the verbs write them, small and made up, for tests of the report and for looking at it.

`python tests/report_files.py FOLDER` writes one of every kind.
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from hafrm.statistics import wilson, with_bounds

HOSTILE = (
    "<script>alert('x')</script> & \"quoted\" $\\alpha$ </style><img src=https://evil.example/x>"
)
METHODS = ("haf", "bt", "dpo")
SETS = ("helpful", "harmless", "chat")


def estimate(value: float, num: int, *, half: float | None = None) -> dict[str, Any]:
    """A share with Wilson's interval, or any value with half an interval's width."""
    low, high = wilson(value, num) if half is None else (value - half, value + half)
    return {
        "value": value,
        "low": low,
        "high": high,
        "num": num,
        "method": "wilson" if half is None else "cluster-bootstrap",
        "confidence": 0.95,
        "proportion": half is None,
    }


def accuracy(value: float, num: int) -> dict[str, Any]:
    """An Accuracy."""
    counts = {"num_correct": round(value * num), "num_equal": 1}
    return estimate(round(value * num) / num, num) | counts


def calibration(num: int, sharpness: float = 1.3) -> dict[str, Any]:
    """A Calibration of a scorer that is too sure of itself, point-symmetric as they are."""
    confidences = [(i + 0.5) / 10 for i in range(10)]
    bins = [
        {
            "confidence": p,
            "accuracy": 1 / (1 + math.exp(-math.log(p / (1 - p)) / sharpness)),
            "num": num // 5,
        }
        for p in confidences
    ]
    return {"log_loss": 0.641, "brier": 0.226, "ece": 0.0473, "bins": bins}


def set_result(name: str, value: float, num: int = 400, *, both: bool = False) -> dict[str, Any]:
    """What `hafrm evaluate` finds on one set."""
    bands = ("much shorter", "shorter", "about equal", "longer", "much longer")
    slices = {
        band: accuracy(value + 0.07 * (i - 2), max(20, num // 5)) for i, band in enumerate(bands)
    }
    main = {
        "accuracy": accuracy(value, num),
        "mean_margin": 0.4,
        "calibration": calibration(num),
        "length": {
            "slices": slices,
            "pick_longer": accuracy(0.53, num),
            "pick_shorter": accuracy(0.46, num),
            "pearson": 0.21,
            "spearman": 0.19,
        },
        "ties": {"num": 3, "mean_abs_margin": 0.2, "mean_abs_margin_decided": 0.5},
    }
    implicit = {**main, "accuracy": accuracy(value - 0.02, num)} if both else None
    agree = {"same_sign": estimate(0.74, num), "pearson": 0.51, "spearman": 0.5} if both else None
    return {"name": name, "num_groups": num, **main, "implicit": implicit, "agreement": agree}


def write_json(path: Path, value: object) -> None:
    """JSON, with the folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, with the folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path, method: str = "haf", *, lift: float = 0.0, steps: int = 400) -> Path:
    """A finished training run with its test results."""
    draw = random.Random(method)
    records: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        part = step / steps
        loss = 0.69 - 0.16 * part + draw.gauss(0, 0.02)
        share = min(0.99, 0.5 + 0.22 * part + draw.gauss(0, 0.04))
        record: dict[str, Any] = {"step": step, "kind": "train", "loss": loss}
        if method != "dpo":
            record |= {"reward_loss": loss, **with_bounds("accuracy", share, 160)}
            record |= {"margin": part, "chosen_reward": part / 2, "rejected_reward": -part / 2}
        if method != "bt":
            record |= {"policy_loss": loss + 0.02, "implicit_margin": part / 3}
            record |= with_bounds("implicit_accuracy", share - 0.02, 160)
        record |= {
            "grad_norm": 2 + draw.random(),
            "learning_rate": 1e-3 * (1 - part),
            "comparisons_per_second": 30 + draw.random(),
            "tokens_per_second": 5000 + 300 * draw.random(),
        }
        records.append(record)
        if step % 50 == 0:
            held = 0.62 + 0.05 * math.sin(3 * part) + lift
            loss = 0.69 - 0.08 * math.sin(3 * part)
            found = {"step": step, "kind": "validation", **with_bounds("accuracy", held, 200)}
            found |= {"loss": loss, "margin": 0.8 * part}
            if method == "haf":
                found |= with_bounds("implicit_accuracy", held - 0.03, 200)
            records.append(found)
    write_lines(folder / "metrics.jsonl", records)
    (folder / "recipe.yaml").write_text(
        "model: {path: models/tiny-base}\n"
        "data: {train: [data/train.jsonl], test: [data/test-helpful.jsonl]}\n"
        f"method: {{name: {method}}}\n"
        "training: {batch_size: 16, learning_rate: 0.001}\n"
        "evaluation: {metric: loss}\n"
    )
    write_json(folder / "provenance.json", {"sessions": [session()]})
    (folder / "model").mkdir(exist_ok=True)
    both = method == "haf"
    sets = [
        set_result("data/test-helpful.jsonl", 0.64 + lift, both=both),
        set_result("data/test-harmless.jsonl", 0.44 + lift, both=both),
        set_result("all", 0.55 + lift, 800, both=both),
    ]
    test = {"model": str(folder), "scored_with": "reward", "sets": sets, "num_bad_rows": 2}
    test |= {"left_out": {}, "responses_cut": 4, "prompts_cut": 0, "seam_merges": 1}
    write_json(folder / "test.json", test)
    return folder


def session() -> dict[str, Any]:
    """One process of a run."""
    return {
        "started": "2026-11-25T10:00:00+00:00",
        "command": "hafrm train recipe.yaml --out run",
        "git": {"commit": "0c5c0ba8f1d2", "changed": True},
        "platform": "Linux x86_64",
        "versions": {"python": "3.12.3", "hafrm": "0.1.0", "torch": "2.13.0"},
        "seed": 7,
        "data": {"data/train.jsonl": "ab" * 32},
        "counts": {"train_comparisons": 6400, "bad_rows": 3, "encoding": {"responses_cut": 12}},
        "template_sha256": "cd" * 32,
    }


def write_diagnostics(folder: Path, *, text: str = "How do I tie a bowline?") -> Path:
    """Everything that `hafrm diagnose` finds."""
    # of |margin|, as they are written
    edges = [0.25 * i for i in range(13)]
    right = [round(60 * math.exp(-((e - 0.6) ** 2))) for e in edges[:-1]]
    wrong = [round(40 * math.exp(-((e + 0.2) ** 2))) for e in edges[:-1]]
    features = ("length", "lists", "bold", "exclamation marks", "first person")
    style = [
        {
            "feature": name,
            "accuracy_more": estimate(0.72 - 0.03 * i, 180),
            "accuracy_less": estimate(0.55 + 0.02 * i, 160),
            "picks_more": estimate(0.66 - 0.06 * i, 340),
            "annotators_pick_more": estimate(0.55 - 0.02 * i, 340),
        }
        for i, name in enumerate(features)
    ]
    kinds = [
        ("turns", "1", 0.66, 210),
        ("turns", "2 to 4", 0.61, 130),
        ("label", "people", 0.6, 90),
    ]
    diagnosed = {
        "name": "data/test-helpful.jsonl",
        "num": 400,
        "accuracy": accuracy(0.64, 400),
        "temperature": {"value": 1.62, "log_loss": [0.664, 0.641], "ece": [0.071, 0.031]},
        "calibration": calibration(400),
        "margins": {"edges": edges, "right": right, "wrong": wrong},
        "style": style,
        "slices": [{"tag": t, "value": v, "accuracy": estimate(a, n)} for t, v, a, n in kinds],
        "agreement": {"same_sign": estimate(0.74, 400), "pearson": 0.5, "spearman": 0.49},
    }
    noise = {
        "num": 400,
        "models": ["haf", "haf-1", "haf-2"],
        "by_disagreement": [
            {
                "low": 0.1 + 0.2 * i,
                "high": 0.1 + 0.2 * i,
                "num": 80,
                "accuracy": estimate(0.82 - 0.08 * i, 80),
                "split": estimate(0.08 + 0.07 * i, 80),
            }
            for i in range(5)
        ],
        "predictors": [{"name": "disagreement", "auc": estimate(0.71, 400, half=0.04)}],
        "against": {
            "fraction": estimate(0.12, 400),
            "split": estimate(0.5, 48),
            "split_others": estimate(0.25, 352),
        },
    }
    spectrum = [0.22 * 0.88**i for i in range(64)]
    representation = {
        "model": str(folder),
        "effective_rank": 31.2,
        "top_fraction": 0.22,
        "spectrum": spectrum,
        "cka_to_base": 0.87,
        "cosine_to_base": 0.93,
    }
    base = {
        "model": "base",
        "effective_rank": 44.0,
        "top_fraction": 0.12,
        "spectrum": [0.12 * 0.94**i for i in range(64)],
    }
    worst = [
        {
            "set": "data/test-helpful.jsonl",
            "prompt": text,
            "chosen": "You make a small loop, pass the end up through it, around the back and down again.",
            "rejected": "A bowline is a knot. " * 8 + text,
            "margin": -2.31 + 0.2 * i,
            "votes": [3, 1, 1] if i else None,
            "why": "all three models prefer the rejected response",
        }
        for i in range(4)
    ]
    found = {
        "model": str(folder),
        "scored_with": "reward",
        "sets": [diagnosed],
        "label_noise": noise,
        "representations": [representation],
        "base": base,
        "own_policy": {
            "num_prompts": 100,
            "preferences": [
                {
                    "reward_model": judge,
                    "policy": "haf",
                    "against": "dpo",
                    "is_own": judge == "haf",
                    "win": estimate(0.62 if judge == "haf" else 0.55, 100),
                    "length_matched": estimate(0.56, 40),
                    "longer": estimate(0.58, 100),
                }
                for judge in ("haf", "bt")
            ],
        },
        "worst": worst,
    }
    write_json(folder / "diagnostics.json", found)
    return folder


def write_comparison(folder: Path) -> Path:
    """Three methods on three sets, with an alpha sweep."""
    cells, differences = [], []
    bonus = {"haf": 0.04, "bt": 0.0, "dpo": 0.01}
    for i, train in enumerate(SETS):
        for j, test in enumerate(SETS):
            base = 0.68 if i == j else 0.52 - 0.05 * abs(i - j)
            for method in METHODS:
                value = base + bonus[method] * (1 + j)
                seeds = [value - 0.01, value, value + 0.01]
                cells.append(
                    {
                        "train": train,
                        "method": method,
                        "test": test,
                        "accuracy": estimate(value, 1000),
                        "per_seed": seeds,
                        "ece": 0.05,
                        "log_loss": 0.63,
                    }
                )
            for second in ("bt", "dpo"):
                gap = (bonus["haf"] - bonus[second]) * (1 + j)
                real = gap > 0.07
                differences.append(
                    {
                        "train": train,
                        "test": test,
                        "first": "haf",
                        "second": second,
                        "difference": estimate(gap, 1000, half=0.035),
                        "p_value": 0.0004 if real else 0.08,
                        "p_adjusted": 0.006 if real else 0.4,
                    }
                )
    rates = [
        {
            "train": train,
            "method": method,
            "chosen": 3e-4,
            "tried": [[1e-4, 0.66], [3e-4, 0.64]],
        }
        for train in SETS
        for method in METHODS
    ]
    alphas = [
        {
            "train": train,
            "test": test,
            "policy_loss": loss,
            "alpha": alpha,
            "accuracy": estimate(0.62 + 0.02 * math.sin(alpha * 3) + shift, 1000),
        }
        for train, test in (("helpful", "helpful"), ("helpful", "harmless"))
        for loss, shift in (("dpo", 0.02), ("sft", 0.0))
        for alpha in (0.05, 0.1, 0.2, 0.5, 1.0)
    ]
    found = {
        "recipe": "compare.yaml",
        "methods": list(METHODS),
        "seeds": [0, 1, 2],
        "train_sets": list(SETS),
        "test_sets": list(SETS),
        "accuracies": cells,
        "pick_longer": {t: estimate(0.5 + 0.03 * i, 1000) for i, t in enumerate(SETS)},
        "differences": differences,
        "averages": [
            {"kind": kind, "method": m, "accuracy": estimate(v + bonus[m], 3000), "num_sets": n}
            for kind, v, n in (("in domain", 0.68, 3), ("other domain", 0.48, 6))
            for m in METHODS
        ],
        "average_differences": [
            {
                "train": "",
                "test": "in domain",
                "first": "haf",
                "second": "bt",
                "difference": estimate(0.04, 3000, half=0.02),
                "p_value": 0.0003,
                "p_adjusted": 0.0006,
            }
        ],
        "learning_rates": rates,
        "alphas": alphas,
        "seconds": 4321.0,
    }
    write_json(folder / "comparison.json", found)
    return folder


def write_best_of_n(folder: Path, *, text: str = "Tell me about the sea.") -> Path:
    """Two models; the second one is over-optimised."""
    models = []
    for name, fall in (("haf", 0.0), ("bt", 0.16)):
        curve = []
        for n in (1, 2, 4, 8, 16, 32):
            kl = math.log(n) - (n - 1) / n
            gold = 0.2 + 0.5 * math.sqrt(kl) - fall * kl**1.5 * 1.6
            curve.append(
                {
                    "n": n,
                    "kl": kl,
                    "proxy": estimate(
                        -0.3 + math.sqrt(kl) * (1.1 if fall else 0.9), 200, half=0.08
                    ),
                    "gold": estimate(gold, 200, half=0.09),
                }
            )
        examples = [
            {"prompt": text, "picked": "It is wide. " + text, "reward": 1.5 - i} for i in range(2)
        ]
        models.append(
            {
                "name": name,
                "curve": curve,
                "top1_agreement": estimate(0.31, 200),
                "examples": examples,
            }
        )
    wins = [
        {
            "first": "haf",
            "second": "bt",
            "win": 0.46,
            "tie": 0.2,
            "lose": 0.34,
            "difference": estimate(0.12, 200, half=0.09),
            "position_bias": 0.14,
        }
    ]
    found = {"num_prompts": 200, "num_candidates": 32, "models": models, "wins": wins}
    write_json(folder / "best_of_n.json", found)
    return folder


def write_rlhf_run(folder: Path, *, text: str = "Write a haiku.") -> Path:
    """A run whose gold reward turns round while the proxy rises."""
    records = []
    for step in range(1, 61):
        part = step / 60
        records.append(
            {
                "step": step,
                "phase": "rlhf",
                "reward": -0.4 + 2.2 * part,
                "kl": 12 * part**1.4,
                "length": 60 + 50 * part,
                "entropy": 2.4 - 1.1 * part,
                "clip_fraction": 0.1 + 0.05 * math.sin(9 * part),
                "value_loss": 0.6 - 0.3 * part,
                "policy_loss": -0.01 * part,
                "gold": 0.1 + 1.3 * part - 1.2 * part**2 if step % 5 == 0 else None,
            }
        )
    for step in range(0, 61, 12):
        part = step / 60
        held = {"step": step, "phase": "held-out", "kl": 12 * part**1.4, "length": 60 + 50 * part}
        for name, value in (
            ("reward", 2.2 * part - 0.4),
            ("gold", 0.1 + 1.3 * part - 1.2 * part**2),
        ):
            held |= {name: value, f"{name}_low": value - 0.06, f"{name}_high": value + 0.06}
        records.append({**held, "ended": 0.97})
    write_lines(folder / "metrics.jsonl", records)
    samples = [
        {
            "step": step,
            "prompt": text,
            "response": f"waves, step {step}\n{text}",
            "reward": step / 30,
            "kl": step / 5,
        }
        for step in (1, 20, 40, 60)
    ]
    write_lines(folder / "samples.jsonl", samples)
    (folder / "recipe.yaml").write_text("reward_model: run/model/reward\n")
    return folder


def write_rlhf_comparison(folder: Path) -> Path:
    """Two reward models, two seeds each."""
    curves = []
    for model, strength in (("haf", 1.0), ("bt", 1.25)):
        for seed in (0, 1):
            points = [
                {
                    "step": 5 * i,
                    "kl": 1.0 * i,
                    "proxy": 0.3 * i * strength,
                    "gold": 0.1 + 0.4 * i - 0.028 * i * i * strength + 0.08 * seed,
                }
                for i in range(13)
            ]
            curves.append({"model": model, "seed": seed, "points": points})
    wins = [
        {
            "first": "haf",
            "second": "bt",
            "win": 0.5,
            "tie": 0.1,
            "lose": 0.4,
            "difference": estimate(0.1, 100, half=0.17),
            "position_bias": None,
        }
    ]
    standings = [
        {
            "name": name,
            "score": estimate(score, 100, half=0.1),
            "gain": None if name == "start" else estimate(score - 0.1, 100, half=0.12),
            "length": 210.0,
            "kl": kl,
            "stopped": 0,
        }
        for name, score, kl in (("start", 0.1, 0.0), ("haf", 0.9, 11.2), ("bt", 0.5, 12.1))
    ]
    found = {"models": ["haf", "bt"], "seeds": [0, 1], "curves": curves, "wins": wins}
    found |= {"scored_by": "gold", "standings": standings}
    write_json(folder / "rlhf_comparison.json", found)
    return folder


def write_all(folder: Path, text: str = "How do I tie a bowline?") -> list[Path]:
    """One folder of every kind."""
    runs = [write_run(folder / m, m, lift=0.02 * i) for i, m in enumerate(METHODS)]
    write_diagnostics(runs[0], text=text)
    return [
        *runs,
        write_comparison(folder / "compared"),
        write_best_of_n(folder / "best-of-n", text=text),
        write_rlhf_run(folder / "ppo", text=text),
        write_rlhf_comparison(folder / "ppo-compared"),
    ]


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
