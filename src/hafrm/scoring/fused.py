"""Both heads in one score: reward + factor * implicit reward per token.

A run that trains both heads fits the factor on its validation comparisons, never on a test set, and
writes it beside the exported models.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float, Num
from numpy.typing import NDArray
from pydantic import Field
from scipy import optimize, special


@dataclass(frozen=True)
class FusedRule:
    """How much an implicit reward per token counts against a reward."""

    factor: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """0: the reward alone."""
    num: int = 0
    """Comparisons that it was fitted on."""
    note: str = ""
    """Why no factor could be fitted; empty if one was."""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"reward + {self.factor:.3g} x implicit reward per token{note}"


def fit_fused(
    reward_margins: Num[np.ndarray, " comparisons"],
    implicit_margins: Num[np.ndarray, " comparisons"],
) -> FusedRule:
    """The factor b / a >= 0 of P(chosen) = sigmoid(a * reward margin + b * implicit margin per token);
    0, with a note, where the data do not determine it."""
    x = np.stack([reward_margins, implicit_margins], axis=1).astype(np.float64)
    scale = np.sqrt((x**2).mean(0)) if len(x) else np.zeros(2)
    if not scale.all():
        return FusedRule(0.0, len(x), "one of the two scores does not separate any responses")
    x /= scale  # two scales far apart would make the problem ill-conditioned
    penalty = 1e-9  # keeps the coefficients finite where the likelihood has no maximum

    def loss_and_slope(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        loss = float(np.logaddexp(0.0, -x @ w).mean() + penalty * (w @ w))
        return loss, -(special.expit(-x @ w)[:, None] * x).mean(0) + 2 * penalty * w

    fit = optimize.minimize(loss_and_slope, np.zeros(2), jac=True, options={"gtol": 1e-10})
    a, b = (float(value) for value in fit.x / scale)
    if (x[x.any(1)] @ fit.x > 0).all():  # separable: the likelihood has no maximum
        return FusedRule(0.0, len(x), "a mixture of the two is right about every comparison")
    if a <= 0:  # the ratio would turn the reward around
        return FusedRule(0.0, len(x), "beside the implicit reward, the reward explains nothing")
    return FusedRule(max(0.0, b / a), len(x))


def fused_scores(
    rewards: Float[np.ndarray, " responses"],
    implicit: Float[np.ndarray, " responses"],
    rule: FusedRule,
    lengths: Num[np.ndarray, " responses"] | None,
) -> Float[np.ndarray, " responses"]:
    """Fused scores, float32, from sums over `lengths` tokens; None if `implicit` counts per token."""
    # a long response's sum of log-ratios would outweigh its reward
    by_token = implicit if lengths is None else (implicit / lengths).astype(np.float32)
    return (rewards + rule.factor * by_token).astype(np.float32)
