"""Tables in HTML and Markdown, and the parts of plots, by values worked out by hand."""

import math
import re
from pathlib import Path

import pytest

from hafrm.report.html import PageSection, Strips, render_page
from hafrm.report.plots import MAX_POINTS, AxisScale, Series, chart
from hafrm.report.run_files import short_paths, short_sources
from hafrm.results import Column, Table, to_markdown
from hafrm.statistics import Estimate


def estimate(value: float, low: float, high: float, *, proportion: bool = True) -> Estimate:
    return Estimate(value, low, high, 10, "wilson", proportion)


def html_of(*blocks: object, colours: dict[str, int] | None = None) -> str:
    """The main part of a page that holds these blocks."""
    section = PageSection("s", "S", "", blocks)
    page = render_page([section], names=["a"], by="", colours=colours or {})
    return page[page.index("<main") : page.index("</main>")]


ACCURACIES = Table(
    "accuracy",
    (
        Column("run"),
        Column("accuracy", "percent"),
        Column("longer", "percent"),
        Column("n", "count"),
    ),
    (
        ("haf", estimate(0.65, 0.6, 0.71), estimate(0.5, 0.42, 0.58), 10),
        ("rule", estimate(math.nan, 0.0, 1.0), None, -2),
    ),
    ("a note of 5 %",),
)


def test_a_strip_draws_value_and_interval_on_an_axis_between_whole_ticks():
    """0.6 to 0.71 and the reference 0.5: ticks from 0.5 to 0.8, so 0.6 is at 33.33 %, 0.71 at 70 %."""
    html = html_of(Strips(ACCURACIES, "accuracy"), colours={"haf": 2})
    assert re.findall(r'text-anchor="\w+">([^<]*)<', html) == ["50", "60", "70", "80"]
    assert '<line class="whisker c2" x1="33.33%" x2="70.00%"' in html
    assert html.count('class="reference" x1="0.00%"') == 2
    assert html.count("<circle") == 1  # NaN has no dot
    assert '<span class="named c2">haf</span>' in html


def test_markdown_has_the_same_texts_and_cannot_be_broken_out_of():
    table = Table(
        "t", (Column("a|b"), Column("n", "count")), (("x*y\nz", 3), ("<b>", 4)), ("note_",)
    )
    assert to_markdown(table) == (
        "| a\\|b | n |\n| --- | ---: |\n| x\\*y z | 3 |\n| \\<b> | 4 |\n\nnote\\_\n"
    )
    assert "| 65.0 % [60.0, 71.0] |" in to_markdown(ACCURACIES)


def test_a_plot_is_drawn_where_a_point_is_finite_and_says_where_series_begin_and_end():
    assert chart("t", [Series("s", [1.0], [math.nan])], AxisScale()) is None
    plot = chart("t", [Series("s", [1.0, 2.0, 3.0], [0.25, math.nan, 0.5], 1)], AxisScale())
    assert plot.description == "t: s from 0.25 to 0.5"
    assert 'class="c1"' in plot.svg


def test_a_long_series_is_averaged_down():
    """1000 points in groups of 4 are 250."""
    x, y = [float(i) for i in range(1000)], [float(i % 4) for i in range(1000)]
    plot = chart("t", [Series("s", x, y)], AxisScale())
    assert MAX_POINTS == 300
    assert plot.description == "t: s from 1.5 to 1.5"


def test_folders_are_called_by_the_shortest_end_that_no_other_has(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other"]
    assert short_paths(paths) == ["a/run", "b/run", "other"]
    assert short_paths([Path("/x")]) == ["x"]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["d/test.jsonl.gz#split=test", "set:hh#split=a"], ["test#split=test", "set:hh#split=a"]),
        (["a/t.jsonl", "b/t.jsonl"], ["a/t.jsonl", "b/t.jsonl"]),
    ],
)
def test_sources_lose_folder_and_ending_unless_two_would_be_called_the_same(sources, names):
    assert list(short_sources(sources).values()) == names
