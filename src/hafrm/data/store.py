"""Sequences that are kept on disk: records are appended to a file, and items are made when they are read.

What fits into IN_MEMORY bytes stays plain objects. For the rest, only offsets and other arrays of numbers
are in memory. Token ids can be kept in a folder, and opened again without being read.
"""

import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import load_file, save_file

from hafrm.atomic import write_errors
from hafrm.preferences import Comparison, TokenizedGroup, Votes

IN_MEMORY = 64 * 2**20
"""Bytes of records that are held in memory; the others are in an unnamed file under $TMPDIR."""
Item = TypeVar("Item")


class Records:
    """Byte strings that are appended one by one, and read by their number."""

    def __init__(self) -> None:
        self._ends: Any = array("q", [0])
        self._buffer = bytearray()  # the last ones
        self._in_file = 0  # bytes before those of the buffer
        self._file: Any = None

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def is_small(self) -> bool:
        """Whether all of them are in memory."""
        return self._file is None

    def append(self, record: bytes) -> None:
        self._buffer += record
        self._ends.append(self._ends[-1] + len(record))
        if len(self._buffer) > IN_MEMORY:
            with write_errors(Path(tempfile.gettempdir())):
                self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - lives as we do
                self._file.write(self._buffer)
                self._file.flush()
            self._in_file = self._ends[-1]
            self._buffer.clear()

    def __getitem__(self, number: int) -> bytes:
        start, end = self._ends[number], self._ends[number + 1]
        if start >= self._in_file:
            return bytes(self._buffer[start - self._in_file : end - self._in_file])
        # not a memory map: its pages would count as the process's own, and `pread` has no position that
        # threads or forked processes could share
        return os.pread(self._file.fileno(), end - start, start)

    def save(self, file: Path) -> NDArray[np.int64]:
        """Write all of them to a file; returns the places that `open` needs."""
        with file.open("wb") as out:
            if self._file is not None:
                self._file.seek(0)
                shutil.copyfileobj(self._file, out, 2**20)
            out.write(self._buffer)
        return np.array(self._ends, np.int64)

    @classmethod
    def open(cls, file: Path, ends: NDArray[np.int64]) -> "Records":
        """The records that `save` wrote, left on disk."""
        records = cls()
        records._file, records._ends, records._in_file = file.open("rb"), ends, int(ends[-1])
        return records


class Lazy(Sequence[Item]):
    """Items that `make` builds from their numbers each time they are read; or a part of such items."""

    def __init__(self, make: Callable[[int], Item], size: int) -> None:
        self._make, self._size, self._numbers = make, size, np.arange(size)
        self._columns: dict[str, NDArray[Any]] = {}  # of all items, shared by parts

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.part(place)
        return self._make(int(self._numbers[place]))

    def part(self, places: slice | NDArray[Any]) -> "Lazy[Item]":
        """Some of the items."""
        part = Lazy(self._make, 0)
        part._size, part._columns = self._size, self._columns
        part._numbers = self._numbers[places]
        return part


def pick(items: Sequence[Item], places: NDArray[Any]) -> Sequence[Item]:
    """The items at some places, or where a mask is true."""
    if isinstance(items, Lazy):
        return items.part(places)
    return [items[place] for place in np.arange(len(items))[places].tolist()]


def join(parts: Sequence[Sequence[Item]]) -> Sequence[Item]:
    """All items of all parts; a list, unless a part is lazy."""
    if not any(isinstance(part, Lazy) for part in parts):
        return [item for part in parts for item in part]
    ends = np.cumsum([len(part) for part in parts])

    def make(number: int) -> Item:
        owner = int(np.searchsorted(ends, number, "right"))
        return parts[owner][number - int(ends[owner])]  # counted from the part's end

    return Lazy(make, int(ends[-1]))


def numbers_of(
    items: Sequence[Item], name: str, value: Callable[[Item], Any], dtype: DTypeLike
) -> NDArray[Any]:
    """A number per item; for lazy items, computed once and shared with all parts of the same items."""
    if not isinstance(items, Lazy):
        return np.fromiter(map(value, items), dtype, len(items))
    if name not in items._columns:
        values = (value(items._make(number)) for number in range(items._size))
        items._columns[name] = np.fromiter(values, dtype, items._size)
    return items._columns[name][items._numbers]


_COUNTS: dict[str, Callable[[Any], int]] = {
    "comparisons": lambda group: len(group.comparisons),
    "decided": lambda group: sum(pair.is_decided for pair in group.comparisons),
    "ties": lambda group: sum(pair.tie for pair in group.comparisons),
    "responses": lambda group: len(group.response_ids),
}


def counts_of(groups: Sequence[Any], name: str) -> NDArray[np.int32]:
    """For each group, how many it has of what `_COUNTS` names; stored groups are not read for this."""
    return numbers_of(groups, name, _COUNTS[name], np.int32)


class StoredTokens(Lazy[TokenizedGroup]):
    """Groups of token ids in a file, and their counts in memory."""

    def __init__(self, records: Records, counts: Mapping[str, NDArray[np.int32]]) -> None:
        def make(number: int) -> TokenizedGroup:
            head, _, tokens = records[number].partition(b"\n")
            name, source, tags, comparisons, sizes = json.loads(head)
            # a copy's own bytes: read-only, as the arrays of every encoded group
            parts = np.split(np.frombuffer(tokens, np.int32), np.cumsum(sizes)[:-1])
            pairs = unpack_comparisons(comparisons)
            return TokenizedGroup(parts[0], tuple(parts[1:]), pairs, name, source, tags)

        super().__init__(make, len(records))
        self._records, self._columns = records, dict(counts)

    def save(self, file: Path) -> None:
        """Write the records to `file`, and beside it their places and counts as safetensors."""
        columns = {"ends": self._records.save(file), **self._columns}
        save_file(columns, file.with_suffix(".safetensors"))

    @classmethod
    def open(cls, file: Path) -> "StoredTokens":
        """The groups that `save` wrote."""
        columns = load_file(file.with_suffix(".safetensors"))
        return cls(Records.open(file, columns.pop("ends")), columns)


def store_tokens(groups: Iterable[TokenizedGroup]) -> StoredTokens:
    """The groups, kept on disk."""
    records, counts = Records(), {name: array("i") for name in _COUNTS}
    for group in groups:
        for name, count in _COUNTS.items():
            counts[name].append(count(group))
        ids = (group.prompt_ids, *group.response_ids)
        names = group.id, group.source, group.tags
        head = [*names, pack_comparisons(group.comparisons), [*map(len, ids)]]
        tokens = np.concatenate(ids).astype(np.int32, copy=False).tobytes()
        records.append(json.dumps(head).encode() + b"\n" + tokens)
    return StoredTokens(records, {name: np.array(own, np.int32) for name, own in counts.items()})


def pack_comparisons(pairs: Sequence[Comparison]) -> list[tuple[Any, ...]]:
    """The comparisons as plain values, for a record in JSON."""
    return [(p.chosen, p.rejected, p.margin, p.weight, p.tie, p.votes) for p in pairs]


def unpack_comparisons(rows: Iterable[Sequence[Any]]) -> tuple[Comparison, ...]:
    """The comparisons of such values."""
    return tuple(Comparison(*[*rest, votes and Votes(*votes)]) for *rest, votes in rows)
