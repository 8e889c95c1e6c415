"""Preference data from files, hub data sets, named sets and lists -> groups, every bad row accounted for.

Rows of one source that share a prompt (and a subset) become one group, with each response stored once.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hafrm.atomic import atomic_write, fingerprint
from hafrm.data.files import (
    NumberedRows,
    Refusal,
    check_file,
    parse_hub,
    read_file,
    read_hub,
    show,
    stem,
)
from hafrm.data.grouping import GroupedRows
from hafrm.data.named_sets import NamedSet, find_sets, read_named_set
from hafrm.data.parse import COLUMNS, CONTEXT_COLUMNS, SHAPES, TAGS, ImplicitPrompt, parse_row
from hafrm.data.store import Lazy, join
from hafrm.errors import DataError, did_you_mean
from hafrm.preferences import Group

RawRows = Iterable[Mapping[str, Any]]
"""Rows in memory: a list of dictionaries, or a `datasets.Dataset`."""


@dataclass(frozen=True, slots=True)
class Source:
    """One place to read rows from, and which of its rows are wanted."""

    location: str  # as written, without the selection; "memory" for a list
    name: str  # the file's stem or the data set's name, which groups carry
    where: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    rows: RawRows | None = None
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> the source's
    ignore: tuple[str, ...] = ()  # columns that are read as if they were not there
    named: NamedSet | None = None  # the published set whose form the rows have
    path: str | None = None  # the file on this machine, if it is one


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out, and why."""

    source: str
    row: int  # counted from 0: the line of a JSON-lines file, else the record
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """What the sources hold."""

    groups: Sequence[Group]  # a tuple, or lazy (`hafrm.data.store`)
    bad_rows: tuple[BadRow, ...]
    num_rows: int  # rows looked at, the bad ones included
    unread_columns: tuple[str, ...]  # columns that no shape understands
    left_out: dict[str, int]  # unused rows of named sets, by reason; not in `num_rows`
    num_groups: tuple[int, ...]  # of each source (a group of sets counts as its members)


def read_preferences(  # noqa: PLR0913 - every way to say how rows are read
    sources: Sequence[str | Path | RawRows],
    *,
    max_bad_fraction: float = 0.02,
    bad_rows_file: Path | None = None,
    need_comparisons: bool = True,
    need_responses: bool = True,
    read_labels: bool = True,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    implicit_prompt: ImplicitPrompt = "lines",
) -> PreferenceData:
    """All groups of all sources, in the order in which their prompts first appear.

        data = read_preferences(["pairs.jsonl.gz#split=train", "set:hh-helpful#split=train", rows])

    `parse_sources` explains what a source is, `parse_row` explains `need_...`, `read_labels` and
    `implicit_prompt`. `columns` names the source's columns ({"prompt": "question"}), `ignore_columns` are
    ignored; neither applies to named sets. A row that only repeats earlier rows is bad ("duplicate"); a
    pair in the opposite order is a disagreement, and stays. Raises `DataError` if a source cannot be read,
    has no usable row or more than `max_bad_fraction` bad ones. `bad_rows_file` gets one JSON object for
    each bad row, before any error.
    """
    parse = partial(
        parse_row,
        need_comparisons=need_comparisons and need_responses and read_labels,
        need_responses=need_responses,
        read_labels=read_labels and need_responses,
        implicit_prompt=implicit_prompt,
    )
    for name in columns or {}:
        if name not in COLUMNS:
            hint = f"{did_you_mean(name, COLUMNS)}allowed are {', '.join(sorted(COLUMNS))}"
            raise DataError(f"columns names {show(name)}, which is not one of our columns; {hint}")
    readers = []
    for source in _distinct_sources(sources):
        own = dict(columns or {}) | source.columns
        ignore = (*ignore_columns, *source.ignore)
        readers.append(_SourceReader(replace(source, columns=own, ignore=ignore)))
    for reader in readers:
        for number, row in iter_rows(reader.source, reader.left_out):
            reader.add(number, row, row if isinstance(row, Refusal) else parse(row))
    parts = [reader.groups() for reader in readers]
    bad_rows = tuple(row for reader in readers for row in reader.bad_rows)
    if bad_rows_file is not None:
        bad_rows_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(bad_rows_file, "".join(json.dumps(asdict(row)) + "\n" for row in bad_rows))
    for reader in readers:
        reader.check(max_bad_fraction, bad_rows_file)
    groups = join(parts)
    return PreferenceData(
        groups if isinstance(groups, Lazy) else tuple(groups),
        bad_rows,
        num_rows=sum(reader.num_rows for reader in readers),
        unread_columns=tuple(sorted({c for r in readers for c in r.columns} - COLUMNS)),
        left_out=dict(sum((reader.left_out for reader in readers), Counter())),
        num_groups=tuple(map(len, parts)),
    )


def check_sources(entries: Iterable[str]) -> None:
    """Raise DataError for a missing or unreadable local file, before anything slow begins."""
    for source in chain.from_iterable(map(parse_sources, entries)):
        if source.path is not None and source.named is None:
            check_file(Path(source.path))


def parse_sources(entry: str | Path | RawRows) -> list[Source]:
    """The sources that one entry stands for: one, or the members of a group of named sets.

    An entry is a path, "hub:name[@revision][:config]:split", "set:name" (a published set, from the hub),
    "set:name=file", or a list of rows. A "#" selects: "pairs.jsonl.gz#split=train" keeps the rows whose
    column `split` (or another tag) has that value, "#limit=1000" the first 1000 of them; "#prompt=question"
    names a column, "#ignore=tools,images" ignores columns; "&" joins several.
    """
    if not isinstance(entry, str | Path):
        return [Source("memory", "memory", rows=entry)]
    location, mark, selection = str(entry).rpartition("#")
    remote = str(entry).startswith(("hub:", "set:"))
    if not mark or (not remote and os.path.exists(str(entry))):
        location, selection = str(entry), ""  # "#" may be part of a file's name
    where = _parse_selection(selection, str(entry))
    limit = int(where.pop("limit")) if "limit" in where else None
    ignore = tuple(where.pop("ignore", "").split(",")) if "ignore" in where else ()
    columns = {name: where.pop(name) for name in [*where] if name not in TAGS}
    if location.startswith("set:"):
        return [
            Source(f"set:{s.name}{f'={f}' if f else ''}", s.name, where, limit, named=s, path=f)
            for s, f in find_sets(location, where.get("split"))
        ]
    if not location.startswith("hub:"):
        name, path = stem(Path(location)), location
    else:
        hub, path = parse_hub(location), None
        name = hub.name.rstrip("/").rpartition("/")[2]
        name = f"{name}-{hub.config}" if hub.config else name
    return [Source(location, name, where, limit, columns=columns, ignore=ignore, path=path)]


def parse_source(entry: str | Path | RawRows) -> Source:
    """The one source that an entry stands for; raises `DataError` for a group of sets."""
    sources = parse_sources(entry)
    if len(sources) > 1:
        names = ", ".join(source.name for source in sources)
        raise DataError(f"{entry} stands for several sets ({names}); name one of them")
    return sources[0]


def file_digests(entries: Iterable[str]) -> dict[str, str]:
    """Digests of the files on this machine that data entries read."""
    paths = {Path(s.path) for entry in entries for s in parse_sources(entry) if s.path}
    return {str(p): fingerprint(p) for p in sorted(paths) if os.path.isfile(p)}


def iter_rows(source: Source, left_out: Counter[str] | None = None) -> NumberedRows:
    """(row number, row or `Refusal`) for every wanted row, in order; `left_out` as in `read_named_set`.

    Raises `DataError` for a source that cannot be read.
    """
    left_out = Counter() if left_out is None else left_out
    if source.rows is not None:
        rows: NumberedRows = iter(enumerate(source.rows))
    elif source.named is not None:
        rows = read_named_set(source.named, source.path, source.where.get("split"), left_out)
    elif source.location.startswith("hub:"):
        rows = read_hub(parse_hub(source.location), stream=True)
    else:
        rows = read_file(Path(source.location))
    if (source.columns or source.ignore) and source.named is None:
        rows = ((number, _in_our_columns(row, source)) for number, row in rows)
    wanted = (
        (number, row)
        for number, row in rows
        # what is not a row has no tags, and must be counted rather than skipped
        if not isinstance(row, Mapping)
        or all(str(row.get(tag)) == value for tag, value in source.where.items())
    )
    return islice(wanted, source.limit)


def _in_our_columns(row: object, source: Source) -> object:
    """The row with its columns under our names, without the ignored ones."""
    if not isinstance(row, Mapping):
        return row
    theirs = {*source.columns.values(), *source.columns, *source.ignore}
    renamed = {name: row[own] for name, own in source.columns.items() if own in row}
    return {name: value for name, value in row.items() if name not in theirs} | renamed


def _parse_selection(selection: str, entry: str) -> dict[str, str]:
    where = {}
    for part in selection.split("&") if selection else []:
        key, _, value = part.partition("=")
        if key not in {*COLUMNS, "limit", "ignore"} or not value:
            keys = f"limit, ignore, {', '.join(TAGS)}, or a column's name"
            written = f"{entry[:200]!r}: cannot select rows by {part[:80]!r}"
            raise DataError(f"{written}; after '#' write key=value, joined by '&'; keys: {keys}")
        where[key] = value
    limit = where.get("limit", "1")
    # more digits than a number of rows can have
    if not limit.isdecimal() or len(limit) > 18 or int(limit) < 1:
        raise DataError(f"{entry[:200]!r}: limit must be a whole number above 0, got {show(limit)}")
    return where


def _distinct_sources(entries: Sequence[str | Path | RawRows]) -> list[Source]:
    # each under its own name: two files with the same stem must not look like one
    is_list = isinstance(entries, Sequence) and not isinstance(entries, str)
    if not is_list or any(
        isinstance(e, Mapping) or not isinstance(e, Iterable | Path) for e in entries
    ):
        raise DataError(f"expected a list of sources (a list of rows is one), got {show(entries)}")
    if not entries:
        raise DataError("there are no sources; name a file, a hub data set or a list of rows")
    sources: list[Source] = []
    names: dict[str, str] = {}  # name -> location
    for index, entry in enumerate(entries):
        for source in parse_sources(entry):
            place = source.location if source.rows is None else f"list {index}"
            name, copy = source.name, 2
            while names.setdefault(name, place) != place:
                name, copy = f"{source.name}~{copy}", copy + 1
            sources.append(replace(source, name=name))
            if source.rows is None and sources[-1] in sources[:-1]:
                raise DataError(f"{entry} is given twice")
    return sources


@dataclass(slots=True)
class _SourceReader:
    """The rows of one source so far."""

    source: Source
    num_rows: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    good_rows: GroupedRows = field(default_factory=GroupedRows)

    def add(self, number: int, row: object, parsed: Group | Refusal) -> None:
        """Count a row as good or bad."""
        self.num_rows += 1
        if isinstance(row, Mapping):
            self.columns.update(map(str, row))
        if isinstance(parsed, Refusal):
            self.bad_rows.append(BadRow(self.source.location, number, *parsed))
            return
        self.good_rows.add(number, replace(parsed, id=parsed.id or f"{self.source.name}-{number}"))

    def groups(self) -> Sequence[Group]:
        """The groups in the order of their first rows; rows that only repeat earlier ones become bad."""
        groups, repeated = self.good_rows.groups(self.source.name)
        if repeated and self.source.named:  # the publisher's own repetitions
            self.num_rows -= len(repeated)
            self.left_out["repeats an earlier row"] += len(repeated)
            return groups
        for number, name in repeated:
            detail = f"an earlier row of group {name!r} says all of it"
            self.bad_rows.append(BadRow(self.source.location, number, "duplicate", detail))
        self.bad_rows.sort(key=lambda row: row.row)
        return groups

    def check(self, max_bad_fraction: float, bad_rows_file: Path | None) -> None:
        """Raise `DataError` when the source has no usable rows, or too many bad ones."""
        place, num_bad = self.source.location, len(self.bad_rows)
        if not self.num_rows:
            wanted = "&".join(f"{tag}={value}" for tag, value in self.source.where.items())
            why = f"; left out are {dict(self.left_out)}" if self.left_out else ""
            raise DataError(f"{place} has no row{f' with {wanted[:200]}' if wanted else 's'}{why}")
        reasons = Counter(row.reason for row in self.bad_rows)
        if reasons["missing column"] == self.num_rows:
            detail = self.bad_rows[0].detail
            if self.source.named is not None:
                raise DataError(f"{place} is not in the set's published form: {detail}")
            shapes = "".join(f"\n  {shape}" for shape in SHAPES)
            raise DataError(
                f"{place} has no usable columns: {detail}. Understood are{shapes}"
                f"{_suggested_columns(self.columns)}"
            )
        if reasons["unread context"] and max_bad_fraction < 1:
            details = [r.detail for r in self.bad_rows if r.reason == "unread context"]
            refused = {detail.split("`")[1] for detail in details}
            columns = [name for name in CONTEXT_COLUMNS if name in refused]
            raise DataError(
                f"{reasons['unread context']:,} of {self.num_rows:,} rows of {place} have a context that "
                f"is not read: {', '.join(columns)}. Put it into the messages of `prompt`, or name the "
                f"columns in data.ignore_columns (without a recipe: FILE#ignore={','.join(columns)}) to "
                "train and score without them."
            )
        if num_bad <= max_bad_fraction * self.num_rows and num_bad < self.num_rows:
            return
        first = {row.reason: row for row in reversed(self.bad_rows)}
        table = "".join(
            f"\n  {count:>7,}  {reason:<22}  first: row {first[reason].row}: {first[reason].detail}"
            for reason, count in reasons.most_common()
        )
        listed = f"All are listed in {bad_rows_file}. " if bad_rows_file else ""
        fix = "or raise data.max_bad_fraction (--max-bad-fraction) to leave them out"
        raise DataError(
            f"{num_bad:,} of {self.num_rows:,} rows of {place} are bad "
            f"({num_bad / self.num_rows:.1%}; allowed: {max_bad_fraction:.1%}):{table}\n{listed}"
            + (f"Correct them, {fix}." if num_bad < self.num_rows else "Correct them.")
        )


# what other files call our columns; if there is a label too, a pair's order is not the preference
_OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "problem", "user", "context", "text"),
    "chosen": ("good", "preferred", "accepted", "better", "winner", "positive", "response_a", "answer_a"),
    "rejected": ("bad", "dispreferred", "refused", "worse", "loser", "negative", "response_b", "answer_b"),
    "response": ("answer", "output", "completion"),
    "responses": ("answers", "outputs", "completions", "candidates"),
}  # fmt: skip


def _suggested_columns(columns: Iterable[str]) -> str:
    """How to name the columns of a source, by what other files call them; "" if nothing fits."""
    theirs = {name.lower(): name for name in columns}
    has_label = not theirs.keys().isdisjoint(["label", "winner", "preference"])
    pairs = {
        name: theirs[other]
        for name, others in _OTHER_NAMES.items()
        for other in reversed([name, *others])
        if other in theirs and not (has_label and other.endswith(("_a", "_b", "winner")))
    }
    if pairs.keys() & {"chosen", "rejected"} or not pairs.keys() - {"prompt"}:
        pairs = {name: pairs.get(name, "...") for name in ("prompt", "chosen", "rejected")}
    written = {f"{name}: {own}": f"{name}={own}" for name, own in pairs.items() if name != own}
    option = f"hafrm data --columns {','.join(written.values())}"
    if not written:
        return ""
    return (
        f"\nOr say which column is which, perhaps data.columns: {{{', '.join(written)}}} ({option})"
    )
