"""Prompts, and the candidates for each: read from files, or from what a policy wrote before.

A candidate file is any file of rows with a prompt and responses; one that a best-of-n job wrote is such a
file too. Nothing here runs a model.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hafrm.data.parse import ParsedRow, parse_row
from hafrm.data.reader import read_preferences
from hafrm.data.sources import iter_rows, parse_sources
from hafrm.data.values import Refusal, RefusedError, check_text
from hafrm.errors import ConfigError, DataError
from hafrm.preferences import Group, Message, prompt_key

log = logging.getLogger("hafrm")
MAX_BAD = 0.02
"""Share of rows without a usable prompt, or usable responses, above which a file is refused."""
_RESPONSES = {"chosen", "rejected", "response", "responses", "completions"}


@dataclass(frozen=True)
class Candidates:
    """What there is to pick from for one prompt."""

    group: Group
    """The prompt and its distinct candidates, in the order in which they were first drawn."""
    drawn: tuple[int, ...]
    """Every draw as an index into the group's responses; repetitions only where they were kept."""
    tries: int = 0
    """Draws that were made in all."""
    unended: int = 0
    """Draws that ran into the limit of tokens."""
    blank: int = 0
    """Draws that were no text, and so are no candidates."""
    error: str | None = None
    """Why the policy could not be asked."""

    def to_record(self) -> dict[str, Any]:
        """As one line of a candidate file."""
        record: dict[str, Any] = {
            "id": self.group.id,
            "prompt": [message._asdict() for message in self.group.prompt],
            "responses": [self.group.responses[k] for k in self.drawn],
            "source": self.group.source,
            "tries": self.tries,
            "unended": self.unended,
            "blank": self.blank,
        }
        return record if self.error is None else {**record, "error": self.error}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Candidates":
        """What `to_record` gave."""
        prompt = tuple(Message(**message) for message in record["prompt"])
        group = Group(record["id"], prompt, (), source=record["source"])
        found = candidates_of(group, record["responses"])
        counts = {name: record[name] for name in ("tries", "unended", "blank")}
        return replace(found, **counts, error=record.get("error"))


def candidates_of(prompt: Group, texts: Sequence[str]) -> Candidates:
    """The candidates that draws make, in their order."""
    distinct = tuple(dict.fromkeys(texts))
    place = {text: k for k, text in enumerate(distinct)}
    drawn = tuple(place[text] for text in texts)
    return Candidates(replace(prompt, responses=distinct), drawn, tries=len(texts))


def digest_of(candidates: Sequence[Candidates]) -> str:
    """What tells one set of candidates from another."""
    known = [(c.group.id, c.group.prompt, c.group.responses, c.drawn) for c in candidates]
    return hashlib.sha256(json.dumps(known).encode("ascii")).hexdigest()


def read_prompts(sources: Sequence[str]) -> list[Group]:
    """The distinct prompts of rows of any shape (responses are passed over), as groups without responses.

    Raises DataError for a source that is empty, or in which more than 2 % of the rows have no prompt.
    """
    prompts: dict[str, Group] = {}
    names: set[str] = set()
    for given in sources:
        num_rows, bad = 0, list[tuple[int, Refusal]]()
        for name, number, parsed in _parsed_prompts(given):
            num_rows += 1
            if isinstance(parsed, Refusal):
                bad.append((number, parsed))
                continue
            label = parsed.id or f"{name}-{number}"
            label = f"{label}~{len(names)}" if label in names else label
            key = prompt_key(parsed.prompt)
            if key not in prompts:
                names.add(label)
                prompts[key] = Group(label, parsed.prompt, (), source=name, tags=parsed.tags)
        _check_rows(given, num_rows, bad)
    return list(prompts.values())


def _parsed_prompts(given: str) -> Iterator[tuple[str, int, ParsedRow | Refusal]]:
    for source in parse_sources(given):
        for number, row in iter_rows(source):
            yield source.name, number, row if isinstance(row, Refusal) else _parse(row)


def _parse(row: object) -> ParsedRow | Refusal:
    """A row of any shape; where its responses cannot be used, or there are none, its prompt alone."""
    parsed = parse_row(row, need_comparisons=False)
    if isinstance(parsed, Refusal) and isinstance(row, Mapping):
        alone = {name: value for name, value in row.items() if name not in _RESPONSES}
        again = parse_row({**alone, "response": "?"}, need_comparisons=False)
        return parsed if isinstance(again, Refusal) and _RESPONSES & set(row) else again
    return parsed


def _check_rows(given: str, num_rows: int, bad: Sequence[tuple[int, Refusal]]) -> None:
    if num_rows == 0:
        raise DataError(
            f"{given} has no rows; --prompts needs rows with a `prompt` (text or messages)"
        )
    if not bad:
        return
    number, refusal = bad[0]
    what = (
        f"{len(bad)} of {num_rows} rows of {given} have no usable prompt, such as row {number}: "
        f"{refusal.reason}: {refusal.detail}"
    )
    if len(bad) > MAX_BAD * num_rows:
        raise DataError(f"{what}; mend them, or leave them out")
    log.warning("%s; they are left out", what)


def read_candidates(sources: Sequence[str], num: int) -> list[Candidates]:
    """The first `num` distinct responses to each prompt of files that have several.

    Prompts with fewer than two responses are left out, and named in the log. Raises DataError when no
    prompt has two, and for files that cannot be read.
    """
    groups = read_preferences(sources, max_bad_fraction=MAX_BAD, need_comparisons=False).groups
    several = [group for group in groups if len(group.responses) > 1]
    if not several:
        raise DataError(
            f"{', '.join(sources)}: none of {len(groups)} prompts has two responses or more, so there is "
            "nothing to pick from; give rows with `prompt` and `responses`, or let a policy write them "
            "(--prompts with --policy or --endpoint)"
        )
    if len(several) < len(groups):
        alone = [group.id for group in groups if len(group.responses) < 2]
        log.warning(
            "%d of %d prompts have fewer than two responses and are left out, such as %s",
            *(len(alone), len(groups), alone[0]),
        )
    names: dict[str, int] = {}
    found = []
    for group in several:
        copy = names[group.id] = names.get(group.id, 0) + 1
        label = group.id if copy == 1 else f"{group.id}~{copy}"
        found.append(candidates_of(replace(group, id=label, comparisons=()), group.responses[:num]))
    return found


def is_usable(text: str) -> bool:
    """Whether a draw can be a candidate: some text that files and tokenizers can hold."""
    try:
        check_text(text, "a response")
    except RefusedError:
        return False
    return bool(text.strip())


def check_num(num: int) -> None:
    """Raises ConfigError for a number of candidates that leaves nothing to pick."""
    if num < 2:
        raise ConfigError(f"best of n needs 2 candidates or more for each prompt (-n), got {num}")
