"""Published benchmarks within a study: their candidates are scored in the same pass as the test sets.

A benchmark's number is each seed's published score; its interval adds what another seed and other items
would change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hafrm.evaluation.benchmarks.catalogue import find_benchmarks
from hafrm.evaluation.benchmarks.loading import Loaded, folder_of, load_benchmark
from hafrm.evaluation.benchmarks.run import group_by_prompt
from hafrm.evaluation.benchmarks.scores import score_benchmark
from hafrm.preferences import Group
from hafrm.statistics import Estimate, over_seeds

RowScores = Mapping[tuple[str, str], Sequence[NDArray[np.float32]]]
"""Every response's score by (training set, row), an array for each seed."""


@dataclass(frozen=True)
class Placed:
    """A benchmark, and where its items' candidates stand among a study's groups."""

    loaded: Loaded
    places: list[tuple[int, list[int]]]
    """Of each item: the index of its group, and its candidates' within it."""


@dataclass(frozen=True)
class BenchmarkCell:
    """A row's score on one benchmark, after training on one set."""

    train: str
    method: str
    benchmark: str
    score: Estimate
    per_seed: tuple[float, ...]


def place_benchmarks(
    names: Sequence[str], folder: Path | None, first: int
) -> tuple[list[Group], tuple[Placed, ...]]:
    """The candidates of the named benchmarks as groups, the first of which has the index `first`.

    Raises ConfigError for an unknown name, DataError for unfit data.
    """
    chosen = find_benchmarks(names) if names else ()
    groups: list[Group] = []
    placed = []
    for each in chosen:
        loaded = load_benchmark(each, folder_of(each, folder, alone=len(chosen) == 1))
        found, places = group_by_prompt(loaded.items)
        start = first + len(groups)
        placed.append(Placed(loaded, [(start + group, within) for group, within in places]))
        groups += found
    return groups, tuple(placed)


def benchmark_cells(
    benchmarks: Sequence[Placed], scores: RowScores, first: NDArray[np.int64]
) -> tuple[BenchmarkCell, ...]:
    """Every row's score on every benchmark; `first` are the indices of the groups' first responses."""
    cells = []
    for placed in benchmarks:
        benchmark, items = placed.loaded.benchmark, placed.loaded.items
        for (train, row), by_seed in scores.items():
            found = []
            for values in by_seed:
                exact = values.astype(np.float64)
                parts = [exact[first[group] + np.array(within)] for group, within in placed.places]
                found.append(score_benchmark(benchmark, items, parts).overall)
            per_seed = tuple(each.value for each in found)
            cells.append(BenchmarkCell(train, row, benchmark.name, over_seeds(found), per_seed))
    return tuple(cells)
