"""Accuracy and loss on held-out comparisons while a model trains: they choose the best step.

Only ever given validation data. Full metrics with intervals are in `hafrm.evaluation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hafrm.engine.model import HybridModel
from hafrm.preferences import TokenizedGroup
from hafrm.scoring.fused import FusedRule, fit_fused
from hafrm.statistics import with_bounds
from hafrm.training import parallel
from hafrm.training.methods import Method
from hafrm.training.step_batches import References


@dataclass(frozen=True)
class HeadScores:
    """Each head's score of every response; None where the method does not train it."""

    rewards: NDArray[np.float32] | None
    implicit: NDArray[np.float32] | None  # the policy's implicit reward, as the method defines it
    implicit_per_token: NDArray[np.float32] | None
    """The same divided by the response's tokens, EOS included."""
    first: NDArray[np.int64]  # index of each group's first response


def score_heads(
    model: HybridModel,
    groups: Sequence[TokenizedGroup],
    references: NDArray[np.float32] | None,
    method: Method,
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
) -> HeadScores:
    """Both heads' scores, from one pass of all ranks; `references` are reference log-probs."""
    training = model.training
    model.eval()
    scores = parallel.score_on_all_ranks(model, groups, max_tokens=max_tokens, autocast=autocast)
    model.train(training)
    implicit = per_token = None
    if scores.logps is not None:
        implicit = method.implicit_rewards(
            torch.from_numpy(scores.logps),
            torch.from_numpy(scores.lengths),
            None if references is None else torch.from_numpy(references),
        ).numpy()
        per_token = implicit
        if not method.scores_per_token:
            per_token = (implicit / scores.lengths).astype(np.float32)
    return HeadScores(scores.rewards, implicit, per_token, scores.first)


def validate(
    model: HybridModel,
    groups: Sequence[TokenizedGroup],
    references: References | None,
    method: Method,
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """`accuracy` and `loss` (mean -log sigmoid(margin), nat) of the score that the method ranks with.

    Ties are left out. A method that trains both heads also gets `implicit_accuracy`. Accuracies come with
    `_low` and `_high`, a 95 % interval that counts the comparisons of one prompt as one trial.
    """
    logps = None if references is None else references.logps
    scores = score_heads(model, groups, logps, method, max_tokens=max_tokens, autocast=autocast)
    heads = {"reward": scores.rewards, "implicit": scores.implicit}
    margins = {
        name: decided_margins(groups, values, scores.first)
        for name, values in heads.items()
        if values is not None
    }
    ranked = margins[method.scores_with]
    num_prompts = sum(any(not c.tie for c in group.comparisons) for group in groups)
    result = {
        **with_bounds("accuracy", float((ranked > 0).mean()), num_prompts),
        "loss": float(np.logaddexp(0.0, -ranked).mean()),
        "margin": float(ranked.mean()),
    }
    if len(margins) == 2:
        implicit_accuracy = float((margins["implicit"] > 0).mean())
        result |= with_bounds("implicit_accuracy", implicit_accuracy, num_prompts)
    return result


def fit_on_validation(
    model: HybridModel,
    groups: Sequence[TokenizedGroup],
    references: References | None,
    method: Method,
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
) -> FusedRule:
    """The weight of the implicit reward per token beside the reward, for a model with both heads."""
    logps = None if references is None else references.logps
    scores = score_heads(model, groups, logps, method, max_tokens=max_tokens, autocast=autocast)
    assert scores.rewards is not None
    assert scores.implicit_per_token is not None
    return fit_fused(
        decided_margins(groups, scores.rewards, scores.first),
        decided_margins(groups, scores.implicit_per_token, scores.first),
    )


def decided_margins(
    groups: Sequence[TokenizedGroup], values: NDArray[np.floating[Any]], first: NDArray[np.int64]
) -> NDArray[np.float64]:
    """value(chosen) - value(rejected) of every comparison that is not a tie."""
    sides = [
        (start + c.chosen, start + c.rejected)
        for group, start in zip(groups, first, strict=True)
        for c in group.comparisons
        if not c.tie
    ]
    chosen, rejected = np.array(sides).T
    exact = values.astype(np.float64)
    margins: NDArray[np.float64] = exact[chosen] - exact[rejected]
    return margins
