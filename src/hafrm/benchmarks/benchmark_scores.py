"""Items and their scores -> what a benchmark publishes about a scorer, each number with its interval.

A score is a weighted sum of means of *terms* (a subset's accuracy, say); its interval resamples prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import NDArray

from hafrm.benchmarks.definitions import Benchmark
from hafrm.benchmarks.rules import CandidateScores, Item
from hafrm.errors import DataError
from hafrm.results import Cell, Column, Table
from hafrm.statistics import SEED, Estimate, accuracy_interval, resample_counts, wilson


@dataclass(frozen=True, slots=True)
class BenchmarkScore:
    """What a benchmark says about one scorer."""

    overall: Estimate
    sections: dict[str, Estimate]
    extras: dict[str, Estimate]
    num_equal: int
    """Comparisons with two equal scores; they count as the benchmark says."""


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """One benchmark, by scorer."""

    name: str
    title: str
    data: str  # the folder, or the names on the hub
    num_rows: int
    num_rows_published: int | None
    left_out: dict[str, int]  # rows that the benchmark excludes, by reason
    scores: dict[str, BenchmarkScore]  # by scorer: the model's heads, then the two baselines
    prompts_cut: int
    responses_cut: int

    def table(self) -> Table:
        """Sections, extras and the score, with a column for each scorer."""
        scores = self.scores.values()
        some = next(iter(scores))
        rows: list[tuple[Cell, ...]] = []
        # a single section is the score itself
        if len(some.sections) > 1:
            rows += [(name, *(s.sections[name] for s in scores)) for name in some.sections]
        rows += [(name, *(s.extras[name] for s in scores)) for name in some.extras]
        rows.append(("all", *(s.overall for s in scores)))
        rows.append(("equal scores", *(s.num_equal for s in scores)))
        columns = (Column("section"), *(Column(name, "count") for name in self.scores))
        published = self.num_rows_published
        of_all = "" if published in (None, self.num_rows) else f" of {published} published"
        left_out = self.left_out.items()
        notes = (
            f"{self.num_rows} rows{of_all} from {self.data}",
            *(f"not counted by the benchmark: {reason}: {num} rows" for reason, num in left_out),
            f"responses cut {self.responses_cut}, prompts cut {self.prompts_cut}",
        )
        return Table(self.title, columns, tuple(rows), notes)


@dataclass(frozen=True, slots=True)
class BenchmarkResults:
    """All benchmarks of one run, and what their scores depend on."""

    model: str
    max_length: int  # tokens beyond which inputs were cut
    average: dict[str, Estimate]
    """Each scorer's mean over all benchmarks; empty unless all were run."""
    benchmarks: tuple[BenchmarkResult, ...]

    def tables(self) -> tuple[Table, ...]:
        """The line that papers quote, for the model's heads and the baselines; then each benchmark."""
        columns = [Column("scorer"), *(Column(b.title, "percent") for b in self.benchmarks)]
        columns += [Column("Avg.", "percent")] * bool(self.average)
        rows: list[tuple[Cell, ...]] = []
        for scorer in self.benchmarks[0].scores:
            mean = [self.average[scorer]] if self.average else []
            rows.append((scorer, *(b.scores[scorer].overall for b in self.benchmarks), *mean))
        title = f"{self.model} on published benchmarks [95 %]"
        return (Table(title, tuple(columns), tuple(rows)), *(b.table() for b in self.benchmarks))


@dataclass(frozen=True)
class Term:
    """The items of one mean."""

    values: Float[np.ndarray, " items"]
    """Between 0 (wrong) and 1 (right), or whatever the benchmark averages."""
    clusters: Shaped[np.ndarray, " items"]
    """What dependent items have in common: a prompt, or its translations."""


def score_benchmark(
    benchmark: Benchmark, items: Sequence[Item], scores: Sequence[CandidateScores]
) -> BenchmarkScore:
    """The published numbers from one array of finite scores for each item; DataError for a subset that the
    benchmark does not have, and for one of its subsets without rows."""
    verdicts = list(benchmark.rule(items, scores))
    names = dict.fromkeys(term for weights in benchmark.sections.values() for term in weights)
    unknown = {v.term for v in verdicts} - names.keys()
    if unknown:
        raise DataError(
            f"{benchmark.title} has no subset {min(unknown)!r}; known are {', '.join(names)}"
        )
    by_term = {name: [v for v in verdicts if v.term == name] for name in names}
    missing = [name for name, group in by_term.items() if not group]
    if missing:
        raise DataError(
            f"the data has no rows of {', '.join(missing)}, without which there is no score of "
            f"{benchmark.title}; give all files of it"
        )
    terms = {
        name: Term(np.array([v.value for v in group]), np.array([v.cluster for v in group]))
        for name, group in by_term.items()
    }
    means, sections = TermMeans(terms), benchmark.sections
    # sections have equal weight
    parts = [part for section in sections.values() for part in section.items()]
    overall = {name: weight / len(sections) for name, weight in parts}
    if benchmark.pooled:  # every verdict weighs the same, so a term weighs by its verdicts
        overall = {name: len(t.values) / len(verdicts) for name, t in terms.items()}
    published, extras = (
        {name: means.combine(weights) for name, weights in group.items()}
        for group in (sections, benchmark.extras)
    )
    num_equal = sum(verdict.num_equal for verdict in verdicts)
    return BenchmarkScore(means.combine(overall), published, extras, num_equal)


class TermMeans:
    """The mean of every term, and its values in resamples, which are common to all terms.

    Items of one cluster are drawn together across terms, and only among clusters with items in the same
    terms, so that every resample has as many clusters of a small subset as the benchmark.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        self.terms = dict(terms)  # each has an item
        sums, sizes = _by_cluster([*self.terms.values()])  # [clusters, terms] each
        self.means = sums.sum(0) / sizes.sum(0)
        self.resamples = _resample(sums, sizes)  # [resamples, terms]
        present = (sizes > 0).astype(np.float64)
        self.num_clusters = present.sum(0)
        # 1 for terms of the same clusters, 0 for terms that share none
        scale = np.sqrt(np.outer(self.num_clusters, self.num_clusters))
        self.overlap = present.T @ present / scale

    def combine(self, weights: Mapping[str, float]) -> Estimate:
        """sum of weight * mean over the named terms, with its interval.

        A single term of right and wrong items has the interval of any accuracy. Otherwise it is the
        bootstrap's, widened for terms whose items are all right or all wrong: a bootstrap treats those as
        certain, Wilson's interval (with a cluster as one trial) does not. Deviations add in squares as far
        as the terms' clusters differ (Zou and Donner 2008).
        """
        columns = [*map([*self.terms].index, weights)]
        factors = np.array([*weights.values()], np.float64)
        first = self.terms[next(iter(weights))]
        if len(columns) == 1 and factors[0] == 1 and _is_binary(first):
            return accuracy_interval(first.values > 0, first.clusters)
        num = sum(len(self.terms[name].values) for name in weights)
        value = float(self.means[columns] @ factors)
        low, high = np.quantile(self.resamples[:, columns] @ factors, [0.025, 0.975])
        below, above = self._unanimous(columns, factors)
        low = value - math.hypot(max(0.0, value - low), below)
        high = value + math.hypot(max(0.0, high - value), above)
        return Estimate(value, low, high, num, "cluster-bootstrap")

    def _unanimous(
        self, columns: Sequence[int], factors: NDArray[np.float64]
    ) -> tuple[float, float]:
        """How far below and above its value the sum may be, for its terms whose items all agree."""
        terms = [*self.terms.values()]
        gaps = np.zeros((2, len(columns)))  # below, above
        for place, column in enumerate(columns):
            mean = float(self.means[column])
            if _is_binary(terms[column]) and mean in (0.0, 1.0):
                low, high = wilson(mean, float(self.num_clusters[column]))
                gaps[:, place] = mean - low, high - mean
        overlap = self.overlap[np.ix_(columns, columns)]
        # a negative weight swaps below and above
        below, above = np.where(factors < 0, gaps[::-1], gaps) * np.abs(factors)
        return math.sqrt(below @ overlap @ below), math.sqrt(above @ overlap @ above)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates; their deviations add in squares (Zou and Donner 2008)."""
    value = float(np.mean([e.value for e in estimates]))
    below = math.hypot(*((e.value - e.low) / len(estimates) for e in estimates))
    above = math.hypot(*((e.high - e.value) / len(estimates) for e in estimates))
    num = sum(e.num for e in estimates)
    return Estimate(value, value - below, value + above, num, "combined")


def _is_binary(term: Term) -> bool:
    return bool(np.isin(term.values, (0.0, 1.0)).all())


def _by_cluster(terms: Sequence[Term]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[clusters, terms]: the sum of the values, and the number of items."""
    names, rows = np.unique(np.concatenate([t.clusters for t in terms]), return_inverse=True)
    columns = np.repeat(np.arange(len(terms)), [len(term.values) for term in terms])
    sums, sizes = np.zeros((2, len(names), len(terms)))
    # add.at, because a (cluster, term) may have several items
    np.add.at(sums, (rows, columns), np.concatenate([term.values for term in terms]))
    np.add.at(sizes, (rows, columns), 1.0)
    return sums, sizes


def _resample(
    sums: Float[np.ndarray, "clusters terms"], sizes: Float[np.ndarray, "clusters terms"]
) -> NDArray[np.float64]:
    """[resamples, terms]: the mean of each term in each resample of clusters."""
    draw = np.random.default_rng(SEED)
    totals, counts = np.zeros((2, 1, 1))
    # clusters with items in the same terms are one kind; each kind is resampled separately
    _, kinds = np.unique(sizes > 0, axis=0, return_inverse=True)
    for kind in range(int(kinds.max()) + 1):
        members = np.flatnonzero(kinds.ravel() == kind)
        blocks = [
            (c @ sums[members], c @ sizes[members]) for c in resample_counts(len(members), draw)
        ]
        total, count = (np.concatenate(column) for column in zip(*blocks, strict=True))
        totals, counts = totals + total, counts + count
    return np.asarray(totals / counts, np.float64)
