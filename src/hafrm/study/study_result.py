"""What a study says: accuracies with intervals over prompts and seeds, and significant differences.

A *scorer* is a method by its own score, and for a method with two heads also its implicit reward and the
fused score of both. Every scorer is compared with the first one, the baseline. Averages over sets (the
findings) and single test sets are two families of tests, each with its own adjustment (Holm).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from hafrm.evaluation.metrics import calibration
from hafrm.evaluation.paired import accuracy_over_seeds, compare_correct
from hafrm.results import Cell, Column, Table
from hafrm.statistics import Estimate, holm

MIXED = "mixed"
"""The training set that is all of them together."""
SIGNIFICANT = 0.05
"""Adjusted p-values below it are called significant."""


@dataclass(frozen=True)
class ScorerOutcome:
    """One scorer on one test set, after training on one set: every seed's answers."""

    margins: Float[np.ndarray, "seeds comparisons"]
    prompts: Shaped[np.ndarray, " comparisons"]

    @property
    def correct(self) -> Bool[np.ndarray, "seeds comparisons"]:
        """Whether the chosen response scores higher."""
        return self.margins > 0


Outcomes = Mapping[tuple[str, str, str], ScorerOutcome]
"""By (training set, scorer, test set); every training set and scorer has all test sets."""


@dataclass(frozen=True, slots=True)
class SetAccuracy:
    """A scorer's accuracy on one test set, after training on one set."""

    train: str
    method: str
    """The scorer, such as "haf" or "haf (fused)"."""
    test: str
    accuracy: Estimate
    per_seed: tuple[float, ...]
    ece: float
    """Of sigmoid(margin), mean over seeds, as `log_loss` is."""
    log_loss: float


@dataclass(frozen=True, slots=True)
class Contrast:
    """A scorer against the baseline, on one test set or one average of them."""

    train: str
    test: str
    first: str
    second: str
    difference: Estimate
    """Accuracy of `first` minus that of `second`."""
    p_value: float
    p_adjusted: float = 1.0
    """Holm's, over the family of averages or that of single test sets."""

    @property
    def is_significant(self) -> bool:
        """Whether it is, after the adjustment for the number of tests."""
        return self.p_adjusted < SIGNIFICANT


@dataclass(frozen=True, slots=True)
class Average:
    """A scorer's mean accuracy over several test sets, each of equal weight."""

    kind: str
    """Which: see `domains`."""
    method: str
    accuracy: Estimate


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a method's learning rate was chosen."""

    method: str
    train: str
    """The training set whose validation part decided."""
    chosen: float
    tried: tuple[tuple[float, float | None], ...]
    """(rate, the deciding validation metric) by rate; None if the run diverged."""


@dataclass(frozen=True)
class StudyResult:
    """A finished comparison of methods."""

    recipe: str
    """The file of the recipe that all runs share."""
    metric: str
    """Of validation data, by which learning rates and steps were chosen."""
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    """All scorers; the first is the baseline."""
    train_sets: tuple[str, ...]
    test_sets: tuple[str, ...]
    accuracies: tuple[SetAccuracy, ...]
    averages: tuple[Average, ...]
    differences: tuple[Contrast, ...]
    average_differences: tuple[Contrast, ...]
    pick_longer: dict[str, Estimate]
    """Accuracy of the longer response on each test set."""
    learning_rates: tuple[Tuning, ...]
    seconds: float
    """Of all runs, as far as their last process ran them."""

    def tables(self) -> tuple[Table, ...]:
        """The averages, a table for each training set, and how learning rates were chosen."""
        matrices = (self._matrix(train) for train in self.train_sets)
        return (self._averages(), *matrices, self._learning_rates())

    def _averages(self) -> Table:
        values = {(a.method, a.kind): a.accuracy for a in self.averages}
        significant = [c for c in self.average_differences if c.is_significant]
        notes = [
            f"no average differs significantly from {self.methods[0]}'s (Holm's p >= 0.05 for all)"
        ]
        if significant:
            notes = ["averages that differ significantly (Holm's p < 0.05):"]
        for c in significant:
            p = f"p {c.p_value:.2g} (Holm {c.p_adjusted:.2g})"
            notes.append(f"{c.test}: {c.first} - {c.second} = {c.difference}, {p}")
        title = f"mean accuracy [95 % over prompts and {len(self.seeds)} seeds]"
        return replace(self._by_method(title, values, significant), notes=tuple(notes))

    def _matrix(self, train: str) -> Table:
        values = {(a.method, a.test): a.accuracy for a in self.accuracies if a.train == train}
        significant = [c for c in self.differences if c.train == train and c.is_significant]
        longer = ("pick longer", *(self.pick_longer[test] for test in self.test_sets), None)
        table = self._by_method(f"trained on {train}: accuracy [95 %]", values, significant)
        return replace(table, rows=(*table.rows, longer))

    def _by_method(
        self,
        title: str,
        values: Mapping[tuple[str, str], Estimate],
        significant: Sequence[Contrast],
    ) -> Table:
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
    """The (training set, test set) pairs of each average; kinds without a pair are left out."""
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


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """The fields of a `StudyResult` that follow from the outcomes; the first scorer is the baseline."""
    trains, scorers, tests = (tuple(dict.fromkeys(key[i] for key in outcomes)) for i in range(3))
    baseline, others = scorers[0], scorers[1:]
    single, averages, contrasts = list[Contrast](), list[Average](), list[Contrast]()
    for train, test, scorer in product(trains, tests, others):
        one, other = outcomes[train, scorer, test], outcomes[train, baseline, test]
        # both sides answered the same prompts, so those of one are those of the other
        gap = compare_correct(one.correct, other.correct, one.prompts)
        single.append(Contrast(train, test, scorer, baseline, gap.estimate, gap.p_value))
    for kind, pairs in domains(trains, tests).items():
        stacks = {
            s: stack_answers([(test, outcomes[train, s, test]) for train, test in pairs])
            for s in scorers
        }
        averages += [Average(kind, s, accuracy_over_seeds(*stacks[s])) for s in scorers]
        for scorer in others:
            gap = compare_correct(stacks[scorer][0], *stacks[baseline])
            contrasts.append(Contrast("", kind, scorer, baseline, gap.estimate, gap.p_value))
    return {
        "methods": scorers,
        "train_sets": trains,
        "test_sets": tests,
        "accuracies": tuple(_set_accuracy(*key, outcome) for key, outcome in outcomes.items()),
        "averages": tuple(averages),
        "differences": _adjusted(single),
        "average_differences": _adjusted(contrasts),
    }


def stack_answers(
    outcomes: Sequence[tuple[str, ScorerOutcome]],
) -> tuple[Float[np.ndarray, "seeds comparisons"], Shaped[np.ndarray, " comparisons"]]:
    """[seeds, comparisons] whose mean is the mean of the test sets' accuracies, and their clusters.

    A prompt of a test set is one cluster, also if models of several training sets answered it.
    """
    # right answers are scaled so that each set has equal weight, whatever its size:
    # mean over all columns of o * total / (k * n_o) = mean over sets of mean(o)
    total = sum(outcome.correct.shape[1] for _, outcome in outcomes)
    values = [o.correct * (total / (len(outcomes) * o.correct.shape[1])) for _, o in outcomes]
    # the same prompt in two test sets is two clusters
    clusters = [np.char.add(f"{test} ", o.prompts.astype(str)) for test, o in outcomes]
    return np.concatenate(values, axis=1), np.concatenate(clusters)


def _set_accuracy(train: str, scorer: str, test: str, outcome: ScorerOutcome) -> SetAccuracy:
    accuracy = accuracy_over_seeds(outcome.correct, outcome.prompts)
    per_seed = tuple(outcome.correct.mean(1).tolist())
    fits = [calibration(margins) for margins in outcome.margins]
    ece, loss = (float(np.mean([getattr(fit, n) for fit in fits])) for n in ("ece", "log_loss"))
    return SetAccuracy(train, scorer, test, accuracy, per_seed, ece, loss)


def _adjusted(contrasts: Sequence[Contrast]) -> tuple[Contrast, ...]:
    adjusted = holm(np.array([c.p_value for c in contrasts])).tolist()
    return tuple(replace(c, p_adjusted=p) for c, p in zip(contrasts, adjusted, strict=True))
