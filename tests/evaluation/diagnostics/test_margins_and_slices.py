"""Histograms and slices, counted by hand."""

import numpy as np
import pytest

from hafrm.evaluation.diagnostics.margins import margin_histogram
from hafrm.evaluation.diagnostics.slices import (
    MAX_VALUES,
    bands,
    in_order,
    slice_accuracies,
    vote_label,
)
from hafrm.preferences import Votes


def test_right_and_wrong_share_their_edges_and_equal_scores_are_wrong() -> None:
    """|margins| 0.1, 0.1, 0, 1, 0.6 in two bins from 0 to 1: the first holds three, one of them right."""
    found = margin_histogram(np.array([0.1, -0.1, 0.0, 1.0, -0.6]), num_bins=2)
    assert found.edges == (0.0, 0.5, 1.0)
    assert (found.right, found.wrong) == ((1, 1), (2, 1))


def test_every_comparison_is_in_one_bin() -> None:
    margins = np.random.default_rng(0).normal(size=1000)
    found = margin_histogram(margins)
    assert sum(found.right) == (margins > 0).sum()
    assert sum(found.wrong) == (margins <= 0).sum()
    assert len(found.edges) == len(found.right) + 1


def test_equal_scores_alone_have_a_histogram_too() -> None:
    found = margin_histogram(np.zeros(3), num_bins=2)
    assert (found.right, found.wrong) == ((0, 0), (3, 0))


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
