"""Weighted means of means: values by hand, intervals against slow loops and theory."""

import numpy as np
import pytest

from hafrm.benchmarks.benchmark_scores import Term, TermMeans, mean_of
from hafrm.statistics import Estimate, accuracy_interval, wilson


def wilson_interval(num_correct: int, num: int) -> Estimate:
    return Estimate(num_correct / num, *wilson(num_correct / num, num), num, "wilson")


def term(values: object, clusters: object = None) -> Term:
    numbers = np.asarray(values, np.float64)
    labels = np.arange(len(numbers)) if clusters is None else np.asarray(clusters)
    return Term(numbers, np.array([str(label) for label in labels]))


def apart(*terms: Term) -> dict[str, Term]:
    """Terms that share no cluster."""
    return {
        f"t{k}": Term(t.values, np.array([f"{k}-{c}" for c in t.clusters]))
        for k, t in enumerate(terms)
    }


def width(estimate: object) -> float:
    return estimate.high - estimate.low


def test_a_composite_by_hand() -> None:
    """Means 3/4 and 1/2 with weights 2 and -1: 1."""
    means = TermMeans(apart(term([1, 1, 1, 0]), term([0.25, 0.75])))
    got = means.combine({"t0": 2.0, "t1": -1.0})
    assert (got.value, got.num) == (pytest.approx(1.0), 6)
    assert means.means.tolist() == [0.75, 0.5]


def test_one_term_of_right_and_wrong_has_the_interval_of_an_accuracy() -> None:
    draw = np.random.default_rng(0)
    correct, clusters = draw.random(90) < 0.7, np.repeat(np.arange(30), 3)
    got = TermMeans({"a": term(correct, clusters)}).combine({"a": 1.0})
    expected = accuracy_interval(correct, np.array([str(c) for c in clusters]))
    assert got == expected
    single = TermMeans({"a": term([1, 1, 0, 1])}).combine({"a": 1.0})
    assert single == wilson_interval(3, 4)


def test_translations_of_one_prompt_are_drawn_together() -> None:
    """The same answers in two languages are no more news than in one: the width stays. Taken for
    independent, it would shrink by the square root of 2."""
    values = np.random.default_rng(2).normal(size=500)
    together = TermMeans({"a": term(values), "b": term(values)})
    separate = TermMeans(apart(term(values), term(np.random.default_rng(3).permutation(values))))
    halves = {"a": 0.5, "b": 0.5}
    one = together.combine({"a": 1.0})
    assert width(together.combine(halves)) == pytest.approx(width(one), rel=1e-9)
    independent = width(separate.combine({"t0": 0.5, "t1": 0.5}))
    assert independent == pytest.approx(width(one) / np.sqrt(2), rel=0.06)


def test_the_draws_equal_a_slow_loop_in_distribution() -> None:
    """Clusters in one term or in both are drawn among their like, item by item, by another loop."""
    draw = np.random.default_rng(4)
    labels = {"a": [f"c{k}" for k in range(40) for _ in range(k % 3 + 1)]}
    labels["b"] = [f"c{k}" for k in range(25, 60)]
    terms = {name: term(draw.normal(size=len(names)), names) for name, names in labels.items()}
    got = TermMeans(terms).combine({"a": 0.3, "b": 0.7})
    kinds = (
        [f"c{k}" for k in range(25)],
        [f"c{k}" for k in range(25, 40)],
        [f"c{k}" for k in range(40, 60)],
    )
    results = []
    for _ in range(3000):
        picked = [c for kind in kinds for c in draw.choice(kind, len(kind))]
        sums = {
            name: np.concatenate([t.values[t.clusters == c] for c in picked]).mean()
            for name, t in terms.items()
        }
        results.append(0.3 * sums["a"] + 0.7 * sums["b"])
    low, high = np.quantile(results, [0.025, 0.975])
    assert got.low == pytest.approx(low, abs=0.05 * (high - low))
    assert got.high == pytest.approx(high, abs=0.05 * (high - low))


def test_items_that_all_agree_keep_an_honest_width() -> None:
    """Weights 1/4 and 3/4 over 4 and 36 clusters: deviations of Wilson's bounds, added in squares."""
    means = TermMeans(apart(term(np.ones(8), np.repeat(range(4), 2)), term(np.ones(36))))
    got = means.combine({"t0": 0.25, "t1": 0.75})
    gaps = 1 - wilson_interval(4, 4).low, 1 - wilson_interval(36, 36).low
    expected = np.hypot(gaps[0] / 4, 3 * gaps[1] / 4)
    assert (got.value, got.low, got.high) == pytest.approx((1.0, 1 - expected, 1.0))
    wrong = TermMeans(apart(term(np.zeros(4)), term(np.zeros(36)))).combine(
        {"t0": 0.25, "t1": 0.75}
    )
    assert (wrong.value, wrong.low, wrong.high) == pytest.approx((0.0, 0.0, expected))


def test_the_mean_of_independent_estimates_by_hand() -> None:
    """3 of 4 and 1 of 4: mean 1/2, deviations of Wilson's bounds halved and added in squares. The two
    intervals mirror each other, so the mean's is symmetric."""
    first, second = wilson_interval(3, 4), wilson_interval(1, 4)
    got = mean_of([first, second])
    half = np.hypot((0.75 - first.low) / 2, (0.25 - second.low) / 2)
    assert (got.value, got.low, got.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert got.num == 8
    one = wilson_interval(500, 1000)
    assert width(mean_of([one] * 9)) == pytest.approx(width(one) / 3)
