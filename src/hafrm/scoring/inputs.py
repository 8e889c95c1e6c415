"""What a bulk job reads: inputs counted, known by their digests, and cut into shards of rows.

An input is a file or a hub data set; a folder stands for the files in it. Everything is found out
before the first row is scored, so that a damaged input stops a job at its start. Nothing is written.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hafrm.atomic import fingerprint
from hafrm.data.files import is_known_kind
from hafrm.data.reader import Source, iter_rows, parse_source
from hafrm.errors import ConfigError, DataError

log = logging.getLogger("hafrm")

JSONL, PACKED_JSONL, PARQUET = ".jsonl", ".jsonl.gz", ".parquet"
SUFFIXES = (JSONL, PACKED_JSONL, PARQUET)
"""Of the files that bulk scoring writes."""
ROWS_PER_SHARD = 4096
"""Enough to fill rows of the model with inputs of like length, little enough to lose."""


@dataclass(frozen=True)
class Input:
    """One source, and all that must be the same when a job goes on."""

    source: str
    """As given: a path, perhaps with a selection, or hub:name:split."""
    stem: str
    """What its outputs are called; no two inputs share it."""
    selection: str
    """What of the source is wanted; "" for all."""
    num_rows: int
    digest: str
    """Of the file's content; a hub set is known by its name and revision only."""

    @property
    def key(self) -> dict[str, Any]:
        """What decides about the output: where the input lies does not."""
        return {name: value for name, value in asdict(self).items() if name != "source"}


@dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of an input, counted among those wanted, and the output file for them."""

    file: str
    source: str
    start: int
    stop: int


def identify(given: Sequence[str]) -> tuple[Input, ...]:
    """The inputs that paths, folders and hub sets stand for, in the order given, names told apart.

    Raises DataError for a source that is missing, damaged, given twice or of an unknown kind.
    """
    sources = [source for item in given for source in _expand(item)]
    twice = [source for source, number in Counter(sources).items() if number > 1]
    if twice:
        raise DataError(f"{twice[0]} is given twice; give it once")
    if not sources:
        raise DataError("there is nothing to score: give a file, a folder or hub:name:split")
    names: set[str] = set()
    inputs = []
    for source in sources:
        parsed = parse_source(source)
        stem, copy = parsed.name, 2
        while stem in names:
            stem, copy = f"{parsed.name}~{copy}", copy + 1
        names.add(stem)
        inputs.append(_identify(source, parsed, stem))
    return tuple(inputs)


def file_suffix(name: str) -> str:
    """The one of SUFFIXES that a file's name ends in; raises DataError when it is none."""
    found = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    if found is None:
        raise DataError(
            f"cannot write {name}: an output file must end in one of {', '.join(SUFFIXES)}; without "
            "any such ending it is a folder for several"
        )
    return found


def is_table(source: Source) -> bool:
    """Whether the source is a whole Parquet file, whose columns can be kept with their types."""
    whole = not source.where and source.limit is None
    return whole and Path(source.location).suffix.lower() == PARQUET


def cut(
    inputs: Sequence[Input], rows_per_shard: int, suffix: str | None = None
) -> tuple[Shard, ...]:
    """The shards of all inputs, in order; an input that fits into one keeps its name.

    Outputs end in `suffix`; by default Parquet stays Parquet and all else becomes JSON lines, packed
    where the input is. An input without rows is one empty shard: nothing that was given lacks an output.
    Raises ConfigError for less than one row a shard, DataError when two outputs would have one name, or
    for Parquet out of anything but a whole Parquet file.
    """
    if rows_per_shard < 1:
        raise ConfigError(f"rows per shard must be 1 or more, got {rows_per_shard}")
    shards = tuple(
        shard
        for each in inputs
        for shard in _cut(each, rows_per_shard, suffix or _own_suffix(each.source))
    )
    name, number = Counter(shard.file for shard in shards).most_common(1)[0]
    if number > 1:
        raise DataError(f"two outputs would be called {name}; rename one of the inputs")
    return shards


def _own_suffix(source: str) -> str:
    parsed = parse_source(source)
    if is_table(parsed):
        return PARQUET
    packed = Path(parsed.location).suffix.lower() in {".gz", ".xz"}
    return PACKED_JSONL if packed else JSONL


def _cut(each: Input, rows_per_shard: int, suffix: str) -> Iterator[Shard]:
    if suffix == PARQUET and not is_table(parse_source(each.source)):
        raise DataError(
            f"{each.source} cannot become Parquet, since its columns have no types that all its rows "
            "must keep; write .jsonl, or give a whole Parquet file"
        )
    number = max(1, -(-each.num_rows // rows_per_shard))
    for k in range(number):
        name = each.stem if number == 1 else f"{each.stem}-{k:05d}-of-{number:05d}"
        start = k * rows_per_shard
        stop = min(each.num_rows, start + rows_per_shard)
        yield Shard(name + suffix, each.source, start, stop)


def _expand(given: str) -> list[str]:
    """The source itself, or the files of a folder by name; hidden and `_` names are not data."""
    folder = Path(given)
    if not folder.is_dir():
        return [given]
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] not in "._")
    known = [file for file in files if is_known_kind(file)]
    if not known:
        raise DataError(f"{folder} holds no file that rows can be read from")
    for file in files:
        if file not in known:
            log.warning("%s is not scored: it is of no kind that rows are read from", file)
    return [str(file) for file in known]


def _identify(source: str, parsed: Source, stem: str) -> Input:
    picked = dict(parsed.where) | ({} if parsed.limit is None else {"limit": str(parsed.limit)})
    selection = "&".join(f"{name}={value}" for name, value in sorted(picked.items()))
    num_rows = _count_table(parsed.location) if is_table(parsed) else None
    if num_rows is None:
        num_rows = sum(1 for _ in iter_rows(parsed))
    remote = parsed.location.startswith("hub:")
    digest = parsed.location if remote else fingerprint(Path(parsed.location))
    return Input(source, stem, selection, num_rows, digest)


def _count_table(location: str) -> int | None:
    """Rows by a Parquet file's own count; None where there is none, so that reading says why."""
    import pyarrow as pa  # noqa: PLC0415  (0.2 s, and only for this kind of file)
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        return int(pq.read_metadata(location).num_rows)
    except (OSError, pa.ArrowException):
        return None
