"""The end of a run: nothing trained is lost to a proof, and the proof has the memory and the threads."""

import gc
import json
import os
import subprocess
import weakref
from pathlib import Path

import pytest
import torch

from hafrm.errors import NumericsError, VerificationError
from hafrm.export import plain_model, proof
from hafrm.export.checklist import replay_directory
from hafrm.training import loop, run_export
from hafrm.training.loop import run_training
from support.tiny_runs import tiny_recipe


def replay(folder: Path) -> dict[str, float]:
    """The golden check without a process of its own."""
    return replay_directory(folder).differences


def test_a_run_whose_proof_fails_keeps_its_models_and_resume_repeats_the_proof(
    tmp_path, monkeypatch
):
    def disagree(_):
        raise NumericsError("differ by 2e-4")

    recipe = tiny_recipe(tmp_path)
    run = tmp_path / "run"
    monkeypatch.setattr(run_export, "check_golden", disagree)
    with pytest.raises(VerificationError, match=r"2e-4.*kept as .*model\.unverified.*--resume"):
        run_training(recipe, run)
    assert not (run / "model").exists()
    kept = run / "model.unverified"
    assert {p.name for p in kept.iterdir()} == {"reward", "policy", "fused.json"}
    before = (kept / "reward/model.safetensors").read_bytes()
    monkeypatch.setattr(run_export, "check_golden", replay)
    run_training(recipe, run, resume=True)
    assert not kept.exists()
    assert (run / "model/reward/model.safetensors").read_bytes() == before
    assert (run / "model/reward/README.md").is_file()


def test_a_proof_that_runs_out_of_memory_keeps_the_models_too(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_export, "write_golden", fail)
    with pytest.raises(VerificationError, match="out of memory"):
        run_training(tiny_recipe(tmp_path, method={"name": "bt"}), tmp_path / "run")
    assert (tmp_path / "run/model.unverified/reward/model.safetensors").is_file()


def test_weights_and_optimizer_are_gone_before_the_proof(tmp_path, monkeypatch):
    """Some 60,000 weights are trained; at the proof no tensor of the run's may be left that is as large
    as one of its matrices, nor the optimizer."""
    seen = {}
    build_model, build_optimizer = loop.build_model, loop.build_optimizer

    def model_of(*arguments):
        seen["model"] = build_model(*arguments)
        return seen["model"]

    def optimizer_of(*arguments, **options):
        optimizer = build_optimizer(*arguments, **options)
        seen["optimizer"] = weakref.ref(optimizer)
        return optimizer

    def look(_):
        gc.collect()
        seen["optimizer"] = seen["optimizer"]()
        seen["devices"] = {p.device.type for p in seen["model"].parameters()}
        return {}

    monkeypatch.setattr(loop, "build_model", model_of)
    monkeypatch.setattr(loop, "build_optimizer", optimizer_of)
    monkeypatch.setattr(run_export, "check_golden", look)
    run_training(tiny_recipe(tmp_path), tmp_path / "run")
    assert seen["optimizer"] is None
    assert seen["devices"] == {"meta"}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A finished run's reward model."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_export, "check_golden", lambda _: {})
        run_training(tiny_recipe(folder, method={"name": "bt"}), folder / "run")
    return folder / "run/model/reward"


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**40))


def test_the_proof_runs_on_the_gpu_only_where_float32_fits_with_a_margin(reward, monkeypatch):
    """Room is 1.3 times 4 bytes a weight and 2 GiB; less, and both halves of the proof are the CPU's."""
    pretend_gpu(monkeypatch, 2**31 + 5 * 1000)
    assert plain_model.device_for(1000).type == "cpu"
    pretend_gpu(monkeypatch, 2**31 + 2**20)
    assert plain_model.device_for(1000).type == "cuda"
    pretend_gpu(monkeypatch, 0)
    proof.write_golden(reward, [])
    assert max(replay(reward).values()) < 1e-5


def test_the_replay_has_all_threads_where_torchrun_left_one_to_each_rank(reward, monkeypatch):
    """Alone a process keeps its number; of several ranks, whose others have ended, it takes all."""
    given = {}

    def run(command, **options):
        given.update(options["env"])
        return subprocess.CompletedProcess(command, 0, json.dumps({"ok": True, "differences": {}}))

    monkeypatch.setattr(proof.subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    proof.check_golden(reward)
    assert given["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    proof.check_golden(reward)
    assert given["OMP_NUM_THREADS"] == "96"
