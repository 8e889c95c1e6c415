"""The first-batch check: shared prompts against one response at a time, before anything is built on it."""

from typing import NamedTuple

import torch
from torch import Tensor

from hafrm.engine.layout import Layout
from hafrm.engine.model import HybridModel
from hafrm.errors import NumericsError


class Disagreement(NamedTuple):
    """Largest difference between shared and plain outputs, and what is tolerated."""

    hidden: float
    """Of the states that rewards are read from, relative to their norm."""
    logp: float
    """Relative to max(1, |log-prob|)."""
    tolerance: float


@torch.no_grad()
def self_check(model: HybridModel, layout: Layout, tolerance: float | None = None) -> Disagreement:
    """Compare shared with plain on one small layout; no-op numbers for an unshared model.

    Not rewards but the states that they are read from: a reward near 0 is rounded as coarsely as a large
    one. Tolerances: 1e-3 in float32 (a wrong mask is off by 0.1 and more), 0.1 with half-precision weights
    or autocast.

    Raises NumericsError when they disagree.
    """
    if not model.sharing:
        return Disagreement(0.0, 0.0, 0.0)
    half = torch.is_autocast_enabled(model.device.type)
    half = half or next(model.backbone.parameters()).dtype in (torch.float16, torch.bfloat16)
    tolerance = tolerance if tolerance is not None else (0.1 if half else 1e-3)
    states, logps = _read(model, layout)
    model.share(False)
    try:
        plain_states, plain_logps = _read(model, layout)
    finally:
        model.share(True)
    hidden = logp = 0.0
    if states is not None and plain_states is not None:
        apart = (states - plain_states).norm(dim=1) / plain_states.norm(dim=1)
        hidden = float(apart.max())
    if logps is not None and plain_logps is not None:
        logp = float(((logps - plain_logps).abs() / plain_logps.abs().clamp(min=1.0)).max())
    if not (hidden <= tolerance and logp <= tolerance):  # a NaN is no agreement
        raise NumericsError(
            "with shared prompts this model gives other numbers than one response at a time: hidden states "
            f"differ by {hidden:.2g}, log-probs by {logp:.2g} (relative; tolerated {tolerance:g}). Its "
            "layers cannot share a prefix; set training.sharing: off"
        )
    return Disagreement(hidden, logp, tolerance)


def _read(model: HybridModel, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    """What the reward head reads of each response, and the log-probs, of the heads that there are."""
    outputs = model(layout)
    states = outputs.reward_states
    return None if states is None else states.float(), outputs.logps
