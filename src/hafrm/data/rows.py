"""One raw row of a preference file -> prompt, responses and comparisons, or why it was refused.

The understood shapes are listed in `SHAPES`. Nothing is repaired: a row that breaks a rule is
refused with the first rule that it breaks. Duplicates are found by the reader, which sees more
than one row. Nothing here reads a file. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from hafrm.data.dialogues import Prompt, check_prompt, join, read_prompt, split_texts
from hafrm.data.values import (
    MAX_CHARS,
    Refusal,
    RefusedError,
    as_label,
    as_list,
    as_margin,
    as_number,
    as_tie,
    as_votes,
    as_weight,
    check_text,
    refuse,
    show,
)
from hafrm.preferences import Comparison

SHAPES = (
    "prompt, chosen, rejected: text or messages",
    "chosen, rejected: whole dialogues, as messages or as \\n\\nHuman: ... \\n\\nAssistant: ... text",
    "prompt, responses, and ranks or ranking (low is good) or scores or ratings (high is good)",
    "context, completions: [{rank, completion}, ...] (low is good)",
    "prompt, and response or responses: unlabelled, to be scored but not trained on",
    "prompt: alone, for a model to respond to",
)
TAGS = ("split", "subset", "source", "label")
"""Columns that become a group's tags."""
COLUMNS = frozenset(
    {
        *("prompt", "context", "chosen", "rejected", "response", "responses", "completions"),
        *("ranks", "ranking", "scores", "ratings", "margin", "weight", "votes", "tie", "id"),
        *TAGS,
    }
)
"""Every column that some shape understands; others are not looked at."""
MAX_RANKED = 256
"""Most responses that one row may rank: k of them make k(k-1)/2 comparisons."""

_ORDERS = {"ranks": -1, "ranking": -1, "scores": 1, "ratings": 1}  # sign that makes high good

Row = Mapping[Any, Any]
Parts = tuple[Prompt, tuple[str, ...], tuple[Comparison, ...]]


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """What one row says; its responses are in the row's order and may repeat."""

    prompt: Prompt
    responses: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()
    id: str = ""
    tags: dict[str, str] = field(default_factory=dict)


def parse_row(
    row: object,
    *,
    need_comparisons: bool = True,
    need_responses: bool = True,
    max_chars: int = MAX_CHARS,
) -> ParsedRow | Refusal:
    """What the row says, or the first rule that it breaks.

    A tie is `tie: true` or `label: "tie"` beside chosen and rejected, or an equal rank or score.
    Optional are `margin` (finite, in reward units), `weight` (finite, not negative) and, for a
    pair, `votes`. Rated rows have margin 0 unless they give a number, or `margin: "difference"`
    for the difference of the two scores. With `need_comparisons=False` rows without labels are
    understood too, with `need_responses=False` those with a prompt alone. `max_chars` bounds the prompt
    and each response.
    """
    try:
        if not isinstance(row, Mapping):
            refuse("unreadable row", f"expected an object with named columns, got {show(row)}")
        prompt, responses, comparisons = _read_shape(row, need_responses)
        check_prompt(prompt, max_chars)
        for response in responses:
            check_text(response, "a response", max_chars)
        if need_comparisons and not comparisons:
            refuse("missing column", "nothing to compare: no two responses with a label")
        name = "" if row.get("id") is None else as_label(row["id"], "id")
        tags = {tag: as_label(row[tag], tag) for tag in TAGS if row.get(tag) is not None}
        return ParsedRow(prompt, responses, comparisons, name, tags)
    except RefusedError as refused:
        return refused.refusal


def _read_shape(row: Row, need_responses: bool) -> Parts:
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return _read_pair(row)
    if row.get("completions") is not None:
        return _read_completions(row)
    if row.get("responses") is not None:
        return _read_responses(row)
    if row.get("response") is None and not need_responses and row.get("prompt") is not None:
        return read_prompt(row["prompt"], "prompt"), (), ()
    if row.get("response") is None:
        columns = show([str(column)[:40] for column in row])
        refuse("missing column", f"no responses that could be compared; columns: {columns}")
    prompt = read_prompt(row.get("prompt"), "prompt")
    return *join(prompt, [("response", row["response"])]), ()


def _read_pair(row: Row) -> Parts:
    for column in ("chosen", "rejected"):
        if column not in row:
            refuse("missing column", f"no `{column}`")
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = read_prompt(row.get("prompt"), "prompt")
    if row.get("prompt") is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = split_texts(chosen, rejected)
    prompt, texts = join(prompt, [("chosen", chosen), ("rejected", rejected)])
    if texts[0].strip() == texts[1].strip():
        refuse("chosen equals rejected", show(texts[0]))
    comparison = Comparison(
        chosen=0,
        rejected=1,
        margin=as_margin(row.get("margin")),
        weight=as_weight(row.get("weight")),
        tie=as_tie(row.get("tie"), row.get("label")),
        votes=as_votes(row.get("votes")),
    )
    return prompt, texts, (comparison,)


def _read_completions(row: Row) -> Parts:
    items = as_list(row["completions"], "completions")
    for item in items:
        if not isinstance(item, Mapping) or not {"rank", "completion"} <= item.keys():
            refuse("missing column", f"a completion needs rank and completion, got {show(item)}")
    column = "prompt" if row.get("context") is None else "context"
    prompt, texts = _join_list(row, column, [item["completion"] for item in items])
    ranks = [as_number(item["rank"], "rank") for item in items]
    return prompt, texts, _compare_all(row, texts, [-rank for rank in ranks], rated=False)


def _read_responses(row: Row) -> Parts:
    prompt, texts = _join_list(row, "prompt", as_list(row["responses"], "responses"))
    orders = [column for column in _ORDERS if row.get(column) is not None]
    if not orders:
        return prompt, texts, ()
    if len(orders) > 1:
        refuse("bad number", f"both {orders[0]} and {orders[1]} are given; keep one of them")
    column = orders[0]
    values = as_list(row[column], column)
    if len(values) != len(texts):
        refuse("bad number", f"{len(texts)} responses, but {len(values)} {column}")
    goodness = [_ORDERS[column] * as_number(value, column) for value in values]
    return prompt, texts, _compare_all(row, texts, goodness, rated=_ORDERS[column] > 0)


def _join_list(row: Row, column: str, responses: list[Any]) -> tuple[Prompt, tuple[str, ...]]:
    if not responses:
        refuse("missing column", "the list of responses is empty")
    prompt = read_prompt(row.get(column), column)
    return join(prompt, [(f"response {index}", value) for index, value in enumerate(responses)])


def _compare_all(
    row: Row, texts: tuple[str, ...], goodness: list[float], *, rated: bool
) -> tuple[Comparison, ...]:
    """Every pair of responses; equal values tie, and a text is not compared with itself."""
    if len(texts) > MAX_RANKED:
        refuse("too long", f"{len(texts)} labelled responses, at most {MAX_RANKED} are compared")
    if row.get("votes") is not None:
        refuse("bad number", "`votes` belong to one pair, not to a list of responses")
    by_difference = rated and row.get("margin") == "difference"
    margin = 0.0 if by_difference else as_margin(row.get("margin"))
    weight, comparisons = as_weight(row.get("weight")), []
    for i, j in combinations(range(len(texts)), 2):
        gap = goodness[i] - goodness[j]
        if texts[i].strip() == texts[j].strip():
            if gap:
                refuse("chosen equals rejected", f"one text, two ranks or scores: {show(texts[i])}")
        elif gap == 0:
            comparisons.append(Comparison(i, j, weight=weight, tie=True))
        else:
            asked = as_number(abs(gap), "margin", "non-finite margin") if by_difference else margin
            best, worst = (i, j) if gap > 0 else (j, i)
            comparisons.append(Comparison(best, worst, margin=asked, weight=weight))
    return tuple(comparisons)
