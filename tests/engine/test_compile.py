"""Compiled layers give the same numbers, and sequences of other lengths compile nothing again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpointing"), [("llama", "checkpointed"), ("mistral", "kept")]
)
def test_compiled_layers_equal_plain_ones_and_are_compiled_once_for_all_lengths(
    family, checkpointing
):
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(TESTS / "support" / "compile_worker.py"), family, checkpointing],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
