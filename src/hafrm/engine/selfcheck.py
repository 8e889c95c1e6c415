"""The first-batch check: shared prompts against one response at a time, before anything is built on it."""

from typing import NamedTuple

import torch
from torch import Tensor

from hafrm.engine.layout import Layout
from hafrm.engine.model import HybridModel
from hafrm.errors import NumericsError


class Disagreement(NamedTuple):
    """Largest difference between shared and plain outputs, and what is tolerated."""

    reward: float
    logp: float
    tolerance: float


@torch.no_grad()
def self_check(model: HybridModel, layout: Layout, tolerance: float | None = None) -> Disagreement:
    """Compare shared with plain on one small layout; no-op numbers for an unshared model.

    Differences are relative to max(1, |value|). Tolerances: 1e-3 in float32 (a wrong mask is off by
    0.1 and more), 0.1 with half-precision weights or autocast.

    Raises NumericsError when they disagree.
    """
    if not model.sharing:
        return Disagreement(0.0, 0.0, 0.0)
    half = torch.is_autocast_enabled(model.device.type)
    half = half or next(model.backbone.parameters()).dtype in (torch.float16, torch.bfloat16)
    tolerance = tolerance if tolerance is not None else (0.1 if half else 1e-3)
    shared = model(layout)
    model.share(False)
    try:
        plain = model(layout)
    finally:
        model.share(True)
    found = Disagreement(
        _difference(shared.rewards, plain.rewards),
        _difference(shared.logps, plain.logps),
        tolerance,
    )
    if not (found.reward <= tolerance and found.logp <= tolerance):  # a NaN is no agreement
        raise NumericsError(
            "with shared prompts this model gives other numbers than one response at a time: rewards "
            f"differ by {found.reward:.2g}, log-probs by {found.logp:.2g} (relative; tolerated "
            f"{tolerance:g}). Its layers cannot share a prefix; set training.sharing: off"
        )
    return found


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0
    return float(((a - b).abs() / b.abs().clamp(min=1.0)).max())
