"""Inputs of a bulk job: counted, identified by content, cut into shards of rows, and read.

An input is a file or a hub data set; a folder means the files in it. All inputs are examined before the
first row is scored, so a damaged one stops a job at its start. pyarrow is imported for Parquet only.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hafrm.atomic import HASHED_BYTES, fingerprint
from hafrm.data.files import is_known_kind
from hafrm.data.reader import Source, iter_rows, parse_source
from hafrm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("hafrm")

JSONL, PACKED_JSONL, PARQUET = ".jsonl", ".jsonl.gz", ".parquet"
SUFFIXES = (JSONL, PACKED_JSONL, PARQUET)
"""Of the files that bulk scoring writes."""
ROWS_PER_SHARD = 4096
"""Enough to fill packed sequences with inputs of similar length, and little to lose."""
_BATCH_SIZE = 1024
"""Parquet rows decoded at a time."""


@dataclass(frozen=True)
class Input:
    """One source, and everything about it that must be the same when a job resumes."""

    source: str
    """As the user gave it: a path, perhaps with a selection, or hub:name:split."""
    stem: str
    """The name of its outputs, unique among inputs."""
    selection: str
    """The selected part of the source; "" for all."""
    num_rows: int
    digest: str
    """Of the file's content; a hub set is identified by name and revision."""

    @property
    def cache_key(self) -> dict[str, Any]:
        """What the output depends on: everything except where the input is stored."""
        return {name: value for name, value in asdict(self).items() if name != "source"}


@dataclass(frozen=True)
class Shard:
    """The selected rows [start, stop) of an input, and their output file."""

    file: str
    source: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows in it."""
        return self.stop - self.start


@dataclass(frozen=True)
class ShardRecord:
    """The result of a finished shard, and what identifies its file."""

    id: str
    """The shard's file name."""
    num_rows: int
    num_responses: int
    num_bad: int
    """Rows without a score."""
    num_cut: int
    """Prompts and responses that were cut to fit."""
    num_tokens: int
    """Tokens of prompts and responses; the prompt of a row counts once."""
    seconds: float
    size: int
    """Of the output file, in bytes."""
    digest: str
    process: dict[str, Any]
    """Versions, device and threads."""

    def matches(self, file: Path) -> bool:
        """Whether a file is the one that was written; large ones are compared by size only."""
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        return self.size > HASHED_BYTES or fingerprint(file) == self.digest


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard, as read."""

    numbers: Sequence[int]
    """Counted from 0 in the whole source: the line of a JSON-lines file, else the record."""
    values: Sequence[object]
    """A mapping for each row, or why the row cannot be read."""
    table: "pa.Table | None" = None
    """The same rows as a Parquet table, if the source is one."""


def identify(sources: Sequence[str]) -> tuple[Input, ...]:
    """The inputs that paths, folders and hub sets mean, in the order given, with unique names.

    Raises DataError for a source that is missing, damaged, repeated or of an unknown kind.
    """
    expanded = [source for item in sources for source in _expand(item)]
    repeated = [source for source, number in Counter(expanded).items() if number > 1]
    if repeated:
        raise DataError(f"{repeated[0]} is given twice; give it once")
    if not expanded:
        raise DataError("there is nothing to score: give a file, a folder or hub:name:split")
    names: set[str] = set()
    inputs = []
    for source in expanded:
        parsed = parse_source(source)
        stem, copy = parsed.name, 2
        while stem in names:
            stem, copy = f"{parsed.name}~{copy}", copy + 1
        names.add(stem)
        selected = dict(parsed.where)
        if parsed.limit is not None:
            selected["limit"] = str(parsed.limit)
        selection = "&".join(f"{name}={value}" for name, value in sorted(selected.items()))
        num_rows = _count_table(parsed.location) if is_table(parsed) else None
        if num_rows is None:
            num_rows = sum(1 for _ in iter_rows(parsed))
        is_remote = parsed.location.startswith("hub:")
        digest = parsed.location if is_remote else fingerprint(Path(parsed.location))
        inputs.append(Input(source, stem, selection, num_rows, digest))
    return tuple(inputs)


def _expand(source: str) -> list[str]:
    """The source itself, or the files of a folder by name; hidden and `_` names are not data."""
    folder = Path(source)
    if not folder.is_dir():
        return [source]
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] not in "._")
    readable = [file for file in files if is_known_kind(file)]
    if not readable:
        raise DataError(f"{folder} holds no file that rows can be read from")
    for file in files:
        if file not in readable:
            log.warning("%s is not scored: rows cannot be read from this kind of file", file)
    return [str(file) for file in readable]


def _count_table(location: str) -> int | None:
    """Rows of a Parquet file by its metadata; None for a damaged file, so that reading it says why."""
    import pyarrow as pa  # noqa: PLC0415  (0.2 s, and only for this kind of file)
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        return int(pq.read_metadata(location).num_rows)
    except (OSError, pa.ArrowException):
        return None


def file_suffix(name: str) -> str:
    """The one of SUFFIXES that a file's name ends in; raises DataError if none."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    if suffix is None:
        raise DataError(
            f"cannot write {name}: an output file must end in one of {', '.join(SUFFIXES)}; a name without "
            "an ending is a folder for several outputs"
        )
    return suffix


def is_table(source: Source) -> bool:
    """Whether the source is a whole Parquet file, whose columns keep their types."""
    whole = not source.where and source.limit is None
    return whole and Path(source.location).suffix.lower() == PARQUET


def cut_into_shards(
    inputs: Sequence[Input], rows_per_shard: int, suffix: str | None = None
) -> tuple[Shard, ...]:
    """The shards of all inputs, in order; an input that fits into one keeps its name.

    Outputs end in `suffix`; by default Parquet stays Parquet and everything else becomes JSON lines,
    compressed if the input is. An input without rows is one empty shard, so every input has an output.
    Raises ConfigError for less than one row per shard, DataError when two outputs would have the same name,
    and for Parquet from anything but a whole Parquet file.
    """
    if rows_per_shard < 1:
        raise ConfigError(f"rows per shard must be 1 or more, got {rows_per_shard}")
    shards: list[Shard] = []
    for item in inputs:
        parsed = parse_source(item.source)
        is_packed = Path(parsed.location).suffix.lower() in {".gz", ".xz"}
        natural = PARQUET if is_table(parsed) else PACKED_JSONL if is_packed else JSONL
        ending = suffix or natural
        if ending == PARQUET and not is_table(parsed):
            raise DataError(
                f"{item.source} cannot become Parquet, because its columns have no fixed types; write "
                ".jsonl, or give a whole Parquet file"
            )
        number = max(1, -(-item.num_rows // rows_per_shard))
        for k in range(number):
            name = item.stem if number == 1 else f"{item.stem}-{k:05d}-of-{number:05d}"
            start = k * rows_per_shard
            stop = min(item.num_rows, start + rows_per_shard)
            shards.append(Shard(name + ending, item.source, start, stop))
    name, number = Counter(shard.file for shard in shards).most_common(1)[0]
    if number > 1:
        raise DataError(f"two outputs would be called {name}; rename one of the inputs")
    return tuple(shards)


def is_one_file(out: Path, inputs: Sequence[Input]) -> bool:
    """Whether `out` names one file, by its ending; raises DataError for a file that cannot be written."""
    if out.is_dir() or not (is_known_kind(out) or out.is_file()):
        return False
    file_suffix(out.name)
    if len(inputs) > 1:
        raise DataError(f"{len(inputs)} inputs cannot all become {out}; give a folder")
    return True


def check_not_inputs(inputs: Sequence[Input], outputs: Sequence[Path]) -> None:
    """Raises DataError when an output would replace an input."""
    places = {Path(parse_source(item.source).location).resolve() for item in inputs}
    for output in outputs:
        if output.resolve() in places:
            raise DataError(
                f"{output} is an input too, and is not overwritten; give another output"
            )


class ShardReader:
    """Reads shards; those of one source in ascending order take one pass over it."""

    def __init__(self) -> None:
        self._source: str | None = None
        self._at = 0
        self._rows: Iterator[tuple[int, object]] = iter(())
        self._batches: Iterator[Any] = iter(())
        self._schema: Any = None

    def read(self, shard: Shard) -> ShardRows:
        """The shard's rows; raises DataError for a source that is damaged or has fewer rows."""
        source = parse_source(shard.source)
        if shard.source != self._source or shard.start < self._at:
            self._source, self._at = shard.source, 0
            if not is_table(source):
                self._rows = iter_rows(source)
        rows = self._read_table(shard, source) if is_table(source) else self._read_rows(shard)
        if len(rows.values) != shard.num_rows:
            raise DataError(f"{shard.source} has fewer rows than when this job began")
        return rows

    def _read_rows(self, shard: Shard) -> ShardRows:
        block = list(islice(self._rows, shard.start - self._at, shard.stop - self._at))
        self._at = shard.stop
        return ShardRows([number for number, _ in block], [row for _, row in block])

    def _read_table(self, shard: Shard, source: Source) -> ShardRows:
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415

        try:
            if self._at == 0:
                file = pq.ParquetFile(source.location)
                self._schema = file.schema_arrow
                self._at, self._batches = _batches_from(file, shard.start)
            parts = []
            while self._at < shard.stop and (batch := next(self._batches, None)) is not None:
                low = min(max(shard.start - self._at, 0), len(batch))
                high = min(shard.stop - self._at, len(batch))
                if low < high:
                    parts.append(batch.slice(low, high - low))
                if high < len(batch):  # the rest belongs to the next shard
                    self._batches = chain([batch.slice(high)], self._batches)
                self._at += high
            table = pa.Table.from_batches(parts, schema=self._schema)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{shard.source} cannot be read as Parquet: {error}") from error
        return ShardRows(range(shard.start, shard.stop), table.to_pylist(), table)


def _batches_from(file: Any, start: int) -> tuple[int, Iterator[Any]]:
    """Batches from the row group that holds row `start`, and the number of their first row."""
    at = group = 0
    while group < file.num_row_groups and at + file.metadata.row_group(group).num_rows <= start:
        at += file.metadata.row_group(group).num_rows
        group += 1
    groups = list(range(group, file.num_row_groups))
    batches = file.iter_batches(batch_size=_BATCH_SIZE, row_groups=groups) if groups else ()
    return at, iter(batches)
