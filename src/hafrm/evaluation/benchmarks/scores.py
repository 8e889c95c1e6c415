"""Items and their scores -> what a benchmark publishes about a scorer, each number with its interval.

Knows no model: a scorer is an array of scores for each item. The two baselines that look at nothing but
length are scorers like any other.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hafrm.errors import DataError, NumericsError
from hafrm.evaluation.benchmarks.catalogue import Benchmark, Weights
from hafrm.evaluation.benchmarks.items import Item, Verdict
from hafrm.evaluation.benchmarks.rules import Scores
from hafrm.evaluation.composites import Term, TermMeans
from hafrm.evaluation.metrics import plain
from hafrm.statistics import Estimate

PICK_LONGER, PICK_SHORTER = "pick longer", "pick shorter"


@dataclass(frozen=True)
class BenchmarkScore:
    """What a benchmark says about one scorer."""

    overall: Estimate
    sections: dict[str, Estimate]
    extras: dict[str, Estimate]
    num_equal: int
    """Comparisons that were decided by two scores being the same; they count as the benchmark says."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        result: dict[str, Any] = plain(asdict(self))
        return result


def score_benchmark(
    benchmark: Benchmark, items: Sequence[Item], scores: Sequence[Scores], *, seed: int = 0
) -> BenchmarkScore:
    """The published numbers from one array of scores for each item.

    Where rows of a section are absent, it is the mean of what is there, weighted as published.
    Raises NumericsError for a score that is not finite, DataError for a subset that is not known.
    """
    _check_finite(items, scores)
    verdicts = list(benchmark.judge(items, scores))
    terms = _terms(benchmark, verdicts)
    means = TermMeans(terms, seed=seed)
    sections = {
        name: there
        for name, weights in benchmark.sections.items()
        if (there := _present(weights, terms))
    }
    if benchmark.pooled:
        overall: Weights = {name: len(t.values) / len(verdicts) for name, t in terms.items()}
    else:
        overall = _mean([*sections.values()])
    return BenchmarkScore(
        overall=means.combine(overall),
        sections={name: means.combine(weights) for name, weights in sections.items()},
        extras={
            name: means.combine(there)
            for name, weights in benchmark.extras.items()
            if (there := _present(weights, terms))
        },
        num_equal=sum(verdict.num_equal for verdict in verdicts),
    )


def missing_terms(benchmark: Benchmark, items: Sequence[Item]) -> tuple[str, ...]:
    """What the whole benchmark has and these items lack, as the names of its terms.

    Raises DataError for a subset that the benchmark does not have.
    """
    verdicts = list(benchmark.judge(items, length_scores(items)))
    found = _terms(benchmark, verdicts)
    return tuple(term for term in benchmark.terms if term not in found)


def length_scores(items: Sequence[Item], *, sign: int = 1) -> list[Scores]:
    """What picks the longer candidate, or (-1) the shorter one: lengths in characters.

    Characters, because tokens would make the baseline depend on the model beside it.
    """
    return [sign * np.array([len(text) for text in item.candidates], np.float64) for item in items]


def _check_finite(items: Sequence[Item], scores: Sequence[Scores]) -> None:
    broken = [item.id for item, s in zip(items, scores, strict=True) if not np.isfinite(s).all()]
    if broken:
        raise NumericsError(
            f"{len(broken)} of {len(items)} items have a score that is not finite, such as "
            f"{', '.join(broken[:3])}; check the model's weights, or run it in float32"
        )


def _terms(benchmark: Benchmark, verdicts: Sequence[Verdict]) -> dict[str, Term]:
    """The verdicts by term, in the benchmark's order."""
    by_term: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_term[verdict.term].append(verdict)
    unknown = sorted(by_term.keys() - set(benchmark.terms))
    if unknown:
        raise DataError(
            f"{benchmark.title} has no subset {unknown[0]!r}; known are {', '.join(benchmark.terms)}"
        )
    return {
        term: Term(
            np.array([verdict.value for verdict in by_term[term]], np.float64),
            np.array([verdict.cluster for verdict in by_term[term]]),
        )
        for term in benchmark.terms
        if term in by_term
    }


def _present(weights: Weights, terms: Mapping[str, Term]) -> Weights:
    """The weights of the terms that there are, scaled to the sum of all of them."""
    there = {name: weight for name, weight in weights.items() if name in terms}
    if len(there) == len(weights):
        return there
    scale = sum(weights.values()) / sum(there.values()) if there else 0.0
    return {name: weight * scale for name, weight in there.items()}


def _mean(sections: Sequence[Weights]) -> Weights:
    """The weights of the mean of several sections, which may share terms."""
    total: dict[str, float] = defaultdict(float)
    for weights in sections:
        for name, weight in weights.items():
            total[name] += weight / len(sections)
    return total
