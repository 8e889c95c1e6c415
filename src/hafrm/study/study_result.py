"""What a study says: accuracies with intervals over prompts and seeds, and significant differences.

Every *scorer* (a method, or one of its heads) is compared with the first one, the baseline. Averages over
sets and single test sets are two families of tests, each with its own adjustment (Holm).
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Shaped

from hafrm.evaluation.comparisons import accuracy_over_seeds, compare_correct
from hafrm.evaluation.metrics import calibration
from hafrm.results import Cell, Column, Table
from hafrm.statistics import Estimate, Real, holm

MIXED = "mixed"  # the training set with all of them together
SIGNIFICANT = 0.05  # adjusted p-values below it are called significant


Answers = tuple[Shaped[np.ndarray, "_ _"], Shaped[np.ndarray, " _"]]
"""([seeds, comparisons]: margins, or whether they are right, which may be weighted; the prompts)."""
Outcomes = Mapping[tuple[str, str, str], Answers]
"""Margins by (training set, scorer, test set); all training sets and scorers have every test set."""


@dataclass(frozen=True, slots=True)
class ScorerAccuracy:
    """A scorer's accuracy on one test set, or its mean over several sets of equal weight."""

    train: str  # the training set; "" for a mean
    method: str  # the scorer, such as "haf" or "haf (implicit)"
    test: str  # the test set, or which mean: see `domains`
    accuracy: Estimate
    log_loss: Real = math.nan  # of sigmoid(margin), mean over seeds; NaN for a mean over sets


@dataclass(frozen=True, slots=True)
class Contrast:
    """A scorer against the baseline, on one test set or one average of them."""

    train: str
    test: str
    first: str
    second: str
    difference: Estimate  # accuracy of `first` minus that of `second`
    p_value: float
    p_adjusted: float = 1.0  # by Holm, over the family of averages or that of single test sets

    @property
    def is_significant(self) -> bool:
        """Whether the difference is significant, after the adjustment for the number of tests."""
        return self.p_adjusted < SIGNIFICANT


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a method's learning rate was chosen."""

    method: str
    train: str  # the training set whose validation part decides
    chosen: float
    tried: tuple[tuple[float, float | None], ...]
    """(rate, the deciding validation metric) by rate; None if the run diverged."""


@dataclass(frozen=True)
class StudyResult:
    """A finished comparison of methods."""

    recipe: str  # the file of the recipe that all runs share
    metric: str  # the validation metric by which learning rates and steps were chosen
    seeds: tuple[int, ...]
    methods: tuple[str, ...]  # all scorers; the first is the baseline
    train_sets: tuple[str, ...]
    test_sets: tuple[str, ...]
    accuracies: tuple[ScorerAccuracy, ...]
    averages: tuple[ScorerAccuracy, ...]
    differences: tuple[Contrast, ...]
    average_differences: tuple[Contrast, ...]
    pick_longer: dict[str, Estimate]  # accuracy of the longer response on each test set
    learning_rates: tuple[Tuning, ...]
    seconds: float  # of all runs; for resumed runs, only of the last process

    def tables(self) -> tuple[Table, ...]:
        """The averages, a table for each training set, and how learning rates were chosen."""
        matrices = (self._matrix(train) for train in self.train_sets)
        return (self._averages(), *matrices, self._learning_rates())

    def _averages(self) -> Table:
        significant = [c for c in self.average_differences if c.is_significant]
        notes = [
            f"no average differs significantly from {self.methods[0]}'s (all Holm's p >= 0.05)"
        ]
        if significant:
            notes = ["averages that differ significantly (Holm's p < 0.05):"]
        for c in significant:
            p = f"p {c.p_value:.2g} (Holm {c.p_adjusted:.2g})"
            notes.append(f"{c.test}: {c.first} - {c.second} = {c.difference}, {p}")
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}"
        title = f"mean accuracy [95 % over prompts and {seeds}]"
        return replace(self._by_method(title, self.averages, significant), notes=tuple(notes))

    def _matrix(self, train: str) -> Table:
        accuracies = [a for a in self.accuracies if a.train == train]
        significant = [c for c in self.differences if c.train == train and c.is_significant]
        longer = ("pick longer", *(self.pick_longer[test] for test in self.test_sets), None)
        table = self._by_method(f"trained on {train}: accuracy [95 %]", accuracies, significant)
        return replace(table, rows=(*table.rows, longer))

    def _by_method(
        self, title: str, accuracies: Sequence[ScorerAccuracy], significant: Sequence[Contrast]
    ) -> Table:
        values = {(a.method, a.test): a.accuracy for a in accuracies}
        names = list(dict.fromkeys(name for _, name in values))
        rows: list[tuple[Cell, ...]] = []
        for method in self.methods:
            differs = ", ".join(c.test for c in significant if c.first == method)
            rows.append((method, *(values[method, name] for name in names), differs))
        last = Column(f"differs from {self.methods[0]} in")
        columns = (Column("method"), *(Column(name, "percent") for name in names), last)
        return Table(title, columns, tuple(rows))

    def _learning_rates(self) -> Table:
        rows = []
        for tuning in self.learning_rates:
            values = ((rate, "diverged" if v is None else f"{v:.3f}") for rate, v in tuning.tried)
            tried = "  ".join(f"{rate:.3g}: {value}" for rate, value in values)
            rows.append((tuning.method, f"{tuning.chosen:.3g}", tried))
        where = self.learning_rates[0].train
        title = f"learning rates, chosen by validation {self.metric} on {where}"
        return Table(title, (Column("method"), Column("chosen"), Column("tried")), tuple(rows))


def domains(
    train_sets: Sequence[str], test_sets: Sequence[str]
) -> dict[str, list[tuple[str, str]]]:
    """The (training set, test set) pairs of each average; averages without a pair are left out. A test set
    with a training set's name, or with that name and test instead of train, is its test part."""
    alone = [name for name in train_sets if name != MIXED]
    part_of = {name.replace("train", "test"): name for name in alone} | {n: n for n in alone}
    held_out = [test for test in test_sets if test not in part_of]
    own = {test: part_of[test] for test in test_sets if test in part_of}
    mixed = MIXED in train_sets
    kinds = {
        "in domain": [(train, test) for test, train in own.items()],
        "other domain": [(train, test) for train in alone for test in own if train != own[test]],
        "held out": [(train, test) for train in alone for test in held_out],
        "mixed: in domain": [(MIXED, test) for test in own if mixed],
        "mixed: held out": [(MIXED, test) for test in held_out if mixed],
    }
    return {kind: pairs for kind, pairs in kinds.items() if pairs}


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """The fields of a `StudyResult` that follow from the outcomes; the first scorer is the baseline."""
    trains, scorers, tests = (tuple(dict.fromkeys(key[i] for key in outcomes)) for i in range(3))
    right = {key: (margins > 0, prompts) for key, (margins, prompts) in outcomes.items()}
    parts = (
        (train, test, {s: right[train, s, test] for s in scorers})
        for train, test in itertools.product(trains, tests)
    )
    accuracies, differences = _family(scorers, parts)
    for i, a in enumerate(accuracies):
        of_seeds = [calibration(m).log_loss for m in outcomes[a.train, a.method, a.test][0]]
        accuracies[i] = replace(a, log_loss=float(np.mean(of_seeds)))
    means = (
        ("", kind, {s: stack_answers([(b, outcomes[a, s, b]) for a, b in pairs]) for s in scorers})
        for kind, pairs in domains(trains, tests).items()
    )
    averages, average_differences = _family(scorers, means)
    return {
        "methods": scorers,
        "train_sets": trains,
        "test_sets": tests,
        "accuracies": tuple(accuracies),
        "averages": tuple(averages),
        "differences": differences,
        "average_differences": average_differences,
    }


def _family(
    scorers: Sequence[str], parts: Iterable[tuple[str, str, Mapping[str, Answers]]]
) -> tuple[list[ScorerAccuracy], tuple[Contrast, ...]]:
    """Accuracies and contrasts of (training set, name, answers by scorer), adjusted together."""
    baseline, *others = scorers
    accuracies, contrasts = list[ScorerAccuracy](), list[Contrast]()
    for train, name, answers in parts:
        means = {s: accuracy_over_seeds(*answers[s]) for s in scorers}
        accuracies += [ScorerAccuracy(train, s, name, mean) for s, mean in means.items()]
        for scorer in others:
            # both sides answered the same prompts
            gap = compare_correct(answers[scorer][0], *answers[baseline])
            contrasts.append(Contrast(train, name, scorer, baseline, gap.estimate, gap.p_value))
    p_values = holm(np.array([c.p_value for c in contrasts])).tolist()
    adjusted = (replace(c, p_adjusted=p) for c, p in zip(contrasts, p_values, strict=True))
    return accuracies, tuple(adjusted)


def stack_answers(outcomes: Sequence[tuple[str, Answers]]) -> Answers:
    """Weighted right answers whose mean is the mean of the test sets' accuracies, and their clusters.

    A prompt of a test set is one cluster, even if models of several training sets answered it.
    """
    # right answers are scaled so that each set has equal weight, whatever its size:
    # mean over all columns of o * total / (k * n_o) = mean over sets of mean(o)
    total = sum(len(prompts) for _, (_, prompts) in outcomes)
    values = [
        (margins > 0) * (total / (len(outcomes) * len(prompts)))
        for _, (margins, prompts) in outcomes
    ]
    # the same prompt in two test sets is two clusters
    clusters = [np.char.add(f"{test} ", prompts.astype(str)) for test, (_, prompts) in outcomes]
    return np.concatenate(values, axis=1), np.concatenate(clusters)
