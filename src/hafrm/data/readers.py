"""Preference data from files, hub data sets and lists -> groups, with every bad row accounted for.

Rows of one source that share a prompt (and a subset) become one group, in which each response stands
once. A bad row is counted, listed in a side file and left out; too many of them stop the reading.
Nothing is dropped, repaired or reordered without a trace in the `Reading`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from hafrm.data.mixing import normalised_key
from hafrm.data.rows import COLUMNS, SHAPES, ParsedRow, parse_row
from hafrm.data.sources import Rows, Source, iter_rows, parse_sources
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
    """One of `hafrm.data.values.REASONS`."""
    detail: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What the sources held."""

    groups: tuple[Group, ...]
    bad: tuple[BadRow, ...]
    num_rows: int
    """Rows looked at, the bad ones included."""
    num_repeated: int = 0
    """Comparisons left out of good rows because an earlier row of the same group made them."""
    unread_columns: tuple[str, ...] = ()
    """Columns that no shape understands."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows of named sets that these do not use, by reason; they are not among `num_rows`."""
    num_groups: tuple[int, ...] = ()
    """Of each source in its order (a group of sets counts as its members); together all `groups`."""


def read(
    sources: Sequence[str | Path | Rows],
    *,
    max_bad_fraction: float = 0.02,
    bad_rows_file: Path | None = None,
    max_chars: int = MAX_CHARS,
    need_comparisons: bool = True,
    need_responses: bool = True,
) -> Reading:
    """All groups of all sources, in the order in which their prompts first appear.

    Sources are paths, "hub:name[:config]:split", "set:name" and lists of rows; `parse_sources` tells
    how "#split=train" picks rows of one. A group's id is its first row's, else "<source name>-<row>";
    its tags are those on which its rows agree.
    `need_responses` False takes every row for its prompt: responses and labels are then optional.
    A row that only repeats earlier rows is bad ("duplicate"), but left out of a named set, whose
    repetitions are not the reader's; the opposite order of a pair is disagreement, and kept. Several
    judges' equal votes belong into `votes` or `weight`.

    Raises `DataError` when a source cannot be read, has no usable row or more than
    `max_bad_fraction` bad ones, and when rows of one prompt disagree about their `split`.
    `bad_rows_file` is written in any case: one JSON object for each bad row.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"max_bad_fraction must be between 0 and 1, got {max_bad_fraction}")
    parse = partial(
        parse_row,
        need_comparisons=need_comparisons and need_responses,
        need_responses=need_responses,
        max_chars=max_chars,
    )
    tallies = [_Tally(source) for source in _distinct_names(sources)]
    for tally in tallies:
        for number, row in iter_rows(tally.source, tally.left_out):
            known = row if isinstance(row, Refusal) else parse(row)
            tally.count(number, row, known)
    bad = tuple(row for tally in tallies for row in tally.bad)
    if bad_rows_file is not None:
        bad_rows_file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(row)) + "\n" for row in bad]
        bad_rows_file.write_text("".join(lines), encoding="utf-8")
    for tally in tallies:
        _check_tally(tally, max_bad_fraction, bad_rows_file)
    parts = [tally.groups() for tally in tallies]
    groups = tuple(group for part in parts for group in part)
    _check_splits(groups)
    return Reading(
        groups,
        bad,
        num_rows=sum(tally.num_rows for tally in tallies),
        num_repeated=sum(tally.num_repeated for tally in tallies),
        unread_columns=tuple(sorted({c for tally in tallies for c in tally.columns} - COLUMNS)),
        left_out=dict(sum((tally.left_out for tally in tallies), Counter())),
        num_groups=tuple(map(len, parts)),
    )


def _distinct_names(given: Sequence[str | Path | Rows]) -> list[Source]:
    """The sources, named apart: two files of one stem must not look like one in an evaluation."""
    if isinstance(given, str | Path) or any(isinstance(item, Mapping) for item in given):
        raise DataError(f"expected a list of sources (a list of rows is one), got {show(given)}")
    if not given:
        raise DataError("no sources are given; name a file, a hub data set or a list of rows")
    sources: list[Source] = []
    names: dict[str, str] = {}  # name -> location
    for index, item in enumerate(given):
        for source in parse_sources(item):
            if source.rows is None and any(
                (source.location, source.where, source.limit)
                == (other.location, other.where, other.limit)
                for other in sources
            ):
                raise DataError(f"{item} is given twice")
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
    comparisons: list[Comparison] = field(default_factory=list)
    known: set[tuple[int, int, bool]] = field(default_factory=set)
    rows: int = 0

    def add(self, parsed: ParsedRow) -> int | Refusal:
        """Take in what the row says; the number of its comparisons that were there already."""
        old_size, num_known = len(self.responses), 0
        place = [self.responses.setdefault(text, len(self.responses)) for text in parsed.responses]
        for pair in parsed.comparisons:
            ends = place[pair.chosen], place[pair.rejected]
            key = (min(ends), max(ends), True) if pair.tie else (*ends, False)
            if key in self.known:
                num_known += 1
                continue
            self.known.add(key)
            self.comparisons.append(replace(pair, chosen=ends[0], rejected=ends[1]))
        nothing_new = num_known == len(parsed.comparisons) and len(self.responses) == old_size
        if nothing_new and self.rows:
            return Refusal("duplicate", f"an earlier row of group {self.id!r} says all of it")
        self.rows += 1
        self.tags = {tag: text for tag, text in self.tags.items() if parsed.tags.get(tag) == text}
        return num_known


@dataclass(slots=True)
class _Tally:
    """What one source held so far."""

    source: Source
    num_rows: int = 0
    num_repeated: int = 0
    bad: list[BadRow] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    drafts: dict[tuple[object, ...], _Draft] = field(default_factory=dict)

    def count(self, number: int, row: object, parsed: ParsedRow | Refusal) -> None:
        """Book a row as good or bad."""
        self.num_rows += 1
        if isinstance(row, Mapping):
            self.columns.update(map(str, row))
        outcome = parsed if isinstance(parsed, Refusal) else self._add(number, parsed)
        if self.source.named and isinstance(outcome, Refusal) and outcome.reason == "duplicate":
            self.num_rows -= 1
            self.left_out["repeats an earlier row"] += 1
        elif isinstance(outcome, Refusal):
            self.bad.append(BadRow(self.source.location, number, *outcome))
        else:
            self.num_repeated += outcome

    def _add(self, number: int, parsed: ParsedRow) -> int | Refusal:
        # a comparison belongs to its own subset, and a prompt with two splits must come to light
        key = (parsed.prompt, parsed.tags.get("subset"), parsed.tags.get("split"))
        if key not in self.drafts:
            name = parsed.id or f"{self.source.name}-{number}"
            self.drafts[key] = _Draft(name, parsed.prompt, parsed.tags)
        return self.drafts[key].add(parsed)

    def groups(self) -> list[Group]:
        """The groups, in the order of their first rows."""
        return [
            Group(
                id=draft.id,
                prompt=draft.prompt,
                responses=tuple(draft.responses),
                comparisons=tuple(draft.comparisons),
                source=self.source.name,
                tags=draft.tags,
            )
            for draft in self.drafts.values()
        ]


def _check_tally(tally: _Tally, max_bad_fraction: float, bad_rows_file: Path | None) -> None:
    place, num_bad = tally.source.location, len(tally.bad)
    if not tally.num_rows:
        wanted = "&".join(f"{tag}={value}" for tag, value in tally.source.where.items())
        unused = ", ".join(f"{reason}: {n:,}" for reason, n in tally.left_out.items())
        why = f"; left out are {unused}" if unused else ""
        raise DataError(f"{place} has no row{f' with {wanted}' if wanted else 's'}{why}")
    reasons = Counter(row.reason for row in tally.bad)
    if reasons["missing column"] == tally.num_rows:
        if tally.source.named is not None:
            raise DataError(
                f"{place} is not in the published form of {tally.source.named.name} "
                f"({tally.bad[0].detail}), which has columns {', '.join(tally.source.named.columns)}"
            )
        shapes = "".join(f"\n  {shape}" for shape in SHAPES)
        raise DataError(
            f"{place} has no usable columns: found {str(sorted(tally.columns))[:300]} "
            f"({tally.bad[0].detail}). Understood are{shapes}"
        )
    if num_bad <= max_bad_fraction * tally.num_rows and num_bad < tally.num_rows:
        return
    first = {row.reason: row for row in reversed(tally.bad)}
    table = "".join(
        f"\n  {count:>7,}  {reason:<22}  first: row {first[reason].row}: {first[reason].detail}"
        for reason, count in reasons.most_common()
    )
    listed = f"All are listed in {bad_rows_file}. " if bad_rows_file else ""
    raise DataError(
        f"{num_bad:,} of {tally.num_rows:,} rows of {place} are bad ({num_bad / tally.num_rows:.1%}; "
        f"allowed: {max_bad_fraction:.1%}):{table}\n{listed}Correct them, or leave them out by "
        "raising data.max_bad_fraction (--max-bad-fraction)."
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
