"""Run a model over many groups without gradients: rewards and log-probs of every response.

The one bulk path: reference log-probs, validation, evaluation and scoring all come through here, laid
out and packed as in training. Groups are taken longest first within windows, so that rows are full and
memory peaks at the start; results come back in the order given.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hafrm.engine.layout import Branches, lay_out
from hafrm.engine.model import HybridModel
from hafrm.engine.packing import first_fit_decreasing
from hafrm.errors import NumericsError


@dataclass(frozen=True)
class Scores:
    """Per response, in the order of the groups; absent heads give None."""

    rewards: NDArray[np.float32] | None
    logps: NDArray[np.float32] | None
    lengths: NDArray[np.int64]
    first: NDArray[np.int64]
    """Index of each group's first response."""


def first_responses(groups: Sequence[Branches]) -> NDArray[np.int64]:
    """Index of each group's first response when all responses are counted through."""
    counts = [len(group.response_ids) for group in groups]
    return np.cumsum([0, *counts])[:-1].astype(np.int64)


@torch.no_grad()
def run_forward(
    model: HybridModel,
    groups: Sequence[Branches],
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
    done: Callable[[int], None] | None = None,
) -> Scores:
    """Scores of all responses of `groups`, `max_tokens` to a row; `done(n)` hears of finished groups.

    Raises NumericsError for a score that is not finite, naming such groups by index.
    """
    first = first_responses(groups)
    total = sum(len(group.response_ids) for group in groups)
    rewards = np.full(total, np.nan, np.float32)
    logps = np.full(total, np.nan, np.float32)
    lengths = np.zeros(total, np.int64)
    device = model.device
    context = (
        contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    )
    for row in plan_rows(groups, max_tokens):
        with context:
            outputs = model(lay_out([groups[i] for i in row]).to(device))
        owner = np.repeat(row, [len(groups[i].response_ids) for i in row])
        where = np.concatenate(
            [np.arange(first[i], first[i] + len(groups[i].response_ids)) for i in row]
        )
        lengths[where] = outputs.lengths.cpu().numpy()
        for values, output in ((rewards, outputs.rewards), (logps, outputs.logps)):
            if output is not None:
                values[where] = output.float().cpu().numpy()
                _check_finite(values[where], owner)
        if done is not None:
            done(len(row))
    return Scores(
        rewards=None if model.reward_head is None else rewards,
        logps=None if model.policy_head is None else logps,
        lengths=lengths,
        first=first,
    )


def plan_rows(groups: Sequence[Branches], max_tokens: int, window: int = 512) -> list[list[int]]:
    """Indices of the groups of each row, longest rows first; only neighbours in length share a row."""
    sizes = [len(g.prompt_ids) + sum(len(r) for r in g.response_ids) for g in groups]
    order = sorted(range(len(groups)), key=lambda i: -sizes[i])
    rows = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        bins = first_fit_decreasing([sizes[i] for i in part], max_tokens)
        rows += [[part[i] for i in b] for b in bins]
    return rows


def _check_finite(values: NDArray[np.float32], owner: NDArray[np.int64]) -> None:
    bad = np.unique(owner[~np.isfinite(values)]).tolist()
    if bad:
        raise NumericsError(
            f"the model gives scores that are not finite for {len(bad)} groups of a row, such as "
            f"{bad[:8]} (by index); check its weights, or run it in float32"
        )
