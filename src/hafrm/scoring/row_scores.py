"""Raw rows -> token ids -> a score for each of a row's responses, or why the row has none.

`encode_rows` needs the tokenizer only and `score_rows` the model, so that one can run ahead of the
other. A row that breaks a rule costs nobody else's score and keeps its place. No file is touched.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hafrm.data.encoding import Encoder
from hafrm.data.parse import parse_row
from hafrm.data.values import Refusal
from hafrm.errors import DataError
from hafrm.preferences import Group, TokenizedGroup
from hafrm.scoring.forward import first_responses
from hafrm.scoring.scorer import RewardModel

RowScores = tuple[float, ...] | Refusal
"""The scores of a row's responses, in the row's order, or why it was not scored."""
PAIR, LIST, SINGLE = ("chosen_reward", "rejected_reward"), ("rewards",), ("reward",)
"""The columns that scores go to, by the shape of the row."""


@dataclass(frozen=True)
class EncodedRows:
    """Rows ready for the model."""

    rows: tuple[tuple[str, ...] | Refusal, ...]
    """The responses of each row in its order, or why it cannot be scored."""
    groups: tuple[TokenizedGroup, ...]
    """One for each row that can be, with its distinct responses."""
    num_cut: int
    """Prompts and responses that were cut to fit."""

    @property
    def num_responses(self) -> int:
        """Distinct responses of all rows: as many scores are computed."""
        return sum(len(group.response_ids) for group in self.groups)


def encode_rows(encoder: Encoder, rows: Sequence[object], numbers: Sequence[int]) -> EncodedRows:
    """The rows as ids; what cannot be read, rendered or fitted becomes a refusal in its place.

    `numbers` are what the rows are called in refusals. Raises ModelError for a chat template that drops
    every response.
    """
    known = [
        row if isinstance(row, Refusal) else parse_row(row, need_comparisons=False) for row in rows
    ]
    groups = [
        Group(f"row {number}", row.prompt, tuple(dict.fromkeys(row.responses)))
        for number, row in zip(numbers, known, strict=True)
        if not isinstance(row, Refusal)
    ]
    encoded, refused, num_cut = _encode(encoder, groups)
    return EncodedRows(
        rows=tuple(
            row if isinstance(row, Refusal) else refused.get(f"row {number}", row.responses)
            for number, row in zip(numbers, known, strict=True)
        ),
        groups=tuple(encoded),
        num_cut=num_cut,
    )


def score_rows(
    model: RewardModel, encoded: EncodedRows, done: Callable[[int, int], None] | None = None
) -> list[RowScores]:
    """What each row gets; `done(responses, tokens)` hears of what has been run.

    Raises NumericsError for a score that is not finite.
    """
    scores = model.score_encoded(encoded.groups, done).tolist()
    first = iter(first_responses(encoded.groups).tolist())
    result: list[RowScores] = []
    for row in encoded.rows:
        if isinstance(row, Refusal):
            result.append(row)
            continue
        start = next(first)
        place = {text: start + k for k, text in enumerate(dict.fromkeys(row))}
        result.append(tuple(scores[place[text]] for text in row))
    return result


def score_columns(row: Mapping[str, Any], scores: RowScores) -> dict[str, Any]:
    """The columns that a row gets, by its shape as the reader sees it; null where it has no score."""
    names = _shape(row)
    if isinstance(scores, Refusal):
        return dict.fromkeys(names)
    return {LIST[0]: list(scores)} if names == LIST else dict(zip(names, scores, strict=True))


def _shape(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return PAIR
    several = row.get("completions") is not None or row.get("responses") is not None
    return LIST if several else SINGLE


def _encode(
    encoder: Encoder, groups: Sequence[Group]
) -> tuple[list[TokenizedGroup], dict[str, Refusal], int]:
    """Groups as ids, refusals by id, and how many prompts and responses were cut.

    The encoder refuses a whole list for one of its groups, so the list is halved until that one is alone.
    """
    try:
        encoded, report = encoder.encode(groups)
    except DataError as error:
        if len(groups) == 1:
            return [], {groups[0].id: Refusal("not encodable", str(error))}, 0
        middle = len(groups) // 2
        left, right = (_encode(encoder, half) for half in (groups[:middle], groups[middle:]))
        return left[0] + right[0], left[1] | right[1], left[2] + right[2]
    kept = {group.id for group in encoded}
    limit = encoder.lengths.max_length
    detail = f"prompt and response have more than {limit:,} tokens, which is the limit"
    refused = {group.id: Refusal("too long", detail) for group in groups if group.id not in kept}
    return encoded, refused, report.prompts_cut + report.responses_cut
