"""Train on a Ray cluster: Ray Train places the processes and starts torch's process group in them.

    python examples/launch/ray_train.py RECIPE RUN_FOLDER [--workers 8] [section.key=value ...]

The directory that you start this in must exist on every node (a shared file system), because relative
paths start from it. Started again with the same run folder, it resumes from the last checkpoint.
It needs `pip install "ray[train]"`.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from hafrm.recipe_file import load_recipe


def train_worker(job: dict[str, Any]) -> None:
    """Run the training in one worker; Ray has set RANK, LOCAL_RANK and WORLD_SIZE."""
    # the process that only submits the job must neither load the engine nor touch a GPU
    from hafrm.training.loop import run_training  # noqa: PLC0415

    os.chdir(job["directory"])
    out = Path(job["out"])
    if job["resume"]:
        run_training(load_recipe(out / "recipe.yaml"), out, resume=True)
    else:
        run_training(load_recipe(job["recipe"], job["overrides"]), out)


def main() -> None:
    """Submit the job and wait for it."""
    parser = argparse.ArgumentParser(description="hafrm train on a Ray cluster")
    parser.add_argument("recipe")
    parser.add_argument("out")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--workers", type=int, default=8, help="processes, one GPU each")
    parser.add_argument("--cpu", action="store_true", help="workers without a GPU")
    given = parser.parse_intermixed_args()

    resume = (Path(given.out) / "recipe.yaml").is_file()
    if not resume:
        load_recipe(given.recipe, given.overrides)  # a wrong recipe fails before any GPU is taken
    job = {
        "directory": os.getcwd(),
        "recipe": given.recipe,
        "out": given.out,
        "overrides": given.overrides,
        "resume": resume,
    }
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=not given.cpu),
        run_config=RunConfig(name=Path(given.out).name),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
