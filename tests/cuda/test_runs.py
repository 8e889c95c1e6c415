"""Whole tiny runs on a GPU: precision, memory, signals, adapters and the exports that they end with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hafrm.engine.packing import free_memory
from hafrm.export.proof import check_golden
from hafrm.recipe_file import dump_recipe, load_recipe
from hafrm.run_folder import read_json_lines
from hafrm.scoring.reward_model import RewardModel
from hafrm.training.loop import run_training
from support.chat_tokenizers import chat_tokenizer
from support.tiny_rlhf import tiny_rlhf
from support.tiny_runs import tiny_recipe, write_preferences

pytestmark = pytest.mark.cuda

CALM = {"precision": "fp32", "eps": 1e-4}
"""A GPU adds in any order; with AdamW's own eps, rounding alone would decide the smallest updates."""


def losses(folder: Path) -> list[float]:
    records = read_json_lines(folder / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_precision_auto_is_bfloat16_on_a_gpu_and_float32_on_a_cpu(device, tmp_path):
    """The run's own recipe says which, so that it is resumed alike anywhere."""
    run_training(tiny_recipe(tmp_path, training={"precision": "auto"}), tmp_path / "run")
    on_gpu = device.type == "cuda"
    decided = load_recipe(tmp_path / "run/recipe.yaml").training.precision
    assert decided == ("bf16" if on_gpu else "fp32")
    stored = load_file(tmp_path / "run/model/reward/model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16 if on_gpu else torch.float32}


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


def test_a_run_ended_by_sigterm_resumes_to_the_losses_of_a_whole_one(device, tmp_path):
    """Exit code 143 and a checkpoint; no step is missing or twice, and the export is there."""
    recipe = tiny_recipe(
        tmp_path,
        training={**CALM, "steps": 100},
        checkpoint={"every": 5},
        evaluation={"every": 50},
    )
    file, killed = tmp_path / "recipe.yaml", tmp_path / "killed"
    file.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "hafrm", "train", str(file), "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(killed.glob("checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert not (killed / "model").exists()
    run_training(recipe, killed, resume=True)
    run_training(recipe, tmp_path / "whole")
    assert (killed / "model/reward/golden_scores.jsonl").is_file()
    assert len(losses(killed)) == 100
    # Rounding grows from step to step, so the last ones say little.
    assert losses(killed)[:40] == pytest.approx(losses(tmp_path / "whole")[:40], abs=1e-2)


def write_wider_base(folder: Path) -> None:
    """Wide enough that activations, and not what the allocator rounds up to, decide the memory."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


@pytest.fixture
def all_memory_again():
    yield
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_that_runs_out_of_memory_is_repeated_in_halves_to_the_same_losses(
    device, tmp_path, caplog, all_memory_again
):
    """The card is limited to less than the large micro-batches take, and more than the small ones do."""
    if device.type != "cuda":
        pytest.skip("the memory of a CPU cannot be limited")
    write_wider_base(tmp_path)
    write_preferences(tmp_path / "train.jsonl", num=200)

    def trained(name: str, max_tokens: int) -> int:
        """Most bytes that the allocator held in the run."""
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        training = {**CALM, "steps": 3, "batch_size": 64, "max_tokens": max_tokens}
        run_training(tiny_recipe(tmp_path, training=training), tmp_path / name)
        return torch.cuda.max_memory_reserved()

    small, large = trained("small", 256), trained("large", 8192)
    assert large > 1.5 * small, "the two budgets hardly differ in memory"
    total = torch.cuda.get_device_properties(device).total_memory
    free_memory()
    torch.cuda.set_per_process_memory_fraction((small + large) / 2 / total)
    with caplog.at_level("WARNING", "hafrm"):
        trained("halved", 8192)
    assert "repeating it with 4096" in caplog.text
    assert losses(tmp_path / "halved") == pytest.approx(losses(tmp_path / "large"), abs=1e-3)


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
