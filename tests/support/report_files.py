"""Results and provenance as the tests of the model card write them."""

import json
import math
from pathlib import Path
from typing import Any

from hafrm.statistics import wilson


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
    return {
        "num": num,
        "num_correct": round(value * num),
        "num_equal": 1,
        "estimate": estimate(round(value * num) / num, num),
    }


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
    return {"log_loss": 0.641, "ece": 0.0473, "bins": bins}


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
    return {"name": name, **main, "implicit": implicit, "agreement": agree}


def write_json(path: Path, value: object) -> None:
    """JSON, with the folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


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
