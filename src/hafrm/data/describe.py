"""What is in preference data, in numbers: sizes, lengths, length bias, and what sharing prompts saves.

Pure arithmetic over a `Reading` (and, when an encoder is given, over its token ids); nothing is
read, written or printed here. Lengths are in words, split at white space, until there are tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import asdict, dataclass, is_dataclass
from math import ceil
from typing import Any, Protocol, runtime_checkable

from hafrm.data.mixing import normalised_key
from hafrm.data.readers import Reading
from hafrm.preferences import Comparison, Group
from hafrm.statistics import wilson


@runtime_checkable
class Encoded(Protocol):
    """What is asked of an encoded group."""

    @property
    def prompt_ids(self) -> Sized:
        """Token ids of the prompt."""

    @property
    def response_ids(self) -> Sequence[Sized]:
        """Token ids of each response."""

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Comparisons among the responses."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean, median, 95th percentile (nearest rank) and maximum; all 0 when there is nothing."""

    mean: float
    p50: int
    p95: int
    max: int


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How often the longer response was chosen; ties are left out."""

    longer: int
    shorter: int
    equal: int
    share: float
    """longer / all three, with its Wilson 95 % interval."""
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """The same data as a model sees it."""

    prompt: Lengths
    response: Lengths
    sequence: Lengths
    """A prompt with one of its responses."""
    num_packed: int
    """Tokens of the groups that have comparisons, each prompt and distinct response once."""
    num_paired: int
    """Tokens of the same comparisons as two separate sequences each."""
    shared: float
    """1 - packed / paired: the share of tokens that need not be computed."""
    encoding: dict[str, Any]
    """The encoder's counts: what it cut, dropped or neutralised."""


@dataclass(frozen=True, slots=True)
class Description:
    """Everything that `hafrm data` shows."""

    num_rows: int
    bad_rows: dict[str, int]
    left_out: dict[str, int]
    """Rows of named sets that these do not use, by reason."""
    num_repeated: int
    unread_columns: tuple[str, ...]
    num_groups: int
    num_prompts: int
    """Distinct but for case and white space."""
    num_responses: int
    """Distinct within their groups."""
    num_comparisons: int
    num_ties: int
    num_with_margin: int
    num_with_votes: int
    num_contested: int
    """Comparisons with votes for more than one outcome."""
    sources: dict[str, int]
    """Comparisons of each source."""
    tags: dict[str, dict[str, int]]
    """Comparisons by tag (split, subset, ...) and value; "" are those of groups without the tag."""
    user_turns: Lengths
    """Of each group's prompt."""
    prompt_words: Lengths
    """Of each group's prompt."""
    response_words: Lengths
    """Of each distinct response."""
    chosen_words: Lengths
    """Of the chosen side of each comparison that is no tie."""
    rejected_words: Lengths
    length_bias: LengthBias
    tokens: Tokens | None

    def to_dict(self) -> dict[str, Any]:
        """The description as plain values, ready for JSON."""
        return asdict(self)


def describe(
    reading: Reading,
    encode: Callable[[Sequence[Group]], tuple[Sequence[Encoded], Any]] | None = None,
) -> Description:
    """Count and measure a reading; `encode` (an `Encoder.encode`) adds what tokens tell."""
    groups = reading.groups
    pairs = [(group, pair) for group in groups for pair in group.comparisons]
    votes = [pair.votes for _, pair in pairs if pair.votes is not None]
    sides = [sides for group in groups for sides in _decided_words(group)]
    words = [_words(text) for group in groups for text in group.responses]
    return Description(
        num_rows=reading.num_rows,
        bad_rows=dict(Counter(row.reason for row in reading.bad).most_common()),
        left_out=reading.left_out,
        num_repeated=reading.num_repeated,
        unread_columns=reading.unread_columns,
        num_groups=len(groups),
        num_prompts=len({normalised_key(group.prompt) for group in groups}),
        num_responses=sum(len(group.responses) for group in groups),
        num_comparisons=len(pairs),
        num_ties=sum(pair.tie for _, pair in pairs),
        num_with_margin=sum(pair.margin != 0 for _, pair in pairs),
        num_with_votes=len(votes),
        num_contested=sum(sum(count > 0 for count in vote) > 1 for vote in votes),
        sources=_comparisons_by(groups, [group.source for group in groups]),
        tags=_comparisons_by_tag(groups),
        user_turns=_lengths(sum(m.role == "user" for m in group.prompt) for group in groups),
        prompt_words=_lengths(sum(_words(m.content) for m in group.prompt) for group in groups),
        response_words=_lengths(words),
        chosen_words=_lengths(chosen for chosen, _ in sides),
        rejected_words=_lengths(rejected for _, rejected in sides),
        length_bias=_length_bias(sides),
        tokens=None if encode is None else _tokens(*encode(groups)),
    )


def shared_prefix_share(groups: Iterable[Encoded]) -> tuple[int, int, float]:
    """(tokens with sharing, tokens as separate pairs, share saved) of groups with comparisons.

    1 - sum over groups of (P + sum of R) / sum over comparisons of (2 P + C + R); every response of
    the group counts on the left, compared or not.
    """
    packed = paired = 0
    for group in groups:
        sizes, prompt = [len(ids) for ids in group.response_ids], len(group.prompt_ids)
        if group.comparisons:
            packed += prompt + sum(sizes)
        for pair in group.comparisons:
            paired += 2 * prompt + sizes[pair.chosen] + sizes[pair.rejected]
    return packed, paired, 1 - packed / paired if paired else 0.0


def _tokens(groups: Sequence[Encoded], report: Any) -> Tokens:
    packed, paired, shared = shared_prefix_share(groups)
    return Tokens(
        prompt=_lengths(len(group.prompt_ids) for group in groups),
        response=_lengths(len(ids) for group in groups for ids in group.response_ids),
        sequence=_lengths(
            len(group.prompt_ids) + len(ids) for group in groups for ids in group.response_ids
        ),
        num_packed=packed,
        num_paired=paired,
        shared=shared,
        encoding=asdict(report) if is_dataclass(report) and not isinstance(report, type) else {},
    )


def _words(text: str) -> int:
    return len(text.split())


def _decided_words(group: Group) -> list[tuple[int, int]]:
    """(chosen, rejected) words of the comparisons that are no ties."""
    words = [_words(text) for text in group.responses]
    return [(words[p.chosen], words[p.rejected]) for p in group.comparisons if not p.tie]


def _comparisons_by(groups: Sequence[Group], names: Iterable[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for group, name in zip(groups, names, strict=True):
        counts[name] += len(group.comparisons)
    return dict(counts)


def _comparisons_by_tag(groups: Sequence[Group]) -> dict[str, dict[str, int]]:
    tags = sorted({tag for group in groups for tag in group.tags})
    return {tag: _comparisons_by(groups, [g.tags.get(tag, "") for g in groups]) for tag in tags}


def _lengths(values: Iterable[int]) -> Lengths:
    ordered = sorted(values)
    if not ordered:
        return Lengths(0.0, 0, 0, 0)
    p50, p95 = (ordered[ceil(share * len(ordered)) - 1] for share in (0.50, 0.95))
    return Lengths(sum(ordered) / len(ordered), p50, p95, ordered[-1])


def _length_bias(sides: Sequence[tuple[int, int]]) -> LengthBias:
    longer = sum(chosen > rejected for chosen, rejected in sides)
    shorter = sum(chosen < rejected for chosen, rejected in sides)
    share = longer / len(sides) if sides else 0.0
    low, high = wilson(share, len(sides))
    return LengthBias(longer, shorter, len(sides) - longer - shorter, share, low, high)
