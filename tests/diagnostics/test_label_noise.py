"""Disagreement, split votes, areas under the curve and the comparisons to read, by hand and in loops."""

import math

import numpy as np
import pytest
from scipy import stats

from hafrm.diagnostics.label_noise import (
    MAX_EXAMPLE_CHARS,
    WRONG,
    area_under_curve,
    audit,
    audit_labels,
    cut_text,
    disagreement,
    doubtful,
    has_votes,
    is_split,
    mean_margin,
    prompt_text,
    worst_errors,
)
from hafrm.evaluation.comparisons import Comparisons
from hafrm.preferences import Comparison, Group, Message, Votes

NAN = math.nan
NONE = [NAN, NAN, NAN]


# The area under the curve.


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    """Positives 2 and 4, negatives 1 and 3: of 2>1, 2>3, 4>1, 4>3 three hold; an equal pair is half."""
    positive = np.array([False, True, False, True])
    assert area_under_curve(np.array([1.0, 2.0, 3.0, 4.0]), positive).value == 3 / 4
    assert area_under_curve(np.array([1.0, 3.0, 3.0, 4.0]), positive).value == 3.5 / 4
    assert area_under_curve(np.ones(4), positive).value == 0.5


def test_the_area_equals_mann_whitney_s() -> None:
    draw = np.random.default_rng(0)
    scores, positive = draw.integers(0, 9, 200).astype(float), draw.random(200) < 0.3
    expected = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    found = area_under_curve(scores, positive)
    assert found.value == pytest.approx(expected / (positive.sum() * (~positive).sum()))
    assert found.low < found.value < found.high


def test_its_interval_resamples_whole_clusters() -> None:
    """Each item ten times over is no news to the clustered interval."""
    draw = np.random.default_rng(1)
    scores, positive = draw.normal(size=60), draw.random(60) < 0.5
    alone = area_under_curve(scores, positive)
    again = area_under_curve(
        np.repeat(scores, 10), np.repeat(positive, 10), np.repeat(range(60), 10)
    )
    naive = area_under_curve(np.repeat(scores, 10), np.repeat(positive, 10))
    assert again.high - again.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert naive.high - naive.low < 0.5 * (again.high - again.low)


def test_one_kind_alone_has_no_area() -> None:
    assert math.isnan(area_under_curve(np.ones(3), np.ones(3, bool)).value)
    assert math.isnan(area_under_curve(np.empty(0), np.empty(0, bool)).value)
    assert math.isnan(
        area_under_curve(np.array([1.0, 2]), np.array([True, False]), np.zeros(2)).low
    )


# Models.


def test_disagreement_is_the_minority_s_share_and_knows_no_label() -> None:
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


def test_votes_are_split_where_more_than_one_outcome_has_some() -> None:
    votes = np.array([[3, 0, 0], [2, 1, 0], [2, 0, 1], NONE])
    assert is_split(votes).tolist() == [False, True, True, False]
    assert has_votes(votes).tolist() == [True, True, True, False]


def test_doubtful_labels_are_those_that_all_models_contradict_the_clearest_first() -> None:
    margins = np.array([[-1.0, -2.0, 3.0, -9.0], [-1.0, -2.0, -3.0, 1.0]])
    assert doubtful(margins) == [1, 0]


# The audit.


def found():
    """Two models, six comparisons. They agree on the first four (right, right, wrong, wrong) and not on the
    last two. Votes: unanimous, unanimous, split, unknown, split, split."""
    margins = np.array([[3.0, 3, -1, -2, 1, -1], [3.0, 3, -1, -2, -1, 1]])
    votes = np.array([[5, 0, 0], [3, 0, 0], [3, 2, 0], NONE, [2, 1, 2], [4, 1, 0]], float)
    return audit(margins, votes, np.arange(6))


def test_the_levels_of_disagreement_by_hand() -> None:
    """Level 0: four comparisons, two right, one of three with votes split; level 1/2: two, both split."""
    agree, differ = found().by_disagreement
    assert (agree.low, agree.num, agree.accuracy.value) == (0.0, 4, 0.5)
    assert (agree.split.value, agree.split.num) == (pytest.approx(1 / 3), 3)
    assert (differ.low, differ.num, differ.split.value) == (0.5, 2, 1.0)


def test_bands_of_margin_hold_all_comparisons_and_split_votes_have_low_margins() -> None:
    bands = found().by_margin
    assert sum(band.num for band in bands) == 6
    assert [band.low for band in bands] == sorted(band.low for band in bands)
    assert bands[0].split.value == 1.0
    assert bands[-1].split.value == 0.0


def test_predictors_are_judged_on_the_comparisons_with_votes() -> None:
    """Five have votes, three of them split. Disagreement is 0, 0 for the unanimous and 0, 1/2, 1/2 for the
    split ones: of six pairs four are in order and two equal, 5/6. |mean margin| is lower for all split
    ones: 1."""
    areas = {each.name: each.auc for each in found().predictors}
    assert areas["disagreement"].value == pytest.approx(5 / 6)
    assert areas["low |mean margin|"].value == 1.0
    assert areas["mean margin against the label"].value == 1.0
    assert areas["disagreement"].num == 5


def test_what_all_models_are_against_by_hand() -> None:
    """Comparisons 2 and 3 of six; of these one has votes, and is split; of the other four, two are."""
    against = found().against
    assert against.fraction.value == pytest.approx(2 / 6)
    assert (against.split.value, against.split.num) == (1.0, 1)
    assert (against.split_others.value, against.split_others.num) == (0.5, 4)


def test_without_votes_the_fractions_are_nan_and_the_rest_stands() -> None:
    margins = np.array([[3.0, -1.0], [3.0, 1.0]])
    got = audit(margins, np.array([NONE, NONE]), np.arange(2))
    assert got.num_with_votes == 0
    assert all(math.isnan(band.split.value) for band in got.by_disagreement)
    assert math.isnan(got.predictors[0].auc.value)
    assert got.by_disagreement[1].low == 0.5


def test_one_model_has_no_disagreement_but_margins_and_without_votes_nothing() -> None:
    margins = np.array([[3.0, -1.0, 0.5]])
    groups = [
        group(name, ["r", "c"], votes=votes)
        for name, votes in zip("abc", (Votes(5, 0), Votes(3, 2), Votes(4, 1)), strict=True)
    ]
    noise = audit_labels(Comparisons.of(groups), margins, ["m"])
    assert noise.by_disagreement == ()
    assert (noise.predictors[0].name, noise.predictors[0].auc.value) == ("low |mean margin|", 1.0)
    assert list(noise.by_set) == ["a", "b", "c"]
    unvoted = Comparisons.of([group(name, ["r", "c"]) for name in "abc"])
    assert audit_labels(unvoted, margins, ["m"]) is None
    assert audit_labels(unvoted, np.repeat(margins, 2, 0), ["m", "n"]).by_set == {}


# The comparisons to read.


def group(name: str, responses: list[str], **comparison: object) -> Group:
    pair = Comparison(1, 0, **comparison)  # type: ignore[arg-type]
    return Group(
        name, (Message("user", f"prompt {name}"),), tuple(responses), (pair,), source=name[0]
    )


def test_examples_are_the_clearest_mistakes_each_rejected_response_once() -> None:
    """Margins -1, -3, -2, 1; the second and third differ in nothing but the chosen response."""
    many = Group(
        "m",
        (Message("user", "prompt"),),
        ("good", "better", "bad"),
        (Comparison(0, 2), Comparison(1, 2)),
        source="m",
    )
    voted = group("v", ["r", "c"], votes=Votes(2, 1, 0))
    comparisons = Comparisons.of([voted, many, group("w", ["r", "c"])])
    found = worst_errors(comparisons, np.array([[-1.0, -3.0, -2.0, 1.0]]))
    assert [(each.set, each.margin, each.chosen) for each in found] == [
        ("m", -3.0, "good"),
        ("v", -1.0, "c"),
    ]
    assert found[1].votes == (2, 1, 0)
    assert found[0].votes is None


def test_examples_of_doubtful_labels_need_all_models_and_say_so() -> None:
    """Margins of four comparisons by two models, which divide them by 1 and 2: wrong in the first's eyes
    are a, b, d, all models contradict a, b and d, most clearly d; each is shown once."""
    comparisons = Comparisons.of([group(name, ["r", "c"]) for name in "abcd"])
    margins = np.array([[-1.2, -1.1, 0.9, -0.7], [-1.0, -1.0, -1.0, -3.6055]])
    assert np.sqrt((margins**2).mean(1)) == pytest.approx([0.9937, 2.0], abs=1e-3)
    found = worst_errors(comparisons, margins, num=2)
    assert [each.set for each in found] == ["a", "b", "d"]
    assert found[0].why.startswith(f"{WRONG}; all models contradict the label, 0.9 times")
    assert found[2].why.startswith("all models contradict the label, 1.3 times as clearly")
    alone = worst_errors(comparisons, np.array([[-1.0, 1, 1, 1], [1.0, 1, 1, 1]]))
    assert [each.why for each in alone] == [WRONG]


def test_texts_are_cut_and_say_how_much_is_missing() -> None:
    text = "a" * MAX_EXAMPLE_CHARS + "bcd"
    assert cut_text(text) == "a" * MAX_EXAMPLE_CHARS + " [3 more characters]"
    assert cut_text(text, end=True) == "[3 more characters] " + text[3:]
    assert cut_text(" short ") == "short"
    turns = (Message("user", "hi"), Message("assistant", "yes?"), Message("user", "go"))
    assert prompt_text(turns) == "user: hi\nassistant: yes?\nuser: go"
