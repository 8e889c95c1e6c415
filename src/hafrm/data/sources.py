"""Where rows come from: files, hub data sets, named sets and lists, opened as numbered raw rows.

A source is written as one line of text: where it is, and which of its rows are wanted. The rows of a named
set come in our columns, one part (train, validation, test) at a time; a row of an earlier part whose
prompt is in a later one too is left out, so that no part leaks into another. What is left out, for this
or by the set's own filter, is counted by reason. Nothing here groups rows or judges them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hafrm.data.files import NumberedRows, find_files, parse_hub, read_file, read_hub, stem
from hafrm.data.named_sets import SET_GROUPS, WHOLE, NamedSet, OurRow, find_named_set
from hafrm.data.parse import TAGS, ParsedRow, parse_row
from hafrm.data.splits import normalised_key
from hafrm.data.values import LeftOut, Refusal, RefusedError, show
from hafrm.errors import DataError

RawRows = Iterable[Mapping[str, Any]]
"""Rows in memory: a list of dictionaries, or a `datasets.Dataset`."""


@dataclass(frozen=True, slots=True)
class Source:
    """One place to read rows from, and which of its rows are wanted."""

    location: str
    """The path or hub name as written, without the selection; "memory" for a list."""
    name: str
    """The file's stem without any suffix, or the data set's name; groups carry it."""
    where: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    rows: RawRows | None = None
    named: NamedSet | None = None
    """The published set whose form the rows have."""
    path: str | None = None
    """The file or folder on this machine, where it is one."""


def parse_source(entry: str | Path | RawRows) -> Source:
    """The one source that a path, a hub name, a named set or a list of rows stands for.

    Raises `DataError` for a group of sets, and as `parse_sources` does.
    """
    sources = parse_sources(entry)
    if len(sources) > 1:
        names = ", ".join(source.name for source in sources)
        raise DataError(f"{entry} stands for several sets ({names}); name one of them")
    return sources[0]


def parse_sources(entry: str | Path | RawRows) -> list[Source]:
    """The sources that one entry stands for: one, or the members of a group of named sets.

    An entry is a path, "hub:name[@revision][:config]:split", "set:name" (from the hub), "set:name=path"
    (a published set from a file or folder), or a list of rows. A "#" selects rows:
    "pairs.jsonl.gz#split=train" those whose column `split` (or another tag) has that value,
    "#limit=1000" the first of them, "#split=train&limit=1000" both.
    """
    if not isinstance(entry, str | Path):
        return [Source("memory", "memory", rows=entry)]
    location, mark, selection = str(entry).rpartition("#")
    remote = str(entry).startswith(("hub:", "set:"))
    if not mark or (not remote and Path(entry).exists()):
        location, selection = str(entry), ""  # "#" may be part of a file's name
    where, limit = _parse_selection(selection, str(entry))
    if location.startswith("set:"):
        return _named_sources(location, where, limit)
    if not location.startswith("hub:"):
        return [Source(location, stem(Path(location)), where, limit, path=location)]
    hub = parse_hub(location)
    name = hub.name.rstrip("/").rpartition("/")[2]
    return [Source(location, f"{name}-{hub.config}" if hub.config else name, where, limit)]


def local_files(entry: str) -> list[Path]:
    """The files on this machine that an entry reads, or may read: all of a folder."""
    paths = [Path(source.path) for source in parse_sources(entry) if source.path is not None]
    return [
        file for path in paths for file in (find_files(path, ["*"]) if path.is_dir() else [path])
    ]


def iter_rows(source: Source, left_out: Counter[str] | None = None) -> NumberedRows:
    """(row number, row or `Refusal`) for every wanted row, in order.

    `left_out` counts, by reason, the rows that a named set does not use.
    Raises `DataError` when the source is missing, of an unknown kind, damaged or not UTF-8.
    """
    left_out = Counter() if left_out is None else left_out
    if source.rows is not None:
        rows: NumberedRows = iter(enumerate(source.rows))
    elif source.named is not None:
        rows = _read_named_set(source.named, source.path, source.where.get("split"), left_out)
    elif source.location.startswith("hub:"):
        rows = read_hub(parse_hub(source.location))
    else:
        rows = read_file(Path(source.location))
    return islice(((n, row) for n, row in rows if _is_wanted(row, source.where)), source.limit)


def _is_wanted(row: object, where: dict[str, str]) -> bool:
    # what is no row at all has no tags, and must be counted rather than skipped
    if not where or not isinstance(row, Mapping):
        return True
    return all(str(row.get(tag)) == value for tag, value in where.items())


def _parse_selection(selection: str, entry: str) -> tuple[dict[str, str], int | None]:
    where = {}
    for part in selection.split("&") if selection else []:
        key, _, value = part.partition("=")
        if key not in {*TAGS, "limit"} or not value:
            raise DataError(
                f"{entry!r}: cannot select rows by {part!r}; after '#' write "
                f"key=value, joined by '&', with a key of: limit, {', '.join(TAGS)}"
            )
        where[key] = value
    limit = where.pop("limit", None)
    if limit is not None and (not limit.isdecimal() or int(limit) < 1):
        raise DataError(f"{entry!r}: limit must be a whole number above 0, got {limit!r}")
    return where, None if limit is None else int(limit)


# -- named sets ------------------------------------------------------------------------------


def _named_sources(location: str, where: dict[str, str], limit: int | None) -> list[Source]:
    name, equals, path = location.removeprefix("set:").partition("=")
    if equals and not path:
        raise DataError(f"{location!r} names no file; write set:{name}=path, or set:{name} alone")
    sources = []
    for member, place in _members(name, str(Path(path).expanduser()) if equals else None):
        named = find_named_set(member)
        _check_part(named, place, where.get("split"))
        shown = f"set:{member}" if place is None else f"set:{member}={place}"
        sources.append(Source(shown, member, where, limit, named=named, path=place))
    return sources


def _members(name: str, path: str | None) -> list[tuple[str, str | None]]:
    """(set, path) of each set that a name stands for: itself, or the members of a group.

    The path of a group is a folder with a file or folder for each member, called by its name.
    """
    if name not in SET_GROUPS:
        return [(name, path)]
    if path is None:
        return [(member, None) for member in SET_GROUPS[name]]
    folder, wanted = Path(path), SET_GROUPS[name]
    if not folder.is_dir():
        raise DataError(f"{path} is no folder; set:{name} needs one with {', '.join(wanted)}")
    paths = {stem(entry): str(entry) for entry in sorted(folder.iterdir())}
    if absent := [member for member in wanted if member not in paths]:
        raise DataError(f"{path} has no file or folder called {' or '.join(absent)}")
    return [(member, paths[member]) for member in wanted]


def _check_part(named: NamedSet, path: str | None, part: str | None) -> None:
    """Raises `DataError` for a part that the set does not have, or one that must be named and is not."""
    options = " or ".join(f"'#split={name}'" for name in named.parts)
    if part is not None and part not in named.parts:
        raise DataError(f"set:{named.name} has no part {part!r}; write {options} behind it")
    if part is None and len(named.parts) > 1 and not _is_one_part(named, path):
        raise DataError(f"set:{named.name} has several parts; write {options} behind it")


def _is_one_part(named: NamedSet, path: str | None) -> bool:
    """Whether the path is a file that is one part, such as HH's test.jsonl.gz."""
    return path is not None and not named.in_one_piece and Path(path).is_file()


def _read_named_set(
    named: NamedSet, path: str | None, part: str | None, left_out: Counter[str]
) -> NumberedRows:
    """(row number, row in our columns or `Refusal`) of one part of a set, from `path` or the hub."""
    part = part or (named.parts[0] if len(named.parts) == 1 else None)
    if path is not None and _is_one_part(named, path):
        for number, row in _converted(named, read_file(Path(path)), left_out):
            yield number, _tagged(row, part)
        return
    assert part is not None, "_check_part makes sure of it"
    by_part = _read_parts(named, path, part, left_out)
    later = named.parts[named.parts.index(part) + 1 :]
    held_out = {_prompt(row) for name in later for _, row in by_part.get(name, [])} - {None}
    for number, row in by_part.get(part, []):
        if held_out and _prompt(row) in held_out:
            left_out["prompt is in a held-out part"] += 1
        else:
            yield number, _tagged(row, part)


def _read_parts(
    named: NamedSet, path: str | None, part: str, left_out: Counter[str]
) -> dict[str, list[tuple[int, object]]]:
    """The wanted part and the later ones, as far as they are there; only the wanted one is counted."""
    if named.in_one_piece:
        return _divided(named, list(_converted(named, _open_part(named, path, WHOLE), left_out)))
    by_part = {part: list(_converted(named, _open_part(named, path, part), left_out))}
    for other in named.parts[named.parts.index(part) + 1 :]:
        if path is None or _part_files(named, Path(path), other):
            rows = _open_part(named, path, other)
            by_part[other] = list(_converted(named, rows, Counter()))
    return by_part


def _divided(
    named: NamedSet, rows: list[tuple[int, object]]
) -> dict[str, list[tuple[int, object]]]:
    """The rows of a set in one piece by part: the first rows, or what their `split` says."""
    by_part: dict[str, list[tuple[int, object]]] = {name: [] for name in named.parts}
    good = [number for number, row in rows if not isinstance(row, Refusal)]
    first = set(good[: int(named.test_fraction * len(good))])
    for number, row in rows:
        split = row.get("split") if isinstance(row, dict) else None
        by_part["test" if number in first else split or named.parts[0]].append((number, row))
    return by_part


def _open_part(named: NamedSet, path: str | None, part: str) -> NumberedRows:
    """The published rows of a part; those of several files are numbered through."""
    if path is None:
        if part not in named.hub:
            raise DataError(
                f"set:{named.name} is not on the hub; get it from {named.home} and write "
                f"set:{named.name}=path"
            )
        yield from read_hub(named.hub[part])
        return
    files = [Path(path)] if Path(path).is_file() else _part_files(named, Path(path), part)
    if not files:
        called = f" called like {part}" if part else ""
        raise DataError(f"{path}: no such file, or no file{called} in it (for set:{named.name})")
    start = 0
    for file in files:
        number = -1
        for number, row in read_file(file):
            yield start + number, row
        start += number + 1


def _part_files(named: NamedSet, folder: Path, part: str) -> list[Path]:
    """The files of a part in a folder: a download of the hub's repository, or files of those names."""
    where = named.hub.get(part)
    patterns = []
    if where is not None:
        name = Path(where.file).name if where.file else where.split
        within = f"*{where.folder}/" if where.folder else ""
        patterns = [f"{within}*{name}*", *([f"{within}*"] if part == WHOLE else []), f"*{name}*"]
    return find_files(folder, [*patterns, f"*{part}*"])


def _converted(named: NamedSet, rows: NumberedRows, left_out: Counter[str]) -> NumberedRows:
    """The rows in our columns, without those that the set's filter leaves out."""
    for number, row in rows:
        ours = row if isinstance(row, Refusal) else _convert(named, row)
        if isinstance(ours, LeftOut):
            left_out[ours.reason] += 1
        else:
            yield number, ours


def _convert(named: NamedSet, row: object) -> OurRow | LeftOut | Refusal:
    if not isinstance(row, dict):
        return Refusal("unreadable row", f"expected an object with named columns, got {show(row)}")
    try:
        return named.read_row(row)
    except RefusedError as refused:
        return refused.refusal


def _tagged(row: object, part: str | None) -> object:
    return {**row, "split": part} if isinstance(row, dict) and part else row


def _prompt(row: object) -> str | None:
    parsed = None if isinstance(row, Refusal) else parse_row(row)
    return normalised_key(parsed.prompt) if isinstance(parsed, ParsedRow) else None
