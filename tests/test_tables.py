"""What people read: no accuracy is printed without its interval, and nothing is cut off at 120 columns."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from benchmark_rows import write_all
from exports_for_tests import export_both
from hafrm.evaluation.verb import run_evaluation
from hafrm.tables.results import result_tables
from tiny_runs import write_preferences


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("m") / "model"
    export_both(folder)
    return folder


def printed(result: object) -> str:
    console = Console(width=120, file=io.StringIO())
    for renderable in result_tables(result):
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def results(model: Path, tmp_path: Path, kind: str) -> object:
    files = [
        str(write_preferences(tmp_path / f"{n}.jsonl", num=9, start=s))
        for n, s in (("one", 0), ("two", 50))
    ]
    if kind == "evaluation":
        return run_evaluation(model, files)
    if kind == "comparison":
        return run_evaluation(model / "reward", files, against=[str(model / "policy")])
    if kind == "seeds":
        return run_evaluation(model, files, also=[str(model / "policy")])
    return run_evaluation(model, [], benchmark=["all"], benchmark_data=write_all(tmp_path / "b"))


@pytest.mark.parametrize("kind", ["evaluation", "comparison", "seeds", "benchmarks"])
def test_every_share_is_printed_with_its_interval(model, tmp_path, kind: str) -> None:
    """As many shares as brackets; headings say what the brackets are."""
    text = printed(results(model, tmp_path, kind))
    body = text.replace("[95 %]", "")
    shares = len(re.findall(r"\d %", body))
    brackets = len(re.findall(r"\[-?\d+\.\d, ?-?\d+\.\d\]", body))
    assert shares == brackets > 0
    assert "[95 %]" in text


@pytest.mark.parametrize("kind", ["evaluation", "comparison", "seeds", "benchmarks"])
def test_no_cell_is_cut_off(model, tmp_path, kind: str) -> None:
    text = printed(results(model, tmp_path, kind))
    assert "…" not in text
    if kind == "benchmarks":
        for word in ("scorer", "implicit", "pick", "longer", "Correctness", "JudgeBench", "Avg."):
            assert word in text.partition("section")[0]
