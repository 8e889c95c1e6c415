"""Whole runs on tiny data: every method trains, exports what stock transformers loads, and resumes."""

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hafrm.cli import main
from hafrm.errors import CheckpointError, ConfigError, DataError, MemoryBudgetError
from hafrm.preferences import Message
from hafrm.recipe_file import dump_recipe
from hafrm.run_folder import RunFolder, read_json_lines
from hafrm.scoring.reward_model import PolicyModel, RewardModel
from hafrm.training import loop, parallel
from hafrm.training.loop import StoppedError, run_training
from hafrm.training.step import MEASURES
from support import forked
from support.live_bytes import short_of_memory
from support.tiny_runs import tiny_recipe

CLOCKED = {"comparisons_per_second", "tokens_per_second"}


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    records = read_json_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in CLOCKED} for record in records]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and random state of the last checkpoint."""
    checkpoint = RunFolder(folder).checkpoints()[-1]
    files = ("model.safetensors", "optimizer.safetensors")
    return {
        f"{checkpoint.name}/{n}": t for f in files for n, t in load_file(checkpoint / f).items()
    }


def assert_same_run(first: Path, second: Path) -> None:
    """The same losses and the same state at the end, to the bit."""
    assert metrics(first) == metrics(second)
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def no_export(_: loop.Job) -> None:
    """For a run whose checkpoints are looked at."""


@pytest.mark.parametrize("method", ["haf", "bt", "dpo", "dpo-logits"])
def test_every_method_trains_and_exports_what_stock_transformers_loads(tmp_path, finished, method):
    model = finished / "model"
    if method != "haf":
        result = run_training(tiny_recipe(tmp_path, method={"name": method}), tmp_path / "run")
        assert result.num_steps == 6
        assert result.best.keys() >= {"accuracy", "loss"}
        model = tmp_path / "run/model"
    assert (model / "reward").is_dir() == (method in ("haf", "bt"))
    assert (model / "policy").is_dir() == (method != "bt")
    if (model / "reward").is_dir():
        stock, info = AutoModelForSequenceClassification.from_pretrained(
            model / "reward", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert stock.score.weight.shape == (1, 32)
        assert (model / "reward/golden_scores.jsonl").read_text().count("\n") > 2
    if (model / "policy").is_dir():
        _, info = AutoModelForCausalLM.from_pretrained(model / "policy", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        PolicyModel.from_pretrained(model / "policy").score("Say sun.", "sun")


def test_training_learns_the_rule_of_the_data(tmp_path):
    """Chosen responses say "Here you are", so twenty steps are plenty."""
    training = {"steps": 20, "batch_size": 8}
    recipe = tiny_recipe(
        tmp_path, method={"name": "bt"}, training=training, evaluation={"every": 0}
    )
    result = run_training(recipe, tmp_path / "run", finish=no_export)
    assert result.best["accuracy"] == 1.0
    assert result.best["margin"] > 1.0


def test_a_run_out_of_memory_says_how_to_resume_and_then_equals_one_of_the_smaller_budget(
    tmp_path, monkeypatch
):
    smaller = tiny_recipe(tmp_path, training={"max_tokens": 128})
    run_training(smaller, tmp_path / "small", finish=no_export)
    with monkeypatch.context() as context:
        short_of_memory(context, limit=128, training=True)
        with pytest.raises(MemoryBudgetError, match=r"--resume .*/run training\.max_tokens=128 "):
            run_training(tiny_recipe(tmp_path), tmp_path / "run")
        run_training(smaller, tmp_path / "run", resume=True, finish=no_export)
    assert_same_run(tmp_path / "small", tmp_path / "run")


def test_a_finished_run_is_neither_overwritten_nor_continued_otherwise_nor_changed(finished):
    """A resumed run may change what changes no gradient, and nothing else."""
    recipe, before = tiny_recipe(finished.parent), tensors(finished)
    with pytest.raises(CheckpointError):
        run_training(recipe, finished)
    other = tiny_recipe(finished.parent, training={"learning_rate": 1e-4})
    with pytest.raises(CheckpointError, match=r"recipe differs.*only change training\.max_tokens"):
        run_training(other, finished, resume=True)
    run_training(recipe, finished, resume=True)
    after = tensors(finished)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_lora_trains_the_reward_head_and_its_merged_export_scores_the_same(tmp_path, monkeypatch):
    """In memory against exported and merged: float32, 1e-5."""
    prompt, responses = (Message("user", "Say sun."),), ["sun", "I would say moon and so on"]
    seen = {}

    def keep(run, recipe, data, model):
        seen["trainable"] = {n for n, p in model.named_parameters() if p.requires_grad}
        seen["scores"] = RewardModel(model, data.encoder).score(prompt, responses)
        return export(run, recipe, data, model)

    export = loop.export_run
    monkeypatch.setattr(loop, "export_run", keep)
    recipe = tiny_recipe(tmp_path, lora={"rank": 4, "alpha": 8.0}, training={"steps": 2})
    run_training(recipe, tmp_path / "run")
    assert "reward_head.weight" in seen["trainable"]
    assert all("lora_" in n or n == "reward_head.weight" for n in seen["trainable"])
    rm = RewardModel.from_pretrained(tmp_path / "run/model/reward")
    assert rm.score(prompt, responses) == pytest.approx(seen["scores"], abs=1e-5)


@pytest.mark.parametrize("training", [{"gradient_checkpointing": True}, {"sharing": "off"}])
def test_how_a_step_is_run_changes_no_loss(tmp_path, finished, training):
    recipe = tiny_recipe(tmp_path, training=training)
    run_training(recipe, tmp_path / "other", finish=no_export)
    for ours, theirs in zip(metrics(finished), metrics(tmp_path / "other"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_adapters_learn_the_same_under_gradient_checkpointing(tmp_path):
    """trl#2486."""
    for folder, checkpointing in (("plain", False), ("checkpointed", True)):
        training = {"gradient_checkpointing": checkpointing}
        recipe = tiny_recipe(tmp_path, training=training, lora={"rank": 4})
        run_training(recipe, tmp_path / folder, finish=no_export)
    one, other = (metrics(tmp_path / folder) for folder in ("plain", "checkpointed"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], abs=1e-5)
    assert one[0]["loss"] != pytest.approx(one[-1]["loss"], abs=1e-3)


def test_bf16_trains_and_exports_bf16(tmp_path):
    recipe = tiny_recipe(tmp_path, training={"precision": "bf16", "steps": 1})
    run_training(recipe, tmp_path / "run")
    for file in (tmp_path / "run/model").glob("*/model.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}
    assert {t.dtype for n, t in tensors(tmp_path / "run").items() if "head" in n} == {torch.float32}


def test_what_is_exported_is_the_best_validated_step(tmp_path, monkeypatch):
    """Accuracies 0.5, 0.9, 0.7 at steps 2, 4, 6: step 4, whose weights its checkpoint holds."""
    told = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(
        loop, "validate", lambda *_, **__: {"accuracy": next(told), "loss": 0.5, "margin": 0.0}
    )
    recipe = tiny_recipe(tmp_path, evaluation={"every": 2}, checkpoint={"every": 0, "keep": 1})
    result = run_training(recipe, tmp_path / "run")
    assert (result.best_step, result.best["accuracy"]) == (4, 0.9)
    saved = load_file(tmp_path / "run/checkpoints/step-4/model.safetensors")
    exported = load_file(tmp_path / "run/model/reward/model.safetensors")
    assert torch.equal(exported["score.weight"], saved["reward_head.weight"])


def test_an_unknown_method_and_a_length_that_the_model_lacks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean haf"):
        run_training(tiny_recipe(tmp_path, method={"name": "hafr"}), tmp_path / "a")
    long = tiny_recipe(tmp_path, data={"max_length": 500}, training={"max_tokens": 1000})
    with pytest.raises(ConfigError, match="256 tokens"):
        run_training(long, tmp_path / "b")


def test_lengths_that_would_change_the_rotary_factors_of_other_sequences_are_refused(tmp_path):
    """longrope takes its long factors for a whole row that holds one sequence of more than 32 tokens."""
    recipe = tiny_recipe(tmp_path)  # of up to 64
    file = tmp_path / "base/config.json"
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = {**json.loads(file.read_text()), "rope_parameters": {**rope, **factors}}
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="the model takes 32 tokens"):
        run_training(recipe, tmp_path / "run")


def test_a_run_stopped_after_every_step_equals_an_uninterrupted_one_and_pickles_nothing(
    tmp_path, monkeypatch
):
    """HAF with NormBT's running mean, and a logging interval of two steps: a checkpoint holds both."""

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for owner, name in ((torch, "save"), (torch, "load"), (pickle, "load"), (pickle, "dump")):
        monkeypatch.setattr(owner, name, refuse)
    sections = {"training": {"steps": 3}, "method": {"reward_loss": "normbt"}}
    sections["tracking"] = {"log_every": 2}
    recipe = tiny_recipe(tmp_path, evaluation={"every": 2}, **sections)
    run_training(recipe, tmp_path / "whole", finish=no_export)
    monkeypatch.setattr(loop.StopSignal, "agreed", lambda *_: True)
    for step in range(1, 3):
        with pytest.raises(StoppedError, match=f"after step {step} of 3.*--resume"):
            run_training(recipe, tmp_path / "parts", resume=step > 1)
    run_training(recipe, tmp_path / "parts", resume=True, finish=no_export)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_another_number_of_ranks_takes_over_all_sums_of_a_logging_interval(tmp_path):
    """Two ranks whose losses are 1 and 2: 3 on one rank; with three ranks, nothing on the last."""
    of_ranks = [[[float(n)] * len(MEASURES) + [0.5]] for n in (1, 2)]
    recipe = tiny_recipe(tmp_path)
    for rank, size, loss in ((0, 1, 3.0), (0, 3, 1.0), (1, 3, 2.0), (2, 3, 0.0)):
        metrics = loop.MetricsLog(RunFolder(tmp_path), recipe, 6)
        metrics.resume(of_ranks, loop.parallel.Ranks(rank, size, torch.device("cpu")))
        ((*sums, norm),) = metrics.interval()
        assert (set(sums), norm) == ({loss}, 0.5)


def test_a_resume_refuses_other_data_another_base_and_another_template_by_name(
    tmp_path, monkeypatch
):
    recipe, run = tiny_recipe(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "agreed", lambda *_: True)
        with pytest.raises(StoppedError):
            run_training(recipe, run)
    ids = "the comparisons as token ids"
    for name, old, new, words in (
        ("train.jsonl", b"Here", b"Look", ["train.jsonl", ids]),
        ("base/model.safetensors", b"", None, ["model.path ", "base/model.safetensors"]),
        ("base/chat_template.jinja", b"", b"x", ["chat_template.jinja", "the chat template", ids]),
    ):
        file = tmp_path / name
        content = file.read_bytes()
        changed = content[:-4] + bytes(4) if new is None else content.replace(old, new, 1)
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=".*".join(words)):
            run_training(recipe, run, resume=True)
        file.write_bytes(content)
    run_training(recipe, run, resume=True, finish=no_export)


def test_a_start_that_failed_is_repeated_with_the_same_command(tmp_path):
    recipe, (row, *rows) = (
        tiny_recipe(tmp_path),
        (tmp_path / "train.jsonl").read_bytes().split(b"\n"),
    )
    (tmp_path / "train.jsonl").write_bytes(b"no row\n" * 40 + row)
    with pytest.raises(DataError, match=r"bad_rows\.jsonl"):
        run_training(recipe, tmp_path / "run")
    assert (tmp_path / "run/bad_rows.jsonl").is_file()
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([row, *rows]))
    run_training(recipe, tmp_path / "run", finish=no_export)


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path, finished, monkeypatch):
    recipe = tiny_recipe(tmp_path, checkpoint={"every": 1, "keep": 6})
    told = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "agreed", lambda *_: next(told))
        with pytest.raises(StoppedError):
            run_training(recipe, tmp_path / "run")
    broken = tmp_path / "run/checkpoints/step-3/model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    run_training(recipe, tmp_path / "run", resume=True, finish=no_export)
    assert_same_run(finished, tmp_path / "run")


def test_a_process_killed_and_then_stopped_is_resumed_to_the_same_bits(
    tmp_path, monkeypatch, capfd
):
    """A real process is killed once a checkpoint stands; SIGTERM saves, and the command exits with 143."""
    steps = {"training": {"steps": 8}, "evaluation": {"every": 0}}
    recipe, run, file = (
        tiny_recipe(tmp_path, **steps),
        tmp_path / "killed",
        tmp_path / "recipe.yaml",
    )
    file.write_text(dump_recipe(recipe))
    arguments = (str(file), "--out", str(run))
    process = forked.start(tmp_path / "log", forked.train_slowly, *arguments)
    deadline = time.monotonic() + 60
    while not any(run.glob("checkpoints/step-*")):
        assert process.is_alive(), (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL

    def signalled(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*args, **options)

    take_step = loop.take_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", signalled)
        patch.setattr(sys, "argv", ["hafrm", "train", "--resume", str(run)])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 143
    assert "SIGTERM: will stop and save after this step" in capfd.readouterr().err
    assert not (run / "model").exists()
    run_training(recipe, run, resume=True, finish=no_export)
    run_training(recipe, tmp_path / "whole", finish=no_export)
    assert_same_run(tmp_path / "whole", run)


def test_only_the_first_rank_of_a_node_announces_that_a_signal_stops_the_run(monkeypatch, capfd):
    monkeypatch.setenv("LOCAL_RANK", "1")
    stop = parallel.StopSignal()
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM"
    assert capfd.readouterr().err == ""


def test_a_signal_is_remembered_where_nobody_reads_what_is_said(monkeypatch):
    """`hafrm train ... | tee log`: ctrl-C ends tee first."""

    def broken(*_):
        raise BrokenPipeError

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(parallel.os, "write", broken)
    stop = parallel.StopSignal()
    with stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        assert signal.getsignal(signal.SIGINT) is before  # a second one stops at once
    assert signal.getsignal(signal.SIGINT) is before


def test_provenance_and_metrics_say_what_was_run(finished):
    session = json.loads((finished / "provenance.json").read_text())["sessions"][0]
    assert session["seed"] == 0
    assert session["counts"]["train_comparisons"] > 20
    assert [digest[:7] for digest in session["data"].values()] == ["sha256:"]
    records = read_json_lines(finished / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [3, 6]
    assert {"loss", "reward_loss", "policy_loss", "grad_norm", "learning_rate"} <= records[0].keys()
    for record in records:
        for name in ("accuracy", "implicit_accuracy"):
            assert record[f"{name}_low"] <= record[name] <= record[f"{name}_high"]
            assert record[f"{name}_low"] < record[f"{name}_high"]


def test_a_missing_tracker_names_the_extra_and_tensorboard_gets_its_file(tmp_path):
    with pytest.raises(ConfigError, match=r"pip install 'hafrm\[mlflow\]'"):
        run_training(tiny_recipe(tmp_path, tracking={"report_to": ["mlflow"]}), tmp_path / "a")
    pytest.importorskip("tensorboard")
    recipe = tiny_recipe(tmp_path, tracking={"report_to": ["tensorboard"]}, method={"name": "bt"})
    run_training(recipe, tmp_path / "b", finish=no_export)
    assert list((tmp_path / "b").rglob("events.out.tfevents*"))
