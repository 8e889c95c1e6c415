"""Disagreement, split votes and the comparisons to read, by hand."""

import math

import numpy as np
import pytest

from hafrm.diagnostics.breakdown import (
    audit_labels,
    disagreement,
    mean_margin,
    worst_errors,
)
from hafrm.evaluation.comparisons import Comparisons
from hafrm.preferences import Comparison, Group, Message, Votes


def group(name: str, votes: Votes | None = None) -> Group:
    prompt = (Message("user", f"prompt {name}"),)
    return Group(name, prompt, ("r", "c"), (Comparison(1, 0, votes=votes),), source=name[0])


def voted(*votes: Votes | None) -> Comparisons:
    return Comparisons.of([group(name, v) for name, v in zip("abcdef", votes, strict=False)])


def test_disagreement_is_the_fraction_in_the_minority_and_ignores_the_label() -> None:
    """Four models: all for chosen, three to one, two to two, one to three, all against, and two with one
    equal: 2.5 to 1.5."""
    signs = [
        [1, 1, 1, -1, -1, 1],
        [1, 1, 1, -1, -1, 0],
        [1, 1, -1, -1, -1, 1],
        [1, -1, -1, 1, -1, -1],
    ]
    margins = np.array(signs, float)
    assert disagreement(margins).tolist() == [0, 0.25, 0.5, 0.25, 0, 0.375]
    assert disagreement(-margins).tolist() == disagreement(margins).tolist()


def test_the_mean_margin_counts_every_model_alike() -> None:
    """Root mean squares 1 and 100: margins (1, -1) and (100, 100) mean (1, 0)."""
    assert mean_margin(np.array([[1.0, -1.0], [100.0, 100.0]])).tolist() == [1.0, 0.0]
    assert mean_margin(np.zeros((2, 3))).tolist() == [0.0, 0.0, 0.0]


@pytest.fixture
def noise():
    """Two models, six comparisons. They agree on the first four (right, right, wrong, wrong) and not on the
    last two. Votes: unanimous, unanimous, split, unknown, split (a tie among them), split."""
    margins = np.array([[3.0, 3, -1, -2, 1, -1], [3.0, 3, -1, -2, -1, 1]])
    votes = (Votes(5, 0), Votes(3, 0), Votes(3, 2), None, Votes(2, 0, 2), Votes(4, 1))
    return audit_labels(voted(*votes), margins, ["m", "n"])


def test_the_levels_of_disagreement_by_hand(noise) -> None:
    """Level 0: four comparisons, two right, one of three with votes split; level 1/2: two, both split."""
    agree, differ = noise.by_disagreement
    assert (agree.disagreement, agree.num, agree.accuracy.value) == (0.0, 4, 0.5)
    assert (agree.split.value, agree.split.num) == (pytest.approx(1 / 3), 3)
    assert (differ.disagreement, differ.num, differ.split.value) == (0.5, 2, 1.0)


def test_what_all_models_are_against_by_hand(noise) -> None:
    """Comparisons 2 and 3 of six; of these one has votes, and is split; of the other four, two are."""
    assert noise.against.value == pytest.approx(2 / 6)
    assert (noise.split_against.value, noise.split_against.num) == (1.0, 1)
    assert (noise.split_others.value, noise.split_others.num) == (0.5, 4)
    assert noise.num_with_votes == 5


def test_without_votes_several_models_are_audited_and_a_single_one_is_not() -> None:
    margins = np.array([[3.0, -1.0], [3.0, 1.0]])
    got = audit_labels(voted(None, None), margins, ["m", "n"])
    assert got.num_with_votes == 0
    assert all(math.isnan(band.split.value) for band in got.by_disagreement)
    assert got.by_disagreement[1].disagreement == 0.5
    assert audit_labels(voted(None, None), margins[:1], ["m"]) is None
    single = audit_labels(voted(Votes(5, 0), Votes(3, 2)), margins[:1], ["m"])
    assert (single.by_disagreement, single.num_with_votes) == ((), 2)


def test_examples_are_the_clearest_mistakes_each_rejected_response_once() -> None:
    """Margins -1, -3, -2, 1; the second and third differ in nothing but the chosen response."""
    prompt, pairs = (Message("user", "prompt"),), (Comparison(0, 2), Comparison(1, 2))
    many = Group("m", prompt, ("good", "better", "bad"), pairs, source="m")
    comparisons = Comparisons.of([group("v", Votes(2, 1, 0)), many, group("w")])
    got = worst_errors(comparisons, np.array([[-1.0, -3.0, -2.0, 1.0]]))
    shown = [(example.set, example.margin, example.chosen, example.votes) for example in got]
    assert shown == [("m", -3.0, "good", None), ("v", -1.0, "c", (2, 1, 0))]


def test_errors_that_all_models_make_come_first() -> None:
    """Margins of four comparisons by two models, which divide them by 1 and 2: the first gets a, b and d
    wrong; both get a and d wrong, d by 1.3 on average and a by 0.9."""
    margins = np.array([[-1.2, -1.1, 0.9, -0.7], [-1.0, 1.0, -1.0, -3.6055]])
    assert np.sqrt((margins**2).mean(1)) == pytest.approx([0.9937, 2.0], abs=1e-3)
    got = worst_errors(voted(None, None, None, None), margins, num=3)
    assert [(example.set, example.num_against) for example in got] == [("d", 2), ("a", 2), ("b", 1)]
