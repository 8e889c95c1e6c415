"""What a study says: accuracies with intervals over prompts and seeds, and which differences are real.

Every row is set against the first one, which should be the baseline. The averages (in domain, other
domains, held out) are few and are the findings; the cells of the matrix are many, and each family has its
own adjustment for the number of its tests (Holm).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hafrm.evaluation.compare import compare_correct
from hafrm.evaluation.metrics import calibration, plain
from hafrm.evaluation.study.outcomes import Outcome, Outcomes, stacked
from hafrm.evaluation.study.plan import MIXED
from hafrm.statistics import (
    Difference,
    Estimate,
    accuracy_interval,
    cluster_p_value,
    clustered_bootstrap,
    holm,
    paired_bootstrap,
    seeded_difference,
    seeded_mean,
)


@dataclass(frozen=True)
class MatrixCell:
    """A row's accuracy on one test set, after training on one set."""

    train: str
    method: str
    """The row, such as "haf" or "haf (fused)"."""
    test: str
    accuracy: Estimate
    per_seed: tuple[float, ...]
    ece: float
    """Expected calibration error of sigmoid(margin), mean over seeds."""
    log_loss: float
    """Mean -log sigmoid(margin), nat, mean over seeds."""


@dataclass(frozen=True)
class Contrast:
    """A row against the first one, on one test set or one average of them."""

    train: str
    test: str
    first: str
    second: str
    difference: Estimate
    """Accuracy of `first` minus that of `second`."""
    p_value: float
    p_adjusted: float = 1.0
    """Holm's, over the family of averages or that of single test sets."""


@dataclass(frozen=True)
class Average:
    """A row's mean accuracy over several test sets, each counting alike."""

    kind: str
    """Which: see `domains`."""
    method: str
    accuracy: Estimate
    num_sets: int


@dataclass(frozen=True)
class Summary:
    """All numbers of a study."""

    methods: tuple[str, ...]
    train_sets: tuple[str, ...]
    test_sets: tuple[str, ...]
    cells: tuple[MatrixCell, ...]
    averages: tuple[Average, ...]
    differences: tuple[Contrast, ...]
    """On single test sets."""
    average_differences: tuple[Contrast, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        result: dict[str, Any] = plain(asdict(self))
        return result


def domains(
    train_sets: Sequence[str], test_sets: Sequence[str]
) -> dict[str, list[tuple[str, str]]]:
    """The (training set, test set) pairs that belong together; kinds without a pair are left out.

    Where a model is tested on the set that it was trained on (its test part), on another training set's,
    or on a set that nothing is trained on; the same for training on all sets together.
    """
    alone = [name for name in train_sets if name != MIXED]
    held_out = [test for test in test_sets if test not in alone]
    own = [test for test in test_sets if test in alone]
    mixed = MIXED in train_sets
    kinds = {
        "in domain": [(test, test) for test in own],
        "other domain": [(train, test) for train in alone for test in own if train != test],
        "held out": [(train, test) for train in alone for test in held_out],
        "mixed: in domain": [(MIXED, test) for test in own if mixed],
        "mixed: held out": [(MIXED, test) for test in held_out if mixed],
    }
    return {kind: pairs for kind, pairs in kinds.items() if pairs}


def summarise(outcomes: Outcomes) -> Summary:
    """The summary of all outcomes: rows in their order, the first being what others are set against."""
    trains, rows, tests = (tuple(dict.fromkeys(key[i] for key in outcomes)) for i in range(3))
    cells = tuple(_cell(*key, outcome) for key, outcome in outcomes.items())
    single = [
        _contrast(train, test, row, rows[0], outcomes)
        for train in trains
        for test in tests
        for row in rows[1:]
    ]
    averages, contrasts = [], []
    for kind, pairs in domains(trains, tests).items():
        some = {row: [(test, outcomes[train, row, test]) for train, test in pairs] for row in rows}
        for row in rows:
            averages.append(Average(kind, row, _mean(some[row]), len(pairs)))
        contrasts += [
            _average_contrast(kind, row, rows[0], some[row], some[rows[0]]) for row in rows[1:]
        ]
    return Summary(
        rows, trains, tests, cells, tuple(averages), _adjusted(single), _adjusted(contrasts)
    )


def _cell(train: str, row: str, test: str, outcome: Outcome) -> MatrixCell:
    fits = [calibration(margins) for margins in outcome.margins]
    if len(outcome.correct) > 1:
        accuracy = seeded_mean(outcome.correct, outcome.prompts)
    else:
        accuracy = accuracy_interval(outcome.correct[0], outcome.prompts)
    return MatrixCell(
        train,
        row,
        test,
        accuracy,
        tuple(outcome.correct.mean(1).tolist()),
        ece=float(np.mean([fit.ece for fit in fits])),
        log_loss=float(np.mean([fit.log_loss for fit in fits])),
    )


def _contrast(train: str, test: str, first: str, second: str, outcomes: Outcomes) -> Contrast:
    one, other = (outcomes[train, row, test] for row in (first, second))
    found, _ = compare_correct(one.correct, other.correct, one.prompts)
    return Contrast(train, test, first, second, found.estimate, found.p_value)


def _mean(outcomes: Sequence[tuple[str, Outcome]]) -> Estimate:
    values, clusters = stacked(outcomes)
    if len(values) > 1:
        return seeded_mean(values, clusters)
    found = clustered_bootstrap(values[0], clusters)
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def _average_contrast(
    kind: str,
    first: str,
    second: str,
    one: Sequence[tuple[str, Outcome]],
    other: Sequence[tuple[str, Outcome]],
) -> Contrast:
    (values, clusters), (others, _) = stacked(one), stacked(other)
    if len(values) > 1:
        found = seeded_difference(values, others, clusters)
    else:
        estimate = paired_bootstrap(values[0], others[0], clusters)
        found = Difference(estimate, cluster_p_value(values[0] - others[0], clusters))
    return Contrast("", kind, first, second, found.estimate, found.p_value)


def _adjusted(contrasts: Sequence[Contrast]) -> tuple[Contrast, ...]:
    adjusted = holm(np.array([each.p_value for each in contrasts])).tolist()
    return tuple(replace(each, p_adjusted=p) for each, p in zip(contrasts, adjusted, strict=True))
