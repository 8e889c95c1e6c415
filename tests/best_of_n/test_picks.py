"""The best-of-n estimator against all subsets, and numbers derived by hand."""

from itertools import combinations

import numpy as np
import pytest

from hafrm.best_of_n.candidates import Candidates
from hafrm.best_of_n.picks import curve_values, expected_picks
from hafrm.preferences import Group
from hafrm.statistics import bootstrap_columns, clustered_bootstrap


def by_all_subsets(scores, values):
    """The mean over every subset of n of the value of its pick; the first of equals is picked."""
    curve = []
    for n in range(1, len(scores) + 1):
        picked = [
            values[max(subset, key=lambda k: (scores[k], -k))]
            for subset in combinations(range(len(scores)), n)
        ]
        curve.append(np.mean(picked))
    return curve


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_mean_over_all_subsets_ties_included(seed):
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, 4, 7).astype(float)
    values = draw.normal(size=7)
    assert expected_picks(scores, values) == pytest.approx(by_all_subsets(scores, values))


def test_many_candidates_neither_overflow_nor_vanish():
    scores = np.arange(2000.0)
    curve = expected_picks(scores, np.ones(2000))
    assert curve == pytest.approx(np.ones(2000), abs=1e-9)


def test_a_prompt_with_fewer_candidates_keeps_its_best():
    candidates = Candidates(Group("g", (), ()), ["a", "b"])
    scores = [np.array([1.0, 2.0])]
    assert curve_values([candidates], scores, scores, 4).tolist() == [[1.5, 2.0, 2.0, 2.0]]


def test_columns_share_resamples_and_equal_the_bootstrap_of_each_alone():
    values = np.random.default_rng(0).normal(size=(50, 3))
    for k, estimate in enumerate(bootstrap_columns(values)):
        alone = clustered_bootstrap(values[:, k], proportion=False)
        numbers = [(e.value, e.low, e.high) for e in (estimate, alone)]
        assert numbers[0] == pytest.approx(numbers[1])
