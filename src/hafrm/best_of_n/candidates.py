"""Prompts and the candidates for each: read from files, or from what a policy wrote before.

A candidate file is any file of rows with a prompt and responses; `candidates.jsonl` of a best-of-n job is
one too. Nothing here runs a model.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hafrm.data.parse import ParsedRow, parse_row
from hafrm.data.reader import iter_rows, parse_sources, read_preferences
from hafrm.data.values import Refusal, RefusedError, check_text
from hafrm.errors import ConfigError, DataError
from hafrm.preferences import Group, Message, prompt_key

log = logging.getLogger("hafrm")
MAX_BAD_FRACTION = 0.02
"""Fraction of rows without a usable prompt, or usable responses, above which a file is refused."""
_RESPONSE_COLUMNS = {"chosen", "rejected", "response", "responses", "completions"}


@dataclass(frozen=True)
class Candidates:
    """What there is to pick from for one prompt."""

    group: Group
    """The prompt and its distinct candidates, in the order in which they were first drawn."""
    drawn: tuple[int, ...]
    """Every draw as an index into the group's responses; repeated only where repeats were asked for."""
    num_draws: int = 0
    num_cut: int = 0
    """Draws that reached the token limit."""
    num_blank: int = 0
    """Draws that were not text, and so are not candidates."""
    error: str | None = None
    """Why the policy could not answer this prompt."""

    def to_record(self) -> dict[str, Any]:
        """One line of a candidate file, which the data readers take as a row."""
        record: dict[str, Any] = {
            "id": self.group.id,
            "prompt": [message._asdict() for message in self.group.prompt],
            "responses": [self.group.responses[k] for k in self.drawn],
            "source": self.group.source,
            "num_draws": self.num_draws,
            "num_cut": self.num_cut,
            "num_blank": self.num_blank,
        }
        return record if self.error is None else {**record, "error": self.error}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Candidates":
        """The candidates that `to_record` wrote."""
        prompt = tuple(Message(**message) for message in record["prompt"])
        group = Group(record["id"], prompt, (), source=record["source"])
        counts = {name: record[name] for name in ("num_draws", "num_cut", "num_blank")}
        return replace(
            candidates_of(group, record["responses"]), **counts, error=record.get("error")
        )


def candidates_of(prompt: Group, texts: Sequence[str]) -> Candidates:
    """The candidates that these draws make, in their order."""
    distinct = tuple(dict.fromkeys(texts))
    place = {text: k for k, text in enumerate(distinct)}
    drawn = tuple(place[text] for text in texts)
    return Candidates(replace(prompt, responses=distinct), drawn, num_draws=len(texts))


def candidates_digest(candidates: Sequence[Candidates]) -> str:
    """Hexadecimal digest of all prompts and draws, for cache keys."""
    content = [(c.group.id, c.group.prompt, c.group.responses, c.drawn) for c in candidates]
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def read_prompts(sources: Sequence[str]) -> list[Group]:
    """The distinct prompts of rows of any shape, as groups without responses.

    Raises DataError for a source that is empty, or in which more than 2 % of the rows have no prompt.
    """
    prompts: dict[str, Group] = {}
    labels: set[str] = set()
    for source in sources:
        num_rows, bad = 0, list[tuple[int, Refusal]]()
        for name, number, parsed in _parsed_prompts(source):
            num_rows += 1
            if isinstance(parsed, Refusal):
                bad.append((number, parsed))
                continue
            label = parsed.id or f"{name}-{number}"
            # ids that people give may repeat, and records are found again by theirs
            label = f"{label}~{len(labels)}" if label in labels else label
            key = prompt_key(parsed.prompt)
            if key not in prompts:
                labels.add(label)
                prompts[key] = Group(label, parsed.prompt, (), source=name, tags=parsed.tags)
        _check_bad_rows(source, num_rows, bad)
    return list(prompts.values())


def _parsed_prompts(sources: str) -> Iterator[tuple[str, int, ParsedRow | Refusal]]:
    for source in parse_sources(sources):
        for number, row in iter_rows(source):
            yield source.name, number, row if isinstance(row, Refusal) else _parse(row)


def _parse(row: object) -> ParsedRow | Refusal:
    """A row of any shape; its prompt alone where its responses are missing or cannot be used."""
    parsed = parse_row(row, need_comparisons=False)
    if isinstance(parsed, Refusal) and isinstance(row, Mapping):
        columns = {name: value for name, value in row.items() if name not in _RESPONSE_COLUMNS}
        again = parse_row({**columns, "response": "?"}, need_comparisons=False)
        # the first reason names the real column; the second would speak of the stand-in
        return parsed if isinstance(again, Refusal) and _RESPONSE_COLUMNS & set(row) else again
    return parsed


def _check_bad_rows(source: str, num_rows: int, bad: Sequence[tuple[int, Refusal]]) -> None:
    if num_rows == 0:
        raise DataError(
            f"{source} has no rows; --prompts needs rows with a `prompt` (text or messages)"
        )
    if not bad:
        return
    number, refusal = bad[0]
    text = (
        f"{len(bad)} of {num_rows} rows of {source} have no usable prompt, such as row {number}: "
        f"{refusal.reason}: {refusal.detail}"
    )
    if len(bad) > MAX_BAD_FRACTION * num_rows:
        raise DataError(f"{text}; fix or remove them")
    log.warning("%s; they are left out", text)


def read_candidates(sources: Sequence[str], num: int) -> list[Candidates]:
    """The first `num` distinct responses to each prompt that has several.

    Prompts with fewer than two responses are left out with a warning. Raises DataError when no prompt has
    two, and for files that cannot be read.
    """
    groups = read_preferences(
        sources, max_bad_fraction=MAX_BAD_FRACTION, need_comparisons=False
    ).groups
    usable = [group for group in groups if len(group.responses) > 1]
    if not usable:
        raise DataError(
            f"{', '.join(sources)}: none of {len(groups)} prompts has two responses or more, so there is "
            "nothing to pick from; give rows with `prompt` and `responses`, or let a policy write them "
            "(--prompts with --policy)"
        )
    if len(usable) < len(groups):
        single = [group.id for group in groups if len(group.responses) < 2]
        log.warning(
            "%d of %d prompts have fewer than two responses and are left out, such as %s",
            len(single),
            len(groups),
            single[0],
        )
    copies: dict[str, int] = {}
    candidates = []
    for group in usable:
        copy = copies[group.id] = copies.get(group.id, 0) + 1
        label = group.id if copy == 1 else f"{group.id}~{copy}"
        prompt = replace(group, id=label, comparisons=())
        candidates.append(candidates_of(prompt, group.responses[:num]))
    return candidates


def is_usable_text(text: str) -> bool:
    """Whether a draw can be a candidate: some text that files and tokenizers can hold."""
    try:
        check_text(text, "a response")
    except RefusedError:
        return False
    return bool(text.strip())


def check_num_candidates(num: int) -> None:
    """Raises ConfigError for a number of candidates that leaves nothing to pick."""
    if num < 2:
        raise ConfigError(f"best of n needs 2 candidates or more for each prompt (-n), got {num}")
