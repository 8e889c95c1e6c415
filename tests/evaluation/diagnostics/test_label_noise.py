"""Disagreement, split votes and areas under the curve, by hand and against loops."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from hafrm.evaluation.diagnostics.label_noise import (
    LabelNoise,
    audit,
    disagreement,
    has_votes,
    is_split,
    mean_margin,
    suspicious,
)
from hafrm.evaluation.diagnostics.ranking import area_under_curve

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


def test_suspicious_are_those_that_all_models_are_against_the_clearest_first() -> None:
    margins = np.array([[-1.0, -2.0, 3.0, -9.0], [-1.0, -2.0, -3.0, 1.0]])
    assert suspicious(margins, 5) == [1, 0]
    assert suspicious(margins, 1) == [1]


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
    assert against.share.value == pytest.approx(2 / 6)
    assert (against.split.value, against.split.num) == (1.0, 1)
    assert (against.split_others.value, against.split_others.num) == (0.5, 4)


def test_without_votes_the_shares_are_null_and_the_rest_stands() -> None:
    margins = np.array([[3.0, -1.0], [3.0, 1.0]])
    noise = LabelNoise(("a", "b"), audit(margins, np.array([NONE, NONE]), np.arange(2)), {})
    written = json.loads(json.dumps(noise.to_dict(), allow_nan=False))
    assert written["auc"] is None
    assert [band["vote_split"] for band in written["by_disagreement"]] == [None, None]
    assert written["num_with_votes"] == 0
    assert written["by_disagreement"][1]["disagreement"] == 0.5


def test_one_model_has_no_disagreement_but_margins() -> None:
    margins = np.array([[3.0, -1.0, 0.5]])
    votes = np.array([[5, 0, 0], [3, 2, 0], [4, 1, 0]], float)
    noise = LabelNoise(("a",), audit(margins, votes, np.arange(3)), {})
    assert noise.all.by_disagreement == ()
    assert noise.to_dict()["auc"] == 1.0
    assert noise.to_dict()["predictors"][0]["name"] == "low |mean margin|"
