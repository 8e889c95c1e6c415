"""Whole RLHF runs on tiny models: what they write, how they resume, when they stop, what they refuse."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hafrm.errors import CheckpointError, ConfigError, DataError, MemoryBudgetError, NumericsError
from hafrm.recipe_file import dump_recipe, load_as
from hafrm.rlhf import rlhf_run
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from hafrm.rlhf.rlhf_run import RlhfRun, prompts_of_step, score_rollouts
from hafrm.rlhf.train_policy import Ppo, train_policy
from hafrm.run_folder import RunFolder, read_json_lines
from hafrm.scoring.reward_model import RewardModel
from hafrm.training import setup
from support.chat_tokenizers import GEMMA_LIKE, chat_tokenizer, llama_like_tokenizer
from support.tiny_rlhf import tiny_rlhf, write_prompts, write_reward

RICH: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "alpha": 4.0},
    "reward": {"scale": True, "center": True, "clip": 2.0, "missing_eos_penalty": 0.5},
    "algorithm": {"kl_target": 0.5, "kl_horizon": 100},
}
"""Everything that is remembered between batches."""


def numbers(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_json_lines(folder)]


def assert_same_run(first: Path, second: Path) -> None:
    assert numbers(first / "metrics.jsonl") == numbers(second / "metrics.jsonl")
    last = RunFolder.open(first).latest_checkpoint()
    files = [f"checkpoints/{last.name}/{name}.safetensors" for name in ("model", "optimizer")]
    for file in (*files, "model/policy/model.safetensors", "samples.jsonl"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_a_reward_head_to_start_from_is_refused_where_a_policy_is_trained(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.reward_head.*unknown key"):
        tiny_rlhf(tmp_path, model={"reward_head": "new"})


@pytest.mark.parametrize("place", ["export_policy", "check_policy", "prove"])
def test_a_kill_within_the_export_costs_nothing(tmp_path, monkeypatch, place):
    """The folder as it is on disk right after a part of the export, resumed by another process."""
    recipe, run, killed = tiny_rlhf(tmp_path), tmp_path / "run", tmp_path / "killed"
    part = getattr(rlhf_run, place)

    def copied(*args, **options):
        done = part(*args, **options)
        shutil.copytree(run, killed)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(rlhf_run, place, copied)
        train_policy(recipe, run)
    train_policy(recipe, killed, resume=True)
    assert_same_run(run, killed)
    assert [path.name for path in killed.glob(".*.tmp")] == []
    assert not (killed / "model.unverified").exists()


def test_a_run_writes_what_others_read_and_exports_a_stock_policy(tmp_path):
    result = train_policy(
        tiny_rlhf(tmp_path), tmp_path / "run", gold=lambda _, text: float(len(text))
    )
    records = read_json_lines(tmp_path / "run/metrics.jsonl")
    batches = [r for r in records if r["kind"] == "rlhf"]
    assert [r["step"] for r in batches] == [1, 2, 3, 4]
    contract = ("reward", "kl", "length", "entropy", "clip_fraction", "value_loss", "policy_loss")
    assert all(isinstance(r[name], float) for r in batches for name in contract)
    held_out = [r for r in records if r["kind"] == "held-out"]
    assert [r["step"] for r in held_out] == [0, 2, 4]
    assert all(r["gold_low"] <= r["gold"] <= r["gold_high"] for r in held_out)
    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 3 * 4
    assert samples[0].keys() >= {"step", "prompt", "response", "reward", "kl"}
    _, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run/model/policy", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert result.selected_by == "gold"
    assert result.stopped is None
    names = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert not names & {".pt", ".bin", ".pkl"}


def stop_before_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As if the process died there: nothing of the batch is written down."""
    take = Ppo._take_batch

    def dying(self: Ppo, step: int) -> None:
        if step == number:
            raise KeyboardInterrupt
        take(self, step)

    monkeypatch.setattr(Ppo, "_take_batch", dying)


def test_a_run_that_died_is_resumed_to_the_same_bits(tmp_path, monkeypatch):
    """Checkpoints stand at 0 and 2; it dies before its fourth batch and repeats the third, whose line in
    metrics.jsonl has the means of the first two as well."""
    sections = {
        "checkpoint": {"every": 2},
        "evaluation": {"every": 4},
        "tracking": {"log_every": 3},
    }
    recipe = tiny_rlhf(tmp_path, **RICH, **sections)
    train_policy(recipe, tmp_path / "whole")
    with monkeypatch.context() as context:
        stop_before_batch(context, 3)
        with pytest.raises(KeyboardInterrupt):
            train_policy(recipe, tmp_path / "killed")
    assert len(numbers(tmp_path / "killed/metrics.jsonl")) == 2
    train_policy(recipe, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_process_that_is_asked_to_stop_is_resumed_to_the_same_bits(tmp_path):
    recipe = tiny_rlhf(tmp_path, training={"steps": 12}, evaluation={"every": 6})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "hafrm", "rlhf", str(file), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "killed").glob("checkpoints/step-3")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.terminate()
    assert process.wait(timeout=120) == 143
    assert not (tmp_path / "killed/model").exists()
    train_policy(recipe, tmp_path / "killed", resume=True)
    train_policy(recipe, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_resumed_run_may_not_change_what_it_computes(tmp_path):
    RunFolder.create(tmp_path / "run", dump_recipe(tiny_rlhf(tmp_path, training={"steps": 1})))
    with pytest.raises(CheckpointError, match="recipe differs"):
        train_policy(tiny_rlhf(tmp_path, training={"steps": 2}), tmp_path / "run", resume=True)


def test_a_resume_refuses_another_reward_model_other_prompts_and_another_gold_by_name(
    tmp_path, monkeypatch
):
    recipe, run = tiny_rlhf(tmp_path), tmp_path / "run"
    with monkeypatch.context() as context:
        stop_before_batch(context, 1)
        with pytest.raises(KeyboardInterrupt):
            train_policy(recipe, run)
    reward, prompts = tmp_path / "reward/model.safetensors", tmp_path / "prompts.jsonl"
    reward.write_bytes(reward.read_bytes()[:-4] + bytes(4))
    prompts.write_bytes(prompts.read_bytes().replace(b"Say", b"Name", 1))
    with pytest.raises(
        CheckpointError, match=r"--gold, .*prompts\.jsonl, reward\.model .*reward/mod"
    ):
        train_policy(recipe, run, resume=True, gold=lambda *_: 0.0)


def test_a_reward_that_is_not_finite_stops_before_anything_is_learned(tmp_path, monkeypatch):
    recipe = tiny_rlhf(tmp_path)
    run = RunFolder.create(tmp_path / "run", dump_recipe(recipe))
    ppo = Ppo(RlhfRun(recipe, run, None))
    head = ppo.rlhf.reward_model.model.reward_head
    take = Ppo._take_batch

    def broken(self: Ppo, step: int) -> None:
        if step == 1:
            torch.nn.init.constant_(head.weight, float("nan"))
        take(self, step)

    monkeypatch.setattr(Ppo, "_take_batch", broken)
    with pytest.raises(NumericsError, match="not finite"):
        ppo.train(resume=False)
    assert run.latest_checkpoint().name == "step-1"
    saved = load_file(run.latest_checkpoint() / "model.safetensors")
    for name, parameter in ppo.policy.named_parameters():
        assert torch.equal(parameter, saved[name])


def test_a_reward_model_with_another_tokenizer_is_asked_through_text(tmp_path):
    tokenizer = llama_like_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    other = write_reward(tmp_path, "other", tokenizer=tokenizer)
    recipe = tiny_rlhf(tmp_path, reward={"model": str(other)})
    rlhf = RlhfRun(recipe, RunFolder.create(tmp_path / "run", dump_recipe(recipe)), None)
    rollouts = rlhf.actor.write(rlhf.prompts_of_step(0), 2, seed=3)
    model = RewardModel.from_pretrained(other)
    assert model.encoder.tokenizer.get_vocab() != rlhf.actor.encoder.tokenizer.get_vocab()
    expected = [
        model.score([m._asdict() for m in rollout.prompt.messages], text)
        for rollout in rollouts
        for text in rollout.texts
    ]
    assert score_rollouts(rlhf.reward_model, rollouts).tolist() == pytest.approx(expected, abs=1e-5)


def test_prompts_that_the_reward_models_template_refuses_are_left_out_before_the_first_batch(
    tmp_path,
):
    """As a system turn with Gemma: the policy's own template may take it."""
    rows = [{"prompt": [{"role": "user", "content": f"Say {i}"}]} for i in range(40)]
    for number in (7, 23, 31):
        rows[number]["prompt"].insert(0, {"role": "system", "content": "Be kind"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = write_reward(tmp_path, "other", tokenizer=chat_tokenizer(template=GEMMA_LIKE))
    data = {"max_bad_fraction": 0.2}
    recipe = tiny_rlhf(tmp_path, reward={"model": str(other)}, data=data)
    rlhf = RlhfRun(recipe, RunFolder.create(tmp_path / "run", dump_recipe(recipe)), None)
    used = [*rlhf.train_prompts, *rlhf.held_out_prompts]
    assert len(used) == 37 and {p.messages[0].role for p in used} == {"user"}
    strict = tiny_rlhf(tmp_path, reward={"model": str(other)}, data={"max_bad_fraction": 0.0})
    with pytest.raises(DataError, match="system"):
        RlhfRun(strict, RunFolder.create(tmp_path / "strict", dump_recipe(strict)), None)


def test_long_prompts_are_left_out_and_held_out_ones_never_trained_on(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl")
    lines = (tmp_path / "prompts.jsonl").read_text()
    long = json.dumps({"prompt": "Say it. " * 40}) + "\n"
    (tmp_path / "prompts.jsonl").write_text(long + lines)
    recipe = tiny_rlhf(tmp_path)
    rlhf = RlhfRun(recipe, RunFolder.create(tmp_path / "run", dump_recipe(recipe)), None)
    held_out = {prompt.messages for prompt in rlhf.held_out_prompts}
    assert len(rlhf.train_prompts) + len(held_out) == 24
    asked = {prompt.messages for step in range(20) for prompt in rlhf.prompts_of_step(step)}
    assert len(asked) == len(rlhf.train_prompts)
    assert not held_out & asked
    with pytest.raises(DataError, match=r"no prompt of at most 3 tokens"):
        train_policy(tiny_rlhf(tmp_path, data={"max_prompt_length": 3}), tmp_path / "none")
    with pytest.raises(ConfigError, match="but the model takes 256"):
        train_policy(tiny_rlhf(tmp_path, data={"max_prompt_length": 255}), tmp_path / "long")


@pytest.mark.parametrize(
    "sections", [{}, {"lora": {"rank": 2, "alpha": 4.0}}], ids=["full", "lora"]
)
def test_bf16_and_checkpointed_activations_train_and_export(tmp_path, monkeypatch, sections):
    """auto is bf16 where the device computes in it, and the run's own recipe says so."""
    monkeypatch.setattr(setup, "has_bfloat16", lambda _: True)
    training = {"steps": 1, "precision": "auto", "gradient_checkpointing": True}
    train_policy(tiny_rlhf(tmp_path, training=training, **sections), tmp_path / "run")
    recorded = load_as(RlhfRecipe, tmp_path / "run/recipe.yaml")
    assert recorded.training.precision == "bf16"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model/policy")
    assert stock.dtype == torch.bfloat16
    batches = [r for r in numbers(tmp_path / "run/metrics.jsonl") if r["kind"] == "rlhf"]
    assert abs(batches[0]["kl"]) < 0.1  # before the first update policy and reference are one
    assert all(np.isfinite(r["policy_loss"]) for r in batches)


def test_a_batch_that_does_not_fit_says_how_to_resume(tmp_path, monkeypatch):
    """Before the first checkpoint, too: such a run starts over."""
    recipe = tiny_rlhf(tmp_path, training={"steps": 1})
    with monkeypatch.context() as context:
        context.setattr(Ppo, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_policy(recipe, tmp_path / "run")

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as context:
        context.setattr(Ppo, "_take_batch", full)
        with pytest.raises(MemoryBudgetError, match=r"--resume .* training\.max_tokens=64"):
            train_policy(recipe, tmp_path / "run", resume=True)
    smaller = tiny_rlhf(tmp_path, training={"steps": 1, "max_tokens": 64})
    assert train_policy(smaller, tmp_path / "run", resume=True).num_steps == 1
    assert [r["step"] for r in numbers(tmp_path / "run/metrics.jsonl")] == [0, 1, 1]


def test_every_prompt_is_asked_once_a_pass_and_each_pass_has_an_order_of_its_own():
    passes = [
        [int(i) for step in range(5 * e, 5 * e + 5) for i in prompts_of_step(10, step, 2, seed=3)]
        for e in range(3)
    ]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert passes[0] != passes[1] != passes[2]
    assert prompts_of_step(3, 0, 7, seed=0).tolist() == prompts_of_step(3, 0, 7, seed=0).tolist()
    assert sorted(prompts_of_step(3, 0, 6, seed=0).tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_response_longer_than_the_reward_model_takes_is_scored_cut_and_counted(tmp_path, caplog):
    short = write_reward(tmp_path, "short")
    config = json.loads((short / "config.json").read_text())
    # a prompt has 17 tokens or so, and a response up to 6 and its end
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    recipe = tiny_rlhf(tmp_path, reward={"model": str(short)}, training={"steps": 1})
    result = train_policy(recipe, tmp_path / "run")
    assert result.num_cut > 0
    assert "are scored cut" in caplog.text
