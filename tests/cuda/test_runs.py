"""Whole tiny runs on a GPU: in bfloat16, with adapters and by PPO, and their exports."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hafrm.export.proof import check_golden
from hafrm.recipe_file import dump_recipe
from hafrm.run_folder import read_json_lines
from hafrm.scoring.reward_model import RewardModel
from hafrm.training.loop import run_training
from support.tiny_rlhf import tiny_rlhf
from support.tiny_runs import tiny_recipe

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0}], ids=["full", "lora"])
def test_a_bfloat16_export_is_replayed_by_plain_transformers_and_scores_alike(
    lora, device, tmp_path
):
    """Its float32 scores to 1e-4 of its golden ones, its bfloat16 scores to the rounding of two layers."""
    sections = {} if lora is None else {"lora": lora}
    recipe = tiny_recipe(tmp_path, training={"precision": "bf16"}, **sections)
    run_training(recipe, tmp_path / "run")
    export = tmp_path / "run/model/reward"
    assert {t.dtype for t in load_file(export / "model.safetensors").values()} == {torch.bfloat16}
    assert max(check_golden(export).values()) < 1e-4
    lines = [json.loads(line) for line in (export / "golden_scores.jsonl").open()]
    golden = np.array([line["reward"] for line in lines])
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        rm = RewardModel.from_pretrained(export, dtype=dtype, device=device)
        scores = [
            rm.score(line["messages"][:-1], line["messages"][-1]["content"]) for line in lines
        ]
        assert np.abs(np.array(scores) - golden).max() < tolerance * max(1, np.abs(golden).max())


def test_ppo_samples_scores_and_trains(device, tmp_path):
    file, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(dump_recipe(tiny_rlhf(tmp_path)))
    command = [sys.executable, "-m", "hafrm", "rlhf", str(file), "--out", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    records = [r for r in read_json_lines(folder / "metrics.jsonl") if r["kind"] == "rlhf"]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(np.isfinite(record["reward"]) and record["kl"] < 100 for record in records)
    assert (folder / "model/policy/model.safetensors").is_file()
