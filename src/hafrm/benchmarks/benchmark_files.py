"""Benchmarks from the hub or from a local folder -> items.

A row that breaks the published form is an error, and not a bad row to skip: a benchmark that lacks rows is
another benchmark. Only rows that the benchmark itself does not count (ties, in PPE) are left out.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hafrm.benchmarks.definitions import Benchmark, BenchmarkPart
from hafrm.benchmarks.rules import Item
from hafrm.data.files import find_files, read_file, read_hub
from hafrm.data.named_sets import LeftOut
from hafrm.data.parse import Refusal, RefusedError
from hafrm.errors import DataError


@dataclass(frozen=True)
class LoadedBenchmark:
    """The items of a benchmark, and where they are from; `BenchmarkResult` explains the fields."""

    benchmark: Benchmark
    items: tuple[Item, ...]
    num_rows: int
    left_out: dict[str, int]
    data: str


def load_benchmark(benchmark: Benchmark, folder: Path | None = None) -> LoadedBenchmark:
    """All items of a benchmark, from a folder in the published form or from the hub.

    Raises DataError for a folder without its files, an unreadable or unfit row, and no rows at all.
    """
    rows = [
        _read_row(benchmark, part, row, place)
        for part in benchmark.parts
        for place, row in _rows(benchmark, part, folder)
    ]
    items = tuple(row for row in rows if isinstance(row, Item))
    left_out = Counter(row.reason for row in rows if isinstance(row, LeftOut))
    hubs = dict.fromkeys(str(part.hub) for part in benchmark.parts)
    data = ", ".join(hubs) if folder is None else str(folder)
    # a folder of another benchmark often has no file that matches
    if not items:
        raise DataError(f"{data} has no rows of {benchmark.title} to score")
    return LoadedBenchmark(benchmark, items, len(rows), dict(left_out), data)


def find_benchmark_folder(benchmark: Benchmark, root: Path, *, alone: bool) -> Path:
    """Where a benchmark's files are: in the folder of its name below `root`; `alone`, in `root` itself.

    Raises DataError if there is no such folder.
    """
    own = root / benchmark.name
    own = root if alone and not own.is_dir() else own
    if not own.is_dir():
        raise DataError(f"there is no folder {own} with the files of {benchmark.title}")
    return own


def _rows(
    benchmark: Benchmark, part: BenchmarkPart, folder: Path | None
) -> Iterator[tuple[str, object]]:
    """(its place in words, row) of every row of a part; a folder may lack a part."""
    if folder is not None:
        for file in find_files(folder, part.files):
            yield from ((f"row {number} of {file}", row) for number, row in read_file(file))
        return
    if part.hub is None:
        raise DataError(
            f"{benchmark.title} is not on the hub; get it from {benchmark.home} and give its folder as DATA"
        )
    # the hub is often unreachable from where models are evaluated
    try:
        yield from ((f"row {number} of {part.hub}", row) for number, row in read_hub(part.hub))
    except DataError as error:
        raise DataError(f"{error}; if you have the files, give their folder as DATA") from error


def _read_row(benchmark: Benchmark, part: BenchmarkPart, row: object, place: str) -> Item | LeftOut:
    try:
        if isinstance(row, Mapping):
            return benchmark.read_row(row, part.name)
        refusal = row if isinstance(row, Refusal) else Refusal("unreadable row", "not an object")
        raise RefusedError(refusal)
    except RefusedError as refused:
        reason, detail = refused.refusal
        raise DataError(
            f"{place} breaks the published form of {benchmark.title}: {reason}: {detail}"
        ) from None
