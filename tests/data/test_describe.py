"""Descriptions: every number of a small set worked out by hand, and its form as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hafrm.data.describe import Description, count_tokens, describe_data
from hafrm.data.reader import read_preferences as read
from hafrm.preferences import Comparison, Group, TokenizedGroup
from hafrm.results import read_result, write_result

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "four"},
]
P = "one two three"
ROWS: list[dict[str, Any]] = [
    {"prompt": P, "chosen": "a b c", "rejected": "a", "votes": [2, 1], "split": "train"},
    {"prompt": P, "chosen": "a", "rejected": "a b", "votes": [3, 0], "split": "train"},
    {"prompt": "One two  three", "chosen": "x y", "rejected": "z w", "margin": 2.0},
    {"prompt": TURNS, "chosen": "u v w x", "rejected": "u", "tie": True, "extra": 1},
    {"prompt": TURNS, "chosen": "", "rejected": "u"},
]


@dataclass
class Report:
    """A stand-in for an encoder's report."""

    refused: dict[int, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return {"prompts_cut": 3, "dropped": 0}


def tokenized(prompt: int, responses: Sequence[int], pairs: tuple[Comparison, ...]):
    """A group of so many tokens; only lengths matter."""
    return TokenizedGroup(
        np.zeros(prompt, np.int32), tuple(np.zeros(n, np.int32) for n in responses), pairs
    )


def encode(groups: Sequence[Group]) -> tuple[list[TokenizedGroup], Report]:
    """Ten tokens for every prompt, one for each character of a response."""
    return [
        tokenized(10, [len(text) for text in g.responses], g.comparisons) for g in groups
    ], Report()


def test_counts_and_lengths_are_those_worked_out_by_hand() -> None:
    """Decided pairs in words: (3, 1), (1, 2), (2, 2); so 1 longer, 1 shorter. Prompts: 3, 3
    and 2 + 2 + 1 + 1 = 6 words. Distinct responses: 3, 1, 2 | 2, 2 | 4, 1 words, 15 in all."""
    described = describe_data(read([ROWS], max_bad_fraction=0.5))
    bias = described.facts.pop("longer is chosen")
    assert (bias.value, bias.num, str(bias)) == (1 / 2, 2, "50.0 % [9.5, 90.5]")
    counts = {"rows": 5, "bad rows": 1, "groups": 3, "prompts": 2, "responses": 7}
    counts |= {"comparisons": 4, "ties": 1, "with margin": 1, "with votes": 2}
    texts = {"from memory": "4 comparisons", "by split": "train: 2, (none): 2"}
    assert described.facts == counts | texts | {"columns not read": "extra"}
    assert described.bad_rows == {"empty response": 1}
    assert described.lengths == {
        "user turns": (4 / 3, 1, 2, 2),
        "prompt words": (4.0, 3, 6, 6),
        "response words": (15 / 7, 2, 4, 4),
        "chosen words": (2.0, 2, 3, 3),
        "rejected words": (5 / 3, 2, 2, 2),
    }


def test_the_shared_share_counts_prompts_and_responses_once() -> None:
    """P = 10, R = 5, 1, 3 with three pairs: packed 19; paired 3 * 20 + 6 + 8 + 4 = 78. A group without
    comparisons does not count."""
    pairs = (Comparison(0, 1), Comparison(0, 2), Comparison(1, 2))
    groups = [tokenized(10, [5, 1, 3], pairs), tokenized(9, [9], ())]
    assert count_tokens(groups)[1] == 1 - 19 / 78
    assert count_tokens([])[1] == 0.0


def test_a_description_is_shown_as_tables_and_survives_json(tmp_path) -> None:
    """Characters: "a b c", "a", "a b" | "x y", "z w" | "u v w x", "u" are 5, 1, 3, 3, 3, 7, 1 tokens.
    Packed 19 + 16 + 18 = 53; paired (26 + 24) + 26 + 28 = 104: 49 % are saved."""
    described = describe_data(read([ROWS], max_bad_fraction=0.5), encode)
    assert described.lengths["prompt tokens"] == (10.0, 10, 10, 10)
    assert described.lengths["response tokens"] == (23 / 7, 3, 7, 7)
    assert described.lengths["sequence tokens"][-1] == 17
    facts, bad, lengths = ({row[0]: row[1:] for row in t.texts()} for t in described.tables())
    assert facts["longer is chosen"] == ("50.0 % [9.5, 90.5]",)
    assert facts["shared prompts save"] == ("49.0 % of all tokens",)
    assert facts["encoding: prompts cut"] == ("3",) and "encoding: dropped" not in facts
    assert bad == {"empty response": ("1",)}
    assert lengths["prompt words"] == ("4", "3", "6", "6")
    write_result(tmp_path / "d.json", described)
    assert read_result(tmp_path / "d.json", Description) == described


def test_unlabelled_data_is_described_without_comparisons() -> None:
    rows = [{"prompt": "p q", "response": "a b"}]
    described = describe_data(read([rows], need_comparisons=False), encode)
    assert (described.facts["groups"], described.facts["comparisons"]) == (1, 0)
    assert described.lengths["chosen words"] == (0.0, 0, 0, 0)
    assert str(described.facts["longer is chosen"]) == "n/a"
