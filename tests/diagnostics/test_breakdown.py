"""Style features and slices counted by hand."""

import math

import numpy as np
import pytest

from hafrm.diagnostics.breakdown import (
    FEATURES,
    MAX_VALUES,
    bands,
    divisions_of,
    slice_accuracies,
    style_bias,
    style_biases,
)
from hafrm.evaluation.comparisons import Comparisons
from hafrm.preferences import Comparison, Group, Message, Votes

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
COUNTS = {
    "length": len(TEXT),
    "list items": 4,
    "headers": 2,  # inside code it still looks like one
    "bold spans": 2,
    "code blocks": 1,
    "digits": 6,
    "questions": 2,
    "exclamations": 1,
    "refusals": 2,  # "I'm sorry, but" (curly) and "I can't"
}


def test_features_are_counted() -> None:
    assert {name: count(TEXT) for name, count in FEATURES.items()} == COUNTS
    plain = {name: count("It is dark here") for name, count in FEATURES.items()}
    assert plain == dict.fromkeys(FEATURES, 0) | {"length": 15}
    assert FEATURES["code blocks"]("```\nx\n```\n~~~\ny") == 2  # one is never closed


def test_the_bias_of_a_feature_by_hand() -> None:
    """The chosen response has more in rows 0, 1, 2 and less in 3, 4; row 5 says nothing. The model is right
    in 0, 1 and 3, so it prefers the one with more in 0, 1 and 4 (wrong there): 3 of 5, as annotators do in
    0, 1, 2. Right are 2 of 3 with more, 1 of 2 with less."""
    margins = np.array([1.0, 2.0, -1.0, 0.5, -2.0, 3.0])
    got = style_bias("f", margins, np.array([1, 4, 2, -1, -3, 0]), np.arange(6))
    assert got.num == 5
    assert got.picks_more.value == got.annotators_pick_more.value == 3 / 5
    assert got.excess.value == pytest.approx(0.0)
    assert (got.accuracy_more.value, got.accuracy_less.value) == (2 / 3, 1 / 2)
    equal = style_bias("f", np.zeros(2), np.array([1, -1]), np.arange(2))
    assert equal.picks_more.value == equal.accuracy_less.value == 0.0


def test_a_model_that_takes_the_longer_one_has_all_of_the_excess() -> None:
    """Lengths 3 against 1 and 1 against 3, always the longer one: 100 % where annotators have 50 %."""
    texts = (["aaa", "b", "ccc", "d"], ["a", "bbb", "c", "ddd"])
    biases = style_biases(np.array([1.0, -1.0, 1.0, -1.0]), *texts, np.arange(4))
    got = {bias.feature: bias for bias in biases}
    assert list(got) == list(FEATURES)
    length = got["length"]
    assert (length.picks_more.value, length.excess.value) == (1.0, 0.5)
    assert (length.accuracy_more.value, length.accuracy_less.value) == (1.0, 0.0)
    assert got["headers"].num == 0
    assert math.isnan(got["headers"].picks_more.value)


def test_few_numbers_are_bands_of_their_own_and_many_become_quarters() -> None:
    """1 to 8: the quarters end at 2, 4, 6, 8. Of twelve numbers, six are 7: two quarters are one."""
    assert bands(np.array([3, 1, 3])) == ["3", "1", "3"]
    assert bands(np.array([0.5, 2.0]), " points") == ["0.5 points", "2 points"]
    assert bands(np.arange(1, 9)) == [f"{k} to {k + 1}" for k in (1, 3, 5, 7) for _ in range(2)]
    labels = bands(np.array([1, 7, 7, 7, 7, 7, 7, 8, 9, 10, 11, 12]))
    assert labels == ["1 to 7"] * 7 + ["8 to 9"] * 2 + ["10 to 12"] * 3


def test_votes_name_the_fraction_for_the_chosen_response() -> None:
    votes = (Votes(3, 1, 1), Votes(2, 1), None, Votes(0, 0))
    pairs = tuple(Comparison(0, 1, votes=v) for v in votes)
    group = Group("g", (Message("user", "hi"),), ("a", "b"), pairs)
    labels = divisions_of(Comparisons.of([group]))["votes"]
    assert labels == ["60 % of votes", "67 % of votes", "no votes", "no votes"]


def test_each_label_gets_its_accuracy_in_the_order_of_numbers_then_names() -> None:
    """Label a holds margins 1, -1, b holds 2; a division with one label is left out."""
    divisions = {"kind": ["a", "a", "b"], "same": ["x", "x", "x"]}
    got = slice_accuracies(np.array([1.0, -1.0, 2.0]), divisions, np.arange(3))
    shown = [(s.tag, s.value, s.accuracy.value, s.accuracy.num) for s in got]
    assert shown == [("kind", "a", 0.5, 2), ("kind", "b", 1.0, 1)]
    labels = ["b", "10 to 12", "9", "-1", "a", "40 % of votes"]
    ordered = slice_accuracies(np.ones(6), {"t": labels}, np.arange(6))
    assert [s.value for s in ordered] == ["-1", "9", "10 to 12", "40 % of votes", "a", "b"]


def test_rare_labels_are_put_together() -> None:
    """30 labels of which the first is common: 23 stay, 7 become one."""
    labels = ["common"] * 3 + [f"rare {k}" for k in range(29)]
    got = slice_accuracies(np.ones(32), {"t": labels}, np.arange(32))
    assert len(got) == MAX_VALUES
    assert {s.value: s.accuracy.num for s in got}["(7 others)"] == 7
