"""Preference data from files, hub data sets and lists -> groups, with every bad row accounted for.

Rows of one source that share a prompt (and a subset) become one group, in which each response is stored
once. A bad row is counted, listed in a side file and left out; too many of them stop the reading. Nothing
is dropped, repaired or reordered without a trace in the result.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from hafrm.atomic import atomic_write
from hafrm.data.parse import COLUMNS, SHAPES, ParsedRow, parse_row
from hafrm.data.sources import RawRows, Source, iter_rows, parse_sources
from hafrm.data.splits import normalised_key
from hafrm.data.values import MAX_CHARS, Refusal, show
from hafrm.errors import ConfigError, DataError
from hafrm.preferences import Comparison, Group, Message


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out, and why."""

    source: str
    """The path, hub name or "memory" that it came from."""
    row: int
    """Counted from 0: the line of a JSON-lines file, else the record."""
    reason: str
    """One of `hafrm.data.values.BAD_ROW_REASONS`."""
    detail: str


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """What the sources hold."""

    groups: tuple[Group, ...]
    bad_rows: tuple[BadRow, ...]
    num_rows: int
    """Rows looked at, the bad ones included."""
    num_repeated: int = 0
    """Comparisons left out of good rows because an earlier row of the same group made them."""
    unread_columns: tuple[str, ...] = ()
    """Columns that no shape understands."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows of named sets that these do not use, by reason; not counted in `num_rows`."""
    num_groups: tuple[int, ...] = ()
    """Of each source in its order (a group of sets counts as its members); together all `groups`."""


def read_preferences(
    sources: Sequence[str | Path | RawRows],
    *,
    max_bad_fraction: float = 0.02,
    bad_rows_file: Path | None = None,
    max_chars: int = MAX_CHARS,
    need_comparisons: bool = True,
    need_responses: bool = True,
) -> PreferenceData:
    """All groups of all sources, in the order in which their prompts first appear.

        data = read_preferences(["pairs.jsonl.gz#split=train", "set:hh-helpful#split=train", rows])

    Sources are paths, "hub:name[:config]:split", "set:name" and rows (a list, or a `datasets.Dataset`);
    `parse_sources` says how "#split=train" selects rows of one. A group's id is its first row's, else
    "<source name>-<row>"; its tags are those on which its rows agree. `need_comparisons=False` takes
    unlabelled rows too, `need_responses=False` takes every row for its prompt. A row that only repeats
    earlier rows is bad ("duplicate"), but left out of a named set, whose repetitions are the publisher's;
    the opposite order of a pair is disagreement, and stays.

    Raises `DataError` when a source cannot be read, has no usable row or more than `max_bad_fraction`
    bad ones, and when rows of one prompt disagree about their `split`. `bad_rows_file` is written in any
    case: one JSON object for each bad row.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"max_bad_fraction must be between 0 and 1, got {max_bad_fraction}")
    parse = partial(
        parse_row,
        need_comparisons=need_comparisons and need_responses,
        need_responses=need_responses,
        max_chars=max_chars,
    )
    readers = [_SourceReader(source) for source in _distinct_sources(sources)]
    for reader in readers:
        for number, row in iter_rows(reader.source, reader.left_out):
            reader.add(number, row, row if isinstance(row, Refusal) else parse(row))
    bad_rows = tuple(row for reader in readers for row in reader.bad_rows)
    if bad_rows_file is not None:
        bad_rows_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(bad_rows_file, "".join(json.dumps(asdict(row)) + "\n" for row in bad_rows))
    for reader in readers:
        reader.check(max_bad_fraction, bad_rows_file)
    by_source = [[draft.group(r.source.name) for draft in r.drafts.values()] for r in readers]
    groups = tuple(group for members in by_source for group in members)
    _check_splits(groups)
    return PreferenceData(
        groups,
        bad_rows,
        num_rows=sum(reader.num_rows for reader in readers),
        num_repeated=sum(reader.num_repeated for reader in readers),
        unread_columns=tuple(sorted({c for r in readers for c in r.columns} - COLUMNS)),
        left_out=dict(sum((reader.left_out for reader in readers), Counter())),
        num_groups=tuple(map(len, by_source)),
    )


def _distinct_sources(entries: Sequence[str | Path | RawRows]) -> list[Source]:
    """The sources, each under its own name: two files of one stem must not look like one."""
    if isinstance(entries, str | Path) or any(isinstance(entry, Mapping) for entry in entries):
        raise DataError(f"expected a list of sources (a list of rows is one), got {show(entries)}")
    if not entries:
        raise DataError("there are no sources; name a file, a hub data set or a list of rows")
    sources: list[Source] = []
    names: dict[str, str] = {}  # name -> location
    for index, entry in enumerate(entries):
        for source in parse_sources(entry):
            same = [
                other
                for other in sources
                if (source.location, source.where, source.limit)
                == (other.location, other.where, other.limit)
            ]
            if same and source.rows is None:
                raise DataError(f"{entry} is given twice")
            place = source.location if source.rows is None else f"list {index}"
            name, copy = source.name, 2
            while names.setdefault(name, place) != place:
                name, copy = f"{source.name}~{copy}", copy + 1
            sources.append(replace(source, name=name))
    return sources


@dataclass(slots=True)
class _Draft:
    """A group in the making."""

    id: str
    prompt: tuple[Message, ...]
    tags: dict[str, str]
    responses: dict[str, int] = field(default_factory=dict)
    comparisons: dict[tuple[int, int, bool], Comparison] = field(default_factory=dict)
    num_rows: int = 0

    def add(self, parsed: ParsedRow) -> int | Refusal:
        """Take in what a row says; the number of its comparisons that an earlier row made."""
        old_size, num_repeated = len(self.responses), 0
        place = [self.responses.setdefault(text, len(self.responses)) for text in parsed.responses]
        for pair in parsed.comparisons:
            ends = place[pair.chosen], place[pair.rejected]
            # a tie is the same in both orders
            key = (min(ends), max(ends), True) if pair.tie else (*ends, False)
            num_repeated += key in self.comparisons
            self.comparisons.setdefault(key, replace(pair, chosen=ends[0], rejected=ends[1]))
        is_new = num_repeated < len(parsed.comparisons) or len(self.responses) > old_size
        if self.num_rows and not is_new:
            return Refusal("duplicate", f"an earlier row of group {self.id!r} says all of it")
        self.num_rows += 1
        self.tags = {tag: text for tag, text in self.tags.items() if parsed.tags.get(tag) == text}
        return num_repeated

    def group(self, source: str) -> Group:
        responses, comparisons = tuple(self.responses), tuple(self.comparisons.values())
        return Group(self.id, self.prompt, responses, comparisons, source, self.tags)


@dataclass(slots=True)
class _SourceReader:
    """The rows of one source so far."""

    source: Source
    num_rows: int = 0
    num_repeated: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    drafts: dict[tuple[object, ...], _Draft] = field(default_factory=dict)

    def add(self, number: int, row: object, parsed: ParsedRow | Refusal) -> None:
        """Count a row as good or bad."""
        self.num_rows += 1
        if isinstance(row, Mapping):
            self.columns.update(map(str, row))
        outcome = parsed if isinstance(parsed, Refusal) else self._add_parsed(number, parsed)
        if not isinstance(outcome, Refusal):
            self.num_repeated += outcome
        elif self.source.named and outcome.reason == "duplicate":
            self.num_rows -= 1
            self.left_out["repeats an earlier row"] += 1
        else:
            self.bad_rows.append(BadRow(self.source.location, number, *outcome))

    def _add_parsed(self, number: int, parsed: ParsedRow) -> int | Refusal:
        # a comparison belongs to its own subset, and `_check_splits` must see a prompt with two splits
        key = (parsed.prompt, parsed.tags.get("subset"), parsed.tags.get("split"))
        if key not in self.drafts:
            name = parsed.id or f"{self.source.name}-{number}"
            self.drafts[key] = _Draft(name, parsed.prompt, parsed.tags)
        return self.drafts[key].add(parsed)

    def check(self, max_bad_fraction: float, bad_rows_file: Path | None) -> None:
        """Raise `DataError` when the source has no usable rows, or too many bad ones."""
        place, num_bad = self.source.location, len(self.bad_rows)
        if not self.num_rows:
            wanted = "&".join(f"{tag}={value}" for tag, value in self.source.where.items())
            unused = ", ".join(f"{reason}: {n:,}" for reason, n in self.left_out.items())
            why = f"; left out are {unused}" if unused else ""
            raise DataError(f"{place} has no row{f' with {wanted}' if wanted else 's'}{why}")
        reasons = Counter(row.reason for row in self.bad_rows)
        if reasons["missing column"] == self.num_rows:
            detail = self.bad_rows[0].detail
            if self.source.named is not None:
                name = self.source.named.name
                raise DataError(f"{place} is not in the published form of {name}: {detail}")
            shapes = "".join(f"\n  {shape}" for shape in SHAPES)
            raise DataError(f"{place} has no usable columns: {detail}. Understood are{shapes}")
        if num_bad <= max_bad_fraction * self.num_rows and num_bad < self.num_rows:
            return
        first = {row.reason: row for row in reversed(self.bad_rows)}
        table = "".join(
            f"\n  {count:>7,}  {reason:<22}  first: row {first[reason].row}: {first[reason].detail}"
            for reason, count in reasons.most_common()
        )
        listed = f"All are listed in {bad_rows_file}. " if bad_rows_file else ""
        raise DataError(
            f"{num_bad:,} of {self.num_rows:,} rows of {place} are bad "
            f"({num_bad / self.num_rows:.1%}; allowed: {max_bad_fraction:.1%}):{table}\n{listed}"
            "Correct them, or raise data.max_bad_fraction (--max-bad-fraction) to leave them out."
        )


def _check_splits(groups: Sequence[Group]) -> None:
    """A prompt that is in two splits leaks from one into the other."""
    seen: dict[str, Group] = {}
    torn: dict[str, tuple[Group, Group]] = {}
    for group in groups:
        if "split" in group.tags:
            key = normalised_key(group.prompt)
            first = seen.setdefault(key, group)
            if first.tags["split"] != group.tags["split"]:
                torn.setdefault(key, (first, group))
    if torn:
        first, second = next(iter(torn.values()))
        raise DataError(
            f"{len(torn):,} prompts are in two splits at once, such as {show(first.prompt[-1].content)}"
            f" ({first.id} is {first.tags['split']}, {second.id} is {second.tags['split']}); "
            "give each prompt one split, or leave one of them out with '#split=...'"
        )
