"""Style features and slices counted by hand."""

import math

import numpy as np
import pytest

from hafrm.diagnostics.breakdown import (
    FEATURES,
    MAX_VALUES,
    bands,
    in_order,
    slice_accuracies,
    style_bias,
    style_biases,
    vote_label,
)
from hafrm.preferences import Votes

TEXT = """# Title
Some **bold words** and **more**, 2 * 3 ** 4.

- one
* two
  3. three
10) ten
-not an item

```python
# a comment, which looks like a header
```
I’m sorry, but I can't! Can you? Really?
"""


@pytest.mark.parametrize(
    ("feature", "count"),
    [
        ("length", len(TEXT)),
        ("list items", 4),
        ("headers", 2),  # inside code it still looks like one
        ("bold spans", 2),
        ("code blocks", 1),
        ("digits", 6),
        ("questions", 2),
        ("exclamations", 1),
        ("refusals", 2),
    ],
)
def test_features_are_counted(feature: str, count: int) -> None:
    """Digits: 2, 3, 4, 3 and 1, 0; refusals: "I'm sorry, but" (curly) and "I can't"."""
    assert FEATURES[feature](TEXT) == count


def test_a_plain_text_has_length_only() -> None:
    found = {name: count("It is dark here") for name, count in FEATURES.items()}
    assert found.pop("length") == 15
    assert set(found.values()) == {0}


def test_a_code_block_that_is_never_closed_counts() -> None:
    assert FEATURES["code blocks"]("```\nx\n```\n~~~\ny") == 2


def test_the_bias_of_a_feature_by_hand() -> None:
    """The chosen response has more in rows 0, 1, 2 and less in 3, 4; row 5 says nothing. The model is right
    in 0, 1 and 3, so it prefers the one with more in 0, 1 and 4 (wrong there): 3 of 5, as annotators do in
    0, 1, 2. Right are 2 of 3 with more, 1 of 2 with less."""
    margins = np.array([1.0, 2.0, -1.0, 0.5, -2.0, 3.0])
    more = np.array([1, 4, 2, -1, -3, 0])
    found = style_bias("f", margins, more, np.arange(6))
    assert found.num == 5
    assert found.picks_more.value == 3 / 5
    assert found.annotators_pick_more.value == 3 / 5
    assert found.excess.value == pytest.approx(0.0)
    assert found.accuracy_more.value == 2 / 3
    assert found.accuracy_less.value == 1 / 2


def test_equal_scores_prefer_neither_response() -> None:
    found = style_bias("f", np.zeros(2), np.array([1, -1]), np.arange(2))
    assert found.picks_more.value == 0.0
    assert found.accuracy_less.value == 0.0


def test_a_model_that_takes_the_longer_one_has_all_of_the_excess() -> None:
    """Lengths 3 against 1 and 1 against 3, always the longer one: 100 % where annotators have 50 %."""
    texts = (["aaa", "b", "ccc", "d"], ["a", "bbb", "c", "ddd"])
    margins = np.array([1.0, -1.0, 1.0, -1.0])
    found = {each.feature: each for each in style_biases(margins, *texts, np.arange(4))}
    assert list(found) == list(FEATURES)
    assert found["length"].picks_more.value == 1.0
    assert found["length"].excess.value == 0.5
    assert (found["length"].accuracy_more.value, found["length"].accuracy_less.value) == (1.0, 0.0)
    assert found["headers"].num == 0
    assert math.isnan(found["headers"].picks_more.value)


def test_few_numbers_are_bands_of_their_own_and_many_become_quarters() -> None:
    """1 to 8: the quarters end at 2, 4, 6, 8."""
    assert bands(np.array([3, 1, 3])) == ["3", "1", "3"]
    assert bands(np.array([0.5, 2.0]), "points") == ["0.5 points", "2 points"]
    assert bands(np.arange(1, 9)) == [f"{k} to {k + 1}" for k in (1, 3, 5, 7) for _ in range(2)]


def test_equal_numbers_are_never_torn_apart() -> None:
    """Six of ten are 7: the first two quarters both end there and are one."""
    labels = bands(np.array([1, 7, 7, 7, 7, 7, 7, 8, 9, 10, 11, 12]))
    assert labels == ["1 to 7"] * 7 + ["8 to 9"] * 2 + ["10 to 12"] * 3


def test_labels_stand_in_the_order_of_their_numbers_then_by_name() -> None:
    assert in_order(["b", "10 to 12", "9", "-1", "a", "40 % of votes"]) == [
        *("-1", "9", "10 to 12", "40 % of votes", "a", "b")
    ]


def test_votes_name_the_chosen_share() -> None:
    assert vote_label(Votes(3, 1, 1)) == "60 % of votes"
    assert vote_label(Votes(2, 1)) == "67 % of votes"
    assert vote_label(None) == vote_label(Votes(0, 0)) == "no votes"


def test_each_label_gets_its_accuracy_and_a_division_with_one_label_is_left_out() -> None:
    """Label a holds margins 1, -1, b holds 2."""
    divisions = {"kind": ["a", "a", "b"], "same": ["x", "x", "x"]}
    found = slice_accuracies(np.array([1.0, -1.0, 2.0]), divisions, np.arange(3))
    shown = [(s.tag, s.value, s.accuracy.value, s.accuracy.num) for s in found]
    assert shown == [("kind", "a", 0.5, 2), ("kind", "b", 1.0, 1)]


def test_rare_labels_are_put_together() -> None:
    """30 labels of which the first is common: 23 stay, 7 become one."""
    labels = ["common"] * 3 + [f"rare {k}" for k in range(29)]
    found = slice_accuracies(np.ones(32), {"t": labels}, np.arange(32))
    assert len(found) == MAX_VALUES
    assert {s.value: s.accuracy.num for s in found}["(7 others)"] == 7


@pytest.mark.parametrize("prompts", [np.arange(4), np.array([0, 0, 1, 1])])
def test_slices_know_about_prompts(prompts) -> None:
    found = slice_accuracies(np.array([1.0, -1, 1, 1]), {"t": ["a", "a", "a", "b"]}, prompts)
    assert found[0].accuracy.method == ("wilson" if len(set(prompts)) == 4 else "cluster-bootstrap")
