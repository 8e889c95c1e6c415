"""How good the model is on held-out comparisons while it trains: the number that picks the best step.

Only ever given validation data. Full metrics with intervals are the verb `evaluate`'s business.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hafrm.data.encoding import EncodedGroup
from hafrm.engine.model import HybridModel
from hafrm.intervals import with_bounds
from hafrm.scoring.forward import Scores, run_forward
from hafrm.scoring.fused import FusedRule, fit_fused, per_token
from hafrm.scoring.scorer import ImplicitRule
from hafrm.training.batches import References
from hafrm.training.methods import Method


def validate(
    model: HybridModel,
    groups: Sequence[EncodedGroup],
    references: References | None,
    method: Method,
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """`accuracy` and `loss` (mean -log sigmoid(margin), nat) of what the method scores with.

    Ties are left out. A method that trains both heads also gets `implicit_accuracy`. Accuracies come with
    `_low` and `_high`, a 95 % interval that takes the comparisons of one prompt as one trial.
    """
    scores = _run(model, groups, max_tokens, autocast)
    margins = {}
    if scores.rewards is not None:
        margins["reward"] = _margins(groups, scores.rewards, scores.first)
    if scores.logps is not None:
        implicit = _implicit(scores, references, method)
        margins["implicit"] = _margins(groups, implicit, scores.first)
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
    groups: Sequence[EncodedGroup],
    references: References | None,
    method: Method,
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
) -> FusedRule:
    """How much the implicit reward per token counts beside the reward, for a model with both heads."""
    scores = _run(model, groups, max_tokens, autocast)
    assert scores.rewards is not None
    rule = ImplicitRule(None, method.beta, method.scores_per_token)
    implicit = per_token(_implicit(scores, references, method), scores.lengths, rule)
    prompts = [
        prompt for prompt, group in enumerate(groups) for c in group.comparisons if not c.tie
    ]
    return fit_fused(
        _margins(groups, scores.rewards, scores.first),
        _margins(groups, implicit, scores.first),
        np.array(prompts),
    )


def _run(
    model: HybridModel,
    groups: Sequence[EncodedGroup],
    max_tokens: int,
    autocast: torch.dtype | None,
) -> Scores:
    training = model.training
    model.eval()
    scores = run_forward(model, groups, max_tokens=max_tokens, autocast=autocast)
    model.train(training)
    return scores


def _implicit(scores: Scores, references: References | None, method: Method) -> NDArray[np.float32]:
    assert scores.logps is not None
    reference = None if references is None else torch.from_numpy(references.logps)
    lengths = torch.from_numpy(scores.lengths)
    implicit = method.implicit_rewards(torch.from_numpy(scores.logps), lengths, reference)
    return implicit.numpy()


def _margins(
    groups: Sequence[EncodedGroup], values: NDArray[np.float32], first: NDArray[np.int64]
) -> NDArray[np.float64]:
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
