"""Descriptions: every number of a small set worked out by hand, and its form as JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from hafrm.data.describe import Lengths, describe, shared_prefix_share
from hafrm.data.readers import read
from hafrm.preferences import Comparison, Group

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "four"},
]
ROWS: list[dict[str, Any]] = [
    {
        "prompt": "one two three",
        "chosen": "a b c",
        "rejected": "a",
        "votes": [2, 1],
        "split": "train",
    },
    {
        "prompt": "one two three",
        "chosen": "a",
        "rejected": "a b",
        "votes": [3, 0],
        "split": "train",
    },
    {"prompt": "One two  three", "chosen": "x y", "rejected": "z w", "margin": 2.0},
    {"prompt": TURNS, "chosen": "u v w x", "rejected": "u", "tie": True, "extra": 1},
    {"prompt": TURNS, "chosen": "", "rejected": "u"},
]


@dataclass(frozen=True)
class Ids:
    """A stand-in for an encoded group: only lengths matter."""

    prompt_ids: range
    response_ids: tuple[range, ...]
    comparisons: tuple[Comparison, ...]


@dataclass
class Report:
    """A stand-in for an encoder's report."""

    prompts_cut: int = 3


def encode(groups: Sequence[Group]) -> tuple[list[Ids], Report]:
    """Ten tokens for every prompt, one for each character of a response."""
    return [
        Ids(range(10), tuple(range(len(text)) for text in each.responses), each.comparisons)
        for each in groups
    ], Report()


def test_counts_and_lengths_are_those_worked_out_by_hand() -> None:
    """Decided pairs in words: (3, 1), (1, 2), (2, 2); so 1 longer, 1 shorter, 1 equal. Prompts: 3, 3
    and 2 + 2 + 1 + 1 = 6 words. Distinct responses: 3, 1, 2 | 2, 2 | 4, 1 words, 15 in all."""
    known = describe(read([ROWS], max_bad_fraction=0.5))
    assert (known.num_rows, known.bad_rows, known.unread_columns) == (
        5,
        {"empty response": 1},
        ("extra",),
    )
    assert (known.num_groups, known.num_prompts, known.num_responses) == (3, 2, 7)
    assert (known.num_comparisons, known.num_ties) == (4, 1)
    assert (known.num_with_margin, known.num_with_votes, known.num_contested) == (1, 2, 1)
    assert known.sources == {"memory": 4}
    assert known.tags == {"split": {"train": 2, "": 2}}
    assert known.user_turns == Lengths(4 / 3, 1, 2, 2)
    assert known.prompt_words == Lengths(4.0, 3, 6, 6)
    assert known.response_words == Lengths(15 / 7, 2, 4, 4)
    assert known.chosen_words == Lengths(2.0, 2, 3, 3)
    assert known.rejected_words == Lengths(5 / 3, 2, 2, 2)
    bias = known.length_bias
    assert (bias.longer, bias.shorter, bias.equal, bias.share) == (1, 1, 1, 1 / 3)
    assert known.tokens is None


def test_the_interval_is_wilsons() -> None:
    """8 of 10: centre (0.8 + 3.8415/20)/(1 + 0.38415) = 0.71674, half width
    1.959964 sqrt(0.016 + 0.0096036)/1.38415 = 0.22658, so 0.49016 to 0.94332."""
    rows = [
        {"prompt": f"p{i}", "chosen": "a b" if i < 8 else "a", "rejected": "c" if i < 8 else "c d"}
        for i in range(10)
    ]
    bias = describe(read([rows])).length_bias
    assert bias.share == 0.8
    assert (bias.low, bias.high) == pytest.approx((0.49016, 0.94332), abs=2e-5)


def test_the_shared_share_counts_prompts_and_responses_once() -> None:
    """P = 10, R = 5, 1, 3 with three pairs: packed 19; paired 3 * 20 + 6 + 8 + 4 = 78. A group without
    comparisons does not count."""
    pairs = (Comparison(0, 1), Comparison(0, 2), Comparison(1, 2))
    groups = [Ids(range(10), (range(5), range(1), range(3)), pairs), Ids(range(9), (range(9),), ())]
    assert shared_prefix_share(groups) == (19, 78, 1 - 19 / 78)
    assert shared_prefix_share([]) == (0, 0, 0.0)


def test_token_statistics_come_from_the_encoder() -> None:
    """Characters: "a b c", "a", "a b" | "x y", "z w" | "u v w x", "u" are 5, 1, 3, 3, 3, 7, 1 tokens.
    Packed 19 + 16 + 18 = 53; paired (26 + 24) + 26 + 28 = 104."""
    tokens = describe(read([ROWS], max_bad_fraction=0.5), encode).tokens
    assert tokens is not None
    assert tokens.prompt == Lengths(10.0, 10, 10, 10)
    assert tokens.response == Lengths(23 / 7, 3, 7, 7)
    assert tokens.sequence.max == 17
    assert (tokens.num_packed, tokens.num_paired) == (53, 104)
    assert tokens.shared == pytest.approx(51 / 104)
    assert tokens.encoding == {"prompts_cut": 3}


def test_a_description_survives_json() -> None:
    plain = describe(read([ROWS], max_bad_fraction=0.5), encode).to_dict()
    again = json.loads(json.dumps(plain))
    assert again["prompt_words"] == {"mean": 4.0, "p50": 3, "p95": 6, "max": 6}
    assert again["tokens"]["num_packed"] == 53


def test_unlabelled_data_is_described_without_comparisons() -> None:
    rows = [{"prompt": "p q", "response": "a b"}]
    known = describe(read([rows], need_comparisons=False), encode)
    assert (known.num_groups, known.num_comparisons) == (1, 0)
    assert known.chosen_words == Lengths(0.0, 0, 0, 0)
    assert (known.length_bias.low, known.length_bias.high) == (0.0, 1.0)
    assert known.tokens is not None and known.tokens.shared == 0.0
