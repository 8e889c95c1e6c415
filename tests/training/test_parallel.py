"""Two processes take the same steps as one: DDP and FSDP2 on gloo, ranks with unequal tokens."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hafrm.recipe import Recipe
from hafrm.recipe_file import dump_recipe
from hafrm.run_folder import read_json_lines
from hafrm.training.loop import train
from tiny_runs import tiny_recipe

WORKER = Path(__file__).resolve().parents[1] / "parallel_worker.py"


def launch(recipe: Recipe, folder: Path, *options: str) -> None:
    """Run the recipe in two processes."""
    file = folder.with_suffix(".yaml")
    file.write_text(dump_recipe(recipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(WORKER), str(file), str(folder), *options]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-3000:] + errors[1][-3000:]


def assert_same_training(one: Path, two: Path) -> None:
    """Losses to 1e-4, exported weights to 1e-5: sums in another order, through Adam (eps 1e-4)."""
    for ours, theirs in zip(
        read_json_lines(one / "metrics.jsonl"), read_json_lines(two / "metrics.jsonl"), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours.get("alpha", 1.0) == pytest.approx(theirs.get("alpha", 1.0), rel=1e-3)
    for kind in ("reward", "policy"):
        first, second = (load_file(f / "model" / kind / "model.safetensors") for f in (one, two))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.allclose(value, second[name], atol=1e-5), name


def recipe_for(folder: Path, mode: str, lora: bool) -> Recipe:
    """Groups of 20 to 60 tokens in micro-batches of 128, so ranks hold different numbers of tokens."""
    training = {"max_tokens": 128, "eps": 1e-4, "parallel": mode}
    sections = {"training": training, "evaluation": {"every": 0}}
    if lora:
        sections["lora"] = {"rank": 4, "alpha": 8.0}
    return tiny_recipe(folder, **sections)


@pytest.mark.parametrize(
    ("mode", "lora"),
    [
        ("ddp", False),
        ("fsdp", False),
        pytest.param("fsdp", True, marks=pytest.mark.slow),
        pytest.param("ddp", True, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(tmp_path, mode, lora):
    recipe = recipe_for(tmp_path, mode, lora)
    train(recipe, tmp_path / "one")
    launch(recipe, tmp_path / "two")
    assert_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_sharded_run_is_resumed_by_one_process_from_its_gathered_checkpoint(tmp_path):
    """Checkpoints hold whole tensors, so the number of processes may change."""
    recipe = recipe_for(tmp_path, "fsdp", lora=False)
    launch(recipe, tmp_path / "two")
    train(recipe, tmp_path / "one")
    for late in ("step-6", "step-4"):
        folder = tmp_path / "two/checkpoints" / late
        if late == "step-6":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    model = tmp_path / "two/model"
    model.rename(tmp_path / "set-aside")
    train(recipe, tmp_path / "two", resume=True)
    assert_same_training(tmp_path / "one", tmp_path / "two")
