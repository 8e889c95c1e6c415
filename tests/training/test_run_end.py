"""The end of a run: nothing trained is lost to a proof, and the proof has the memory and the threads."""

import gc
import json
import os
import shutil
import subprocess
import weakref

import pytest
import torch

from hafrm.errors import NumericsError, VerificationError
from hafrm.export import plain_model, proof
from hafrm.export.checklist import replay_directory
from hafrm.training import loop, run_export
from hafrm.training.loop import run_training
from support.exports import record_golden
from support.tiny_runs import tiny_recipe


def test_a_run_whose_proof_fails_keeps_its_models_and_resume_repeats_the_proof(
    tmp_path, monkeypatch, finished
):
    errors = iter([NumericsError("differ by 2e-4"), torch.OutOfMemoryError("CUDA out of memory")])

    def fail(*_):
        raise next(errors)

    recipe, run = tiny_recipe(finished.parent), shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "model")
    with monkeypatch.context() as patch:
        patch.setattr(run_export, "write_golden", fail)
        for error in ("differ by 2e-4", "CUDA out of memory"):
            with pytest.raises(VerificationError, match=f"{error}.*kept as .*unverified.*--resume"):
                run_training(recipe, run, resume=True)
    assert not (run / "model").exists()
    unverified = run / "model.unverified"
    assert {p.name for p in unverified.iterdir()} == {"reward", "policy"}
    before = (unverified / "reward/model.safetensors").read_bytes()
    run_training(recipe, run, resume=True)
    assert not unverified.exists()
    assert (run / "model/reward/model.safetensors").read_bytes() == before
    assert (run / "model/reward/README.md").is_file()


def test_weights_and_optimizer_are_gone_before_the_proof(tmp_path, monkeypatch):
    """Some 60,000 weights are trained; at the proof no tensor of the run's may be left that is as large
    as one of its matrices, nor the optimizer."""
    seen = {}
    start_model, build_optimizer = loop.start_model, loop.build_optimizer

    def model_of(*arguments):
        seen["model"] = start_model(*arguments)
        return seen["model"]

    def optimizer_of(*arguments, **options):
        optimizer = build_optimizer(*arguments, **options)
        seen["optimizer"] = weakref.ref(optimizer)
        return optimizer

    def look(_):
        gc.collect()
        seen["optimizer"] = seen["optimizer"]()
        seen["parameters"] = list(seen["model"].parameters())
        return {}

    monkeypatch.setattr(loop, "start_model", model_of)
    monkeypatch.setattr(loop, "build_optimizer", optimizer_of)
    monkeypatch.setattr(run_export, "check_golden", look)
    run_training(tiny_recipe(tmp_path, training={"steps": 1}), tmp_path / "run")
    assert seen["optimizer"] is None
    assert seen["parameters"] == []


@pytest.fixture(scope="module")
def reward(finished, tmp_path_factory):
    """A finished run's reward model."""
    return shutil.copytree(finished / "model/reward", tmp_path_factory.mktemp("reward") / "reward")


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
    record_golden(reward)
    assert max(replay_directory(reward).differences.values()) < 1e-5


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
