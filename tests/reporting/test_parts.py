"""The small parts of the page, by values worked out by hand."""

import itertools
import math
from pathlib import Path

import pytest

from hafrm.reporting.axes import Series, spread
from hafrm.reporting.folders import Folder, Material, short_names, source_names
from hafrm.reporting.numbers import (
    Number,
    decimal,
    difference,
    finite,
    number,
    p_value,
    share,
    share_of,
    significant,
)
from hafrm.reporting.plots import thinned
from hafrm.reporting.strips import Mark, axis_of, bar, whiskers
from hafrm.reporting.verdicts import verdicts


def test_a_share_is_written_as_evaluate_prints_it():
    from hafrm.statistics import Estimate

    for value, low, high in ((0.632, 0.591, 0.672), (0.5, math.nan, math.nan), (1.0, 0.9, 1.0)):
        ours = share(Number(value, low, high))
        assert ours == str(Estimate(value, low, high, 10, "wilson"))


def test_numbers_of_json_come_out_as_they_are_or_as_none():
    assert number({"value": None, "low": 0, "high": 1}) is None
    assert number(None) is None
    assert number({"estimate": {"value": 0.5, "low": None, "high": None, "num": 3}}).num == 3
    assert math.isnan(finite(None)) and math.isnan(finite("1")) and math.isnan(finite(True))
    assert decimal(-0.5, 2) == "\u22120.50"
    assert (p_value(0.0004), p_value(0.0123), p_value(None)) == ("< 0.001", "0.012", "n/a")
    assert (significant(3e-05), significant(12_800), significant(0.25)) == (
        "3e\u221205",
        "12,800",
        "0.25",
    )
    assert difference(Number(-0.031, -0.06, -0.002)) == "\u22123.1 points [\u22126.0, \u22120.2]"


def test_the_interval_of_a_bin_is_wilsons():
    """8 of 10 at z = 1.96: centre (0.8 + 0.192) / 1.384 = 0.7168, half 0.2267."""
    found = share_of(0.8, 10)
    assert (found.low, found.high) == pytest.approx((0.490, 0.943), abs=1e-3)


def test_labels_that_would_touch_are_moved_apart_and_no_others():
    """0.5 and 0.52 are set 0.1 apart around their mean 0.51; 0.9 stays."""
    assert spread([0.5, 0.52, 0.9], 0.1) == pytest.approx([0.46, 0.56, 0.9])
    assert spread([0.1, 0.9], 0.1) == [0.1, 0.9]
    places = spread([0.5, 0.5, 0.5, 0.58], 0.1)
    assert all(b - a == pytest.approx(0.1) for a, b in itertools.pairwise(places))


def test_a_long_series_keeps_its_mean_when_it_is_thinned():
    series = Series("s", [float(i) for i in range(1000)], [float(i % 10) for i in range(1000)])
    short = thinned(series, most=100)
    assert len(short.x) == 100
    assert sum(short.y) / 100 == pytest.approx(4.5)
    assert thinned(series, most=1000) is series


def test_an_axis_ends_on_whole_ticks_around_all_intervals():
    """0.42 to 0.71 and the reference 0.5: a third of the width is 0.097, so ticks are 0.1 apart."""
    axis = axis_of([Number(0.5, 0.42, 0.58), Number(0.65, 0.6, 0.71), None], 0.5)
    assert (axis.low, axis.high, axis.step) == pytest.approx((0.4, 0.8, 0.1))
    assert axis.place(0.5) == "25.00%"
    assert axis.place(2.0) == "100.00%"


def test_a_strip_draws_the_interval_from_end_to_end():
    axis = axis_of([Number(0.5, 0.4, 0.6)], 0.5)
    strip = whiskers(axis, [Mark(Number(0.5, 0.4, 0.6), 2)])
    assert f'x1="{axis.place(0.4)}" x2="{axis.place(0.6)}"' in strip
    assert 'class="dot c2"' in strip
    assert bar([(0.5, "win"), (0.2, "tie"), (0.3, "lose")]).count("<rect") == 3


def test_folders_are_called_by_the_shortest_end_that_tells_them_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other"]
    assert short_names(paths) == ["a/run", "b/run", "other"]
    assert short_names([tmp_path / "x"]) == ["x"]


def test_sources_lose_folder_and_ending_unless_two_would_be_called_the_same():
    assert source_names(["d/test.jsonl.gz#split=test", "set:hh#split=a"]) == {
        "d/test.jsonl.gz#split=test": "test#split=test",
        "set:hh#split=a": "set:hh#split=a",
    }
    assert source_names(["a/t.jsonl", "b/t.jsonl"]) == {
        "a/t.jsonl": "a/t.jsonl",
        "b/t.jsonl": "b/t.jsonl",
    }


def test_the_better_policy_comes_first_and_is_better_by_a_positive_difference():
    gap = {"value": -0.2, "low": -0.3, "high": -0.1, "num": 9}
    found = {"wins": [{"first": "bt", "second": "haf", "difference": gap}]}
    folder = Folder("it", Path("it"), "", {}, [], [], [], [], {"rlhf_comparison": found})
    (verdict,) = verdicts(Material((folder,), {}))
    assert verdict == (
        "The policy of haf is judged better than that of bt (+20.0 points [10.0, 30.0])."
    )
