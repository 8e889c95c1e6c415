"""benchmarks/workload.py: rows are on disk as they come, and none takes the others along."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "workload.py"


@pytest.fixture(scope="module")
def workload():
    spec = importlib.util.spec_from_file_location("workload", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["workload"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["workload"]


def test_a_row_that_fails_keeps_its_error_and_the_next_ones_are_measured(workload, tmp_path):
    def fail() -> dict[str, float]:
        raise RuntimeError("no kernel image")

    rows = workload.Rows(tmp_path / "out", "train")
    rows.add({"contender": "a"}, lambda: {"seconds": 1.0})
    rows.add({"contender": "b"}, fail)
    on_disk = [json.loads(line) for line in (tmp_path / "out/train.jsonl").open()]
    assert on_disk == [
        {"contender": "a", "seconds": 1.0},
        {"contender": "b", "error": "RuntimeError: no kernel image"},
    ]
    rows.add({"contender": "c"}, lambda: {"seconds": 2.0})
    assert rows.rows[2] == {"contender": "c", "seconds": 2.0}


def test_nothing_is_started_once_the_time_is_up(workload, tmp_path):
    rows = workload.Rows(tmp_path, "train", seconds=-1.0)
    row = rows.add({"contender": "a"}, lambda: pytest.fail("it was started"))
    assert "the time is up" in row["error"]
