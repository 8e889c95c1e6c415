"""Two models, or two methods with several seeds each, on the same comparisons: which one is better, if any.

What is hard for both cancels, so the difference is surer than two accuracies side by side. Where many
sets are compared, some differ by chance: the p-values are adjusted for their number.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from hafrm.data.groups import Group
from hafrm.errors import ConfigError
from hafrm.evaluation.evaluate import (
    load_judge,
    read_comparisons,
    scored_comparisons,
    sets_of,
)
from hafrm.evaluation.metrics import ScoredComparisons, plain
from hafrm.evaluation.seeds import Difference, seeded_difference, seeded_mean
from hafrm.evaluation.statistics import (
    Estimate,
    McNemar,
    accuracy_interval,
    cluster_p_value,
    holm,
    mcnemar,
    paired_bootstrap,
)
from hafrm.scoring.loading import AUTO, Placement


@dataclass(frozen=True)
class SetComparison:
    """What two sides get right of one source, or of all of them together."""

    name: str
    num: int
    """Comparisons that people decided."""
    first: Estimate
    """Accuracy, over all seeds where there are several."""
    second: Estimate | None
    difference: Difference | None
    """First minus second."""
    counts: McNemar | None
    """Where each side is one model: who alone was right how often."""
    p_adjusted: float | None = None
    """The difference's p-value, adjusted (Holm) for the number of sources."""


@dataclass(frozen=True)
class ModelComparison:
    """All sets, and the models on either side."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    sets: tuple[SetComparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        result: dict[str, Any] = plain(asdict(self))
        return result


def compare(  # noqa: PLR0913 - the verb and its options
    first: Sequence[str | Path],
    second: Sequence[str | Path],
    sources: Sequence[str],
    *,
    max_length: int | None = None,
    max_bad_fraction: float = 0.02,
    place: Placement = AUTO,
    done: Callable[[int, int], None] | None = None,
) -> ModelComparison:
    """Accuracy of each side on each source, and their difference; several models of a side are its seeds.

    Each model is judged by its reward, or by its implicit reward where it is a policy only. Without a
    second side, the first one's accuracy over its seeds is all there is.

    Raises ConfigError for one seed against many, and what `evaluate` raises.
    """
    if second and (len(first) == 1) != (len(second) == 1):
        raise ConfigError(
            f"{len(first)} models against {len(second)}: give several seeds on both sides, or one model "
            "on each, because one seed does not tell how much seeds differ"
        )
    _, groups = read_comparisons(sources, max_bad_fraction)
    sides = [
        [_score(path, groups, max_length, place, done) for path in paths]
        for paths in (first, second)
    ]
    sets = [
        _compare_set(name, [[model[name] for model in side] for side in sides])
        for name in sets_of(groups)
    ]
    return ModelComparison(tuple(map(str, first)), tuple(map(str, second)), _adjusted(sets))


def _score(
    path: str | Path,
    groups: Sequence[Group],
    max_length: int | None,
    place: Placement,
    done: Callable[[int, int], None] | None,
) -> dict[str, ScoredComparisons]:
    """The scored comparisons of each set, by the model's main head."""
    model = load_judge(path, max_length=max_length, place=place)
    encoded, _ = model.encoder.encode(groups)
    scores = model.score_encoded(encoded, done)
    parts = sets_of(groups)
    return {name: scored_comparisons(groups, encoded, part, scores) for name, part in parts.items()}


def _compare_set(name: str, sides: Sequence[Sequence[ScoredComparisons]]) -> SetComparison:
    some = sides[0][0]
    decided = ~some.ties
    prompts = some.prompts[decided]
    correct = [np.array([each.margins[decided] > 0 for each in side]) for side in sides]
    first = _accuracy(correct[0], prompts)
    if not sides[1]:
        return SetComparison(name, len(prompts), first, None, None, None)
    difference, counts = compare_correct(correct[0], correct[1], prompts)
    second = _accuracy(correct[1], prompts)
    return SetComparison(name, len(prompts), first, second, difference, counts)


def compare_correct(
    first: Bool[np.ndarray, "first_seeds comparisons"],
    second: Bool[np.ndarray, "second_seeds comparisons"],
    prompts: Shaped[np.ndarray, " comparisons"],
) -> tuple[Difference, McNemar | None]:
    """The difference of two [seeds, comparisons] arrays of right answers, and their discordant counts.

    Several seeds on both sides make the interval one over prompts and seeds. For one model on each side it
    is the paired bootstrap's over prompts, and the p-value McNemar's exact one unless prompts have several
    comparisons, which that test would take for independent.
    """
    if len(first) > 1:
        return seeded_difference(first, second, prompts), None
    counts = mcnemar(first[0], second[0])
    estimate = paired_bootstrap(first[0], second[0], prompts)
    if len(np.unique(prompts)) == len(prompts):
        return Difference(estimate, counts.p_value), counts
    gaps = first[0].astype(np.float64) - second[0]
    return Difference(estimate, cluster_p_value(gaps, prompts)), counts


def _accuracy(
    correct: Bool[np.ndarray, "seeds comparisons"], prompts: Shaped[np.ndarray, " comparisons"]
) -> Estimate:
    if len(correct) > 1:
        return seeded_mean(correct, prompts)
    return accuracy_interval(correct[0], prompts)


def _adjusted(sets: Sequence[SetComparison]) -> tuple[SetComparison, ...]:
    """Holm's p-values over the sources; "all" is their sum and no test of its own."""
    tested = [each for each in sets if each.difference and (each.name != "all" or len(sets) == 1)]
    p_values = np.array([each.difference.p_value for each in tested if each.difference])
    adjusted = dict(zip([each.name for each in tested], holm(p_values).tolist(), strict=True))
    return tuple(replace(each, p_adjusted=adjusted.get(each.name)) for each in sets)
