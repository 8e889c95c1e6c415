"""What people see: no accuracy without its interval, and nothing cut off at 120 columns."""

import io
import re

import pytest
from rich.console import Console

from hafrm.benchmarks.benchmark_run import run_benchmarks
from hafrm.evaluation import compare_models, evaluate
from hafrm.report.terminal import print_tables
from hafrm.results import Column, Table
from hafrm.statistics import Estimate
from support.benchmark_rows import write_all
from support.tiny_runs import write_preferences


def printed(*tables: Table) -> str:
    console = Console(width=120, file=io.StringIO())
    print_tables(tables, console)
    return console.file.getvalue()


@pytest.mark.parametrize("kind", ["evaluation", "comparison", "seeds", "benchmarks"])
def test_every_fraction_is_printed_with_its_interval_and_no_cell_is_cut_off(
    exported, tmp_path, kind: str
) -> None:
    """As many fractions as brackets; headings say what the brackets are."""
    files = [
        str(write_preferences(tmp_path / f"{n}.jsonl", num=9, start=s))
        for n, s in (("one", 0), ("two", 50))
    ]
    if kind == "evaluation":
        result = evaluate(exported, files)
    elif kind == "comparison":
        result = compare_models([exported / "reward"], [exported / "policy"], files)
    elif kind == "seeds":
        result = compare_models([exported, exported / "policy"], [], files)
    else:
        result = run_benchmarks(exported, ["all"], folder=write_all(tmp_path / "b"))
    text = printed(*result.tables())
    body = text.replace("[95 %]", "")
    fractions = len(re.findall(r"\d %", body))
    brackets = len(re.findall(r"\[-?\d+\.\d, ?-?\d+\.\d\]", body))
    assert fractions == brackets > 0
    assert "[95 %]" in text
    if kind == "benchmarks":
        for word in ("scorer", "implicit", "pick", "longer", "Correctness", "JudgeBench", "Avg."):
            assert word in text.partition("section")[0]


def test_a_table_that_is_too_wide_has_its_intervals_below_the_values() -> None:
    estimate = Estimate(0.5, 0.4, 0.6, 10, "wilson")
    few, many = (
        Table("t", (Column("name"), *[Column("a [b]", "percent")] * n), (("x", *[estimate] * n),))
        for n in (2, 8)
    )
    assert "50.0 % [40.0, 60.0]" in printed(few)
    assert "50.0 % [" not in printed(many)
    assert printed(many).count("[40.0,60.0]") == 8


def test_text_is_printed_as_it_is_with_notes_below() -> None:
    text = printed(Table("[t]", (Column(""), Column("")), (("[red]", "a [/b]"),), ("a note [1]",)))
    for word in ("[t]", "[red]", "a [/b]", "a note [1]"):
        assert word in text
