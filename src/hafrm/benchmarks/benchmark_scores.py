"""Items and their scores -> what a benchmark publishes about a scorer, each number with its interval.

A scorer is an array of scores for each item. The two baselines that look at nothing but length are scorers
like any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hafrm.benchmarks.definitions import Benchmark, TermWeights
from hafrm.benchmarks.rules import CandidateScores, Item, ItemVerdict
from hafrm.errors import DataError, NumericsError
from hafrm.evaluation.weighted_means import Term, TermMeans
from hafrm.results import Cell, Column, Table
from hafrm.statistics import Estimate

PICK_LONGER, PICK_SHORTER = "pick longer", "pick shorter"


@dataclass(frozen=True, slots=True)
class BenchmarkScore:
    """What a benchmark says about one scorer."""

    overall: Estimate
    sections: dict[str, Estimate]
    extras: dict[str, Estimate]
    num_equal: int
    """Comparisons that were decided by two scores being the same; they count as the benchmark says."""


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """One benchmark, by scorer."""

    name: str
    title: str
    data: str
    """The folder, or the names on the hub."""
    num_rows: int
    num_rows_published: int | None
    left_out: dict[str, int]
    """Rows that the benchmark does not count, by reason."""
    missing: tuple[str, ...]
    """Terms of the whole benchmark that its data lacks: its score is not the published one then."""
    scores: dict[str, BenchmarkScore]
    """By scorer: the model's heads, then the two baselines."""
    prompts_cut: int
    responses_cut: int

    def table(self) -> Table:
        """Sections, extras and the score, a column for each scorer."""
        scores = self.scores.values()
        some = next(iter(scores))
        rows: list[tuple[Cell, ...]] = []
        # a single whole section is the score itself
        if len(some.sections) > 1 or self.missing:
            rows += [(name, *(s.sections[name] for s in scores)) for name in some.sections]
        rows += [(name, *(s.extras[name] for s in scores)) for name in some.extras]
        rows.append(("all", *(s.overall for s in scores)))
        rows.append(("equal scores", *(s.num_equal for s in scores)))
        columns = (Column("section"), *(Column(name, "count") for name in self.scores))
        published, lacking = self.num_rows_published, ", ".join(self.missing)
        of_all = "" if published in (None, self.num_rows) else f" of {published} published"
        left_out = (f"{reason}: {number} rows" for reason, number in self.left_out.items())
        notes = [
            f"{self.num_rows} rows{of_all} from {self.data}",
            *(f"not counted by the benchmark: {reason}" for reason in left_out),
            f"responses cut {self.responses_cut}, prompts cut {self.prompts_cut}",
            *([f"* not the published score: no rows of {lacking}"] if lacking else []),
        ]
        return Table(self.title, columns, tuple(rows), tuple(notes))


@dataclass(frozen=True, slots=True)
class BenchmarkResults:
    """All benchmarks of one run, and what their scores depend on."""

    model: str
    max_length: int
    """Tokens beyond which inputs were cut."""
    average: dict[str, Estimate]
    """Each scorer's mean over all benchmarks; empty unless all were run."""
    benchmarks: tuple[BenchmarkResult, ...]

    def tables(self) -> tuple[Table, ...]:
        """The line that papers quote, for the model's heads and the baselines; then each benchmark."""
        columns = [Column("scorer")]
        columns += [Column(b.title + "*" * bool(b.missing), "percent") for b in self.benchmarks]
        columns += [Column("Avg.", "percent")] * bool(self.average)
        rows: list[tuple[Cell, ...]] = []
        for scorer in self.benchmarks[0].scores:
            mean = [self.average[scorer]] if self.average else []
            rows.append((scorer, *(b.scores[scorer].overall for b in self.benchmarks), *mean))
        title = f"{self.model} on published benchmarks [95 %]"
        return (Table(title, tuple(columns), tuple(rows)), *(b.table() for b in self.benchmarks))


def score_benchmark(
    benchmark: Benchmark, items: Sequence[Item], scores: Sequence[CandidateScores]
) -> BenchmarkScore:
    """The published numbers from one array of scores for each item.

    A section that lacks rows is the mean of what is there, weighted as published. Raises NumericsError for
    a score that is not finite, DataError for a subset that the benchmark does not have.
    """
    broken = [item.id for item, s in zip(items, scores, strict=True) if not np.isfinite(s).all()]
    if broken:
        raise NumericsError(
            f"{len(broken)} of {len(items)} items have a score that is not finite, such as "
            f"{', '.join(broken[:3])}; check the model's weights, or run it in float32"
        )
    verdicts = list(benchmark.rule(items, scores))
    terms = _terms(benchmark, verdicts)
    means, sections = TermMeans(terms), _present(benchmark.sections, terms)
    # sections weigh the same
    parts = [part for section in sections.values() for part in section.items()]
    overall = {name: weight / len(sections) for name, weight in parts}
    if benchmark.pooled:  # every verdict weighs the same, so a term weighs by its verdicts
        overall = {name: len(t.values) / len(verdicts) for name, t in terms.items()}
    published, extras = (
        {name: means.combine(weights) for name, weights in group.items()}
        for group in (sections, _present(benchmark.extras, terms))
    )
    num_equal = sum(verdict.num_equal for verdict in verdicts)
    return BenchmarkScore(means.combine(overall), published, extras, num_equal)


def missing_terms(benchmark: Benchmark, items: Sequence[Item]) -> tuple[str, ...]:
    """What the whole benchmark has and these items lack, as the names of its terms.

    Raises DataError for a subset that the benchmark does not have.
    """
    terms = _terms(benchmark, list(benchmark.rule(items, length_scores(items))))
    return tuple(term for term in benchmark.terms if term not in terms)


def length_scores(items: Sequence[Item], *, sign: int = 1) -> list[CandidateScores]:
    """What picks the longer candidate, or with sign -1 the shorter one: lengths in characters.

    In tokens the baseline would depend on the model beside it.
    """
    return [sign * np.array([len(text) for text in item.candidates], np.float64) for item in items]


def _terms(benchmark: Benchmark, verdicts: Sequence[ItemVerdict]) -> dict[str, Term]:
    """The verdicts by term, in the benchmark's order."""
    by_term: dict[str, list[ItemVerdict]] = {term: [] for term in benchmark.terms}
    for verdict in verdicts:
        if verdict.term not in by_term:
            raise DataError(
                f"{benchmark.title} has no subset {verdict.term!r}; known are {', '.join(by_term)}"
            )
        by_term[verdict.term].append(verdict)
    return {
        term: Term(np.array([v.value for v in group]), np.array([v.cluster for v in group]))
        for term, group in by_term.items()
        if group
    }


def _present(
    sections: Mapping[str, TermWeights], terms: Mapping[str, Term]
) -> dict[str, TermWeights]:
    """The sections that have some of their terms, these weights scaled to the sum of all of them."""
    result: dict[str, TermWeights] = {}
    for section, weights in sections.items():
        there = {name: weight for name, weight in weights.items() if name in terms}
        # what is there takes the weight of what is missing; exactly 1 for a whole section
        if there:
            scale = sum(weights.values()) / sum(there.values())
            result[section] = {name: weight * scale for name, weight in there.items()}
    return result
