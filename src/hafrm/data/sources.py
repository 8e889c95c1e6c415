"""Where rows come from: files, hub data sets, named sets and lists, as numbered raw rows.

A source is written as one line of text, which says where it lies and which of its rows are wanted.
Nothing here knows what a row means; how files and hub data sets are read is in `files` and `hub`, what
named sets are in `catalogue` and `named`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hafrm.data.catalogue import NamedSet, members, named_set
from hafrm.data.files import Numbered, find_files, read_file, stem
from hafrm.data.hub import parse_hub, read_hub
from hafrm.data.named import check_part, read_set
from hafrm.data.rows import TAGS
from hafrm.errors import DataError

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Source:
    """One place to read rows from, and which of its rows are wanted."""

    location: str
    """The path or hub name as given, without the selection; "memory" for a list."""
    name: str
    """The file's stem without any suffix, or the data set's name; groups carry it."""
    where: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    rows: Rows | None = None
    named: NamedSet | None = None
    """The published set whose form the rows have."""
    path: str | None = None
    """The file or folder on this machine, where it is one."""


def parse_source(given: str | Path | Rows) -> Source:
    """The one source that a path, a hub name, a named set or a list of rows stands for.

    Raises `DataError` for a group of sets, and as `parse_sources` does.
    """
    sources = parse_sources(given)
    if len(sources) > 1:
        names = ", ".join(source.name for source in sources)
        raise DataError(f"{given} stands for several sets ({names}); name one of them")
    return sources[0]


def parse_sources(given: str | Path | Rows) -> list[Source]:
    """The sources that one entry stands for: one, or the members of a group of named sets.

    An entry is a path, "hub:name[@revision][:config]:split", "set:name" (from the hub) or
    "set:name=path" (a published set from a file or folder), or a list of rows. A "#" picks rows:
    "pairs.jsonl.gz#split=train" those whose column `split` (or another tag) has that value,
    "#limit=1000" the first of them, "#split=train&limit=1000" both.
    """
    if not isinstance(given, str | Path):
        return [Source("memory", "memory", rows=given)]
    location, mark, selection = str(given).rpartition("#")
    remote = str(given).startswith(("hub:", "set:"))
    if not mark or (not remote and Path(given).exists()):
        location, selection = str(given), ""  # "#" may be part of a file's name
    where, limit = _parse_selection(selection, str(given))
    if location.startswith("set:"):
        return _named_sources(location, where, limit)
    if not location.startswith("hub:"):
        return [Source(location, stem(Path(location)), where, limit, path=location)]
    hub = parse_hub(location)
    name = hub.name.rstrip("/").rpartition("/")[2]
    return [Source(location, f"{name}-{hub.config}" if hub.config else name, where, limit)]


def _named_sources(location: str, where: dict[str, str], limit: int | None) -> list[Source]:
    name, equals, path = location.removeprefix("set:").partition("=")
    if equals and not path:
        raise DataError(f"{location!r} names no file; write set:{name}=path, or set:{name} alone")
    sources = []
    for member, place in members(name, str(Path(path).expanduser()) if equals else None):
        named = named_set(member)
        check_part(named, place, where.get("split"))
        shown = f"set:{member}" if place is None else f"set:{member}={place}"
        sources.append(Source(shown, member, where, limit, named=named, path=place))
    return sources


def local_files(entry: str) -> list[Path]:
    """The files on this machine that an entry reads, or may read: all of a folder."""
    paths = [Path(source.path) for source in parse_sources(entry) if source.path is not None]
    return [
        file for path in paths for file in (find_files(path, ["*"]) if path.is_dir() else [path])
    ]


def iter_rows(source: Source, left_out: Counter[str] | None = None) -> Numbered:
    """(row number, row or `Refusal`) for every wanted row, in order, without interpreting them.

    Rows that a named set does not use are not among them; `left_out` counts those by reason.
    Raises `DataError` when the source is missing, of an unknown kind, damaged or not UTF-8.
    """
    opened = _open_rows(source, Counter() if left_out is None else left_out)
    chosen = ((number, row) for number, row in opened if _wanted(row, source.where))
    return islice(chosen, source.limit)


def _wanted(row: object, where: dict[str, str]) -> bool:
    # what is no row at all has no tags, and must be counted rather than skipped
    if not where or not isinstance(row, Mapping):
        return True
    return all(str(row.get(tag)) == value for tag, value in where.items())


def _parse_selection(selection: str, given: str) -> tuple[dict[str, str], int | None]:
    where = {}
    for part in selection.split("&") if selection else []:
        key, _, value = part.partition("=")
        if key not in {*TAGS, "limit"} or not value:
            raise DataError(
                f"{given!r}: cannot select rows by {part!r}; after '#' write "
                f"key=value, joined by '&', with a key of: limit, {', '.join(TAGS)}"
            )
        where[key] = value
    limit = where.pop("limit", None)
    if limit is not None and (not limit.isdecimal() or int(limit) < 1):
        raise DataError(f"{given!r}: limit must be a whole number above 0, got {limit!r}")
    return where, None if limit is None else int(limit)


def _open_rows(source: Source, left_out: Counter[str]) -> Numbered:
    if source.rows is not None:
        return enumerate(source.rows)
    if source.named is not None:
        return read_set(source.named, source.path, source.where.get("split"), left_out)
    if source.location.startswith("hub:"):
        return read_hub(parse_hub(source.location))
    return read_file(Path(source.location))
