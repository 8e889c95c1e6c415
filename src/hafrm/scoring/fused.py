"""Both heads in one score: reward + factor * implicit reward per token.

A run that trains both heads fits the factor on its validation comparisons, never on a test set, and
writes it beside the exported models. The implicit reward counts per token, because a long response's sum
of log-ratios would otherwise outweigh its reward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Num
from numpy.typing import NDArray
from pydantic import Field
from scipy import optimize, special

from hafrm.errors import ModelError
from hafrm.preferences import TokenizedGroup
from hafrm.results import read_result, write_result
from hafrm.scoring.forward import Scores
from hafrm.scoring.loading import FUSED_RULE, find_heads, load_reward_head
from hafrm.scoring.reward_model import ImplicitRule, PolicyModel


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
    implicit_per_token: Float[np.ndarray, " responses"],
    rule: FusedRule,
) -> Float[np.ndarray, " responses"]:
    """reward + factor * implicit reward per token, float32; linear, so margins work as well."""
    return (rewards + rule.factor * implicit_per_token).astype(np.float32)


def per_token(
    implicit: Float[np.ndarray, " responses"],
    lengths: Num[np.ndarray, " responses"],
    rule: ImplicitRule,
) -> Float[np.ndarray, " responses"]:
    """Implicit rewards divided by tokens, EOS included, unless their rule divides already."""
    return implicit if rule.per_token else (implicit / lengths).astype(np.float32)


def write_fused_rule(folder: Path, rule: FusedRule) -> None:
    """Write the rule beside `reward` and `policy`."""
    write_result(folder / FUSED_RULE, rule)


def read_fused_rule(folder: Path) -> FusedRule:
    """The rule of a folder; raises CheckpointError for a damaged one."""
    return read_result(folder / FUSED_RULE, FusedRule)


class FusedRewardModel(PolicyModel):
    """Both heads of a run as one score; rewards and log-probs come from one forward.

    >>> rm = FusedRewardModel.from_pretrained("run")
    >>> rm.best_of("What is 2+2?", ["3", "4"]).response
    """

    fused_rule: FusedRule

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> "FusedRewardModel":
        """Load a run whose method trained both heads, with PolicyModel's options; else ModelError."""
        folder = find_heads(path).fused
        if folder is None:
            raise ModelError(
                f"{path} has no {FUSED_RULE}, which runs that train both heads write; score with one head"
            )
        fused = super().from_pretrained(folder / "policy", **options)
        assert isinstance(fused, cls)
        fused.model.reward_head = load_reward_head(folder / "reward").to(fused.model.device)
        fused.fused_rule = read_fused_rule(folder)
        return fused

    def _to_scores(self, scores: Scores, groups: Sequence[TokenizedGroup]) -> NDArray[np.float32]:
        assert scores.rewards is not None
        implicit = per_token(super()._to_scores(scores, groups), scores.lengths, self.rule)
        return fused_scores(scores.rewards, implicit, self.fused_rule)
