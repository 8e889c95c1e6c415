"""The benchmarks on a GPU: rows are on disk as they come, and none takes the others along."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from support.scripts import ROOT, load_script


@pytest.fixture(scope="module")
def workload():
    return load_script("benchmarks/workload")


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


def commands(tmp_path: Path, call: int) -> list[str]:
    """What a call of tools/gpu.sh runs, each behind the allocator's settings."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$PYTORCH_CUDA_ALLOC_CONF $*" >> {tmp_path}/commands\n')
    python.chmod(0o755)
    folders = {"PYTHON": str(python), "INPUTS": str(tmp_path), "OUT": str(tmp_path / "out")}
    environment = os.environ | folders | {"DEVICE": "cpu"}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    command = ["bash", ROOT / "tools/gpu.sh", str(call)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return (tmp_path / "commands").read_text().splitlines()


def test_a_time_limit_loses_no_test_s_result(tmp_path):
    (tests,) = (line for line in commands(tmp_path, 1) if "-m pytest" in line)
    assert " -vv " in tests
    assert f" --junitxml={tmp_path}/out/tests.xml " in tests


def test_benchmarks_run_with_the_allocator_of_training_and_no_row_twice(tmp_path):
    """More tokens than a step has make the same micro-batch, so a budget makes no row of its own."""
    lines = commands(tmp_path, 3)
    assert all(line.startswith("expandable_segments:True ") for line in lines)
    rows = [re.sub(r"--(max-tokens|seconds|only) [^-]*", "", line) for line in lines]
    assert len(rows) == len(set(rows))
