"""One of two ranks of a run, started by test_run_end: the proof needs the other rank to have ended."""

import os
import sys
import time
from pathlib import Path

from hafrm.recipe_file import load_recipe
from hafrm.training import parallel, run_export
from hafrm.training.loop import train

PATIENCE = 30.0
"""Seconds that the proof waits; were the ranks to wait for each other, it would be for ever."""


def main(folder: Path) -> None:
    """Train, and leave a file when training has returned."""
    ended = folder / "other-rank-has-ended"

    def check(_: Path) -> dict[str, float]:
        until = time.monotonic() + PATIENCE
        while not ended.exists():
            assert time.monotonic() < until, "the other rank waits for the proof"
            time.sleep(0.05)
        return {}

    run_export.check_golden = check
    train(load_recipe(folder / "recipe.yaml"), folder / "run")
    parallel.stop()
    if os.environ["RANK"] == "1":
        ended.touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
