"""Style features counted by hand, and their bias against a loop."""

import numpy as np
import pytest

from hafrm.evaluation.diagnostics.style import FEATURES, style_bias, style_biases

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
    in 0, 1 and 3, so it prefers the one with more in 0, 1 and 4 (wrong there): 3 of 5, as people do in 0,
    1, 2. Right are 2 of 3 with more, 1 of 2 with less."""
    margins = np.array([1.0, 2.0, -1.0, 0.5, -2.0, 3.0])
    more = np.array([1, 4, 2, -1, -3, 0])
    found = style_bias("f", margins, more, np.arange(6))
    assert found.num == 5
    assert found.picks_more.value == 3 / 5
    assert found.people_pick_more.value == 3 / 5
    assert found.excess.value == pytest.approx(0.0)
    assert found.accuracy_more.value == 2 / 3
    assert found.accuracy_less.value == 1 / 2


def test_equal_scores_prefer_neither_response() -> None:
    found = style_bias("f", np.zeros(2), np.array([1, -1]), np.arange(2))
    assert found.picks_more.value == 0.0
    assert found.accuracy_less.value == 0.0


def test_a_model_that_takes_the_longer_one_has_all_of_the_excess() -> None:
    """Lengths 3 against 1 and 1 against 3, always the longer one: 100 % where people have 50 %."""
    texts = (["aaa", "b", "ccc", "d"], ["a", "bbb", "c", "ddd"])
    margins = np.array([1.0, -1.0, 1.0, -1.0])
    found = {each.feature: each for each in style_biases(margins, *texts, np.arange(4))}
    assert list(found) == list(FEATURES)
    assert found["length"].picks_more.value == 1.0
    assert found["length"].excess.value == 0.5
    assert (found["length"].accuracy_more.value, found["length"].accuracy_less.value) == (1.0, 0.0)
    assert found["headers"].num == 0
    assert found["headers"].to_dict()["picks_more"]["value"] is None
