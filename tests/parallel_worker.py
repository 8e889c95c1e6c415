"""One rank of a run, started by test_parallel with the variables that torchrun would set."""

import sys
from pathlib import Path

from hafrm.recipe_file import load_recipe
from hafrm.training import parallel
from hafrm.training.loop import train

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    try:
        train(load_recipe(sys.argv[1]), folder, resume="--resume" in sys.argv)
    finally:
        parallel.stop()
