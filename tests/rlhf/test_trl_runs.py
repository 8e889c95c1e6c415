"""RLOO and GRPO through TRL: the recipe in its words, and whole runs (slow, TRL takes long to load)."""

import importlib.util
import json

import pytest

from hafrm.errors import CheckpointError, ConfigError
from hafrm.rlhf.train_policy import train_policy
from hafrm.rlhf.trl_runs import micro_batch, trl_options
from hafrm.run_folder import read_json_lines
from support.tiny_rlhf import tiny_rlhf

RLOO = {"name": "rloo", "epochs": 2, "clip": 0.3, "kl_coefficient": 0.02}


def test_a_recipe_is_said_in_trl_s_words(tmp_path):
    """4 steps of 2 updates each are 8 of TRL's; a batch of 8 in one forward of 46 tokens each."""
    recipe = tiny_rlhf(tmp_path, algorithm=RLOO, training={"max_tokens": 8 * 46})
    options = trl_options(recipe)
    assert options["max_steps"] == 8
    assert options["num_iterations"] == options["logging_steps"] == 2
    assert (options["per_device_train_batch_size"], options["gradient_accumulation_steps"]) == (
        8,
        1,
    )
    assert (options["epsilon"], options["beta"], options["num_generations"]) == (0.3, 0.02, 2)
    assert options["save_strategy"] == "no"


@pytest.mark.parametrize(("budget", "size"), [(1, 1), (92, 2), (46 * 7, 4), (10**6, 8)])
def test_micro_batches_divide_the_batch_and_fit_the_budget(tmp_path, budget, size):
    recipe = tiny_rlhf(tmp_path, algorithm=RLOO, training={"max_tokens": budget})
    assert micro_batch(recipe) == size


def test_a_trl_run_cannot_be_resumed_and_says_why(tmp_path):
    with pytest.raises(CheckpointError, match="pickles"):
        train_policy(tiny_rlhf(tmp_path, algorithm=RLOO), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"responses_per_prompt is 1"):
        tiny_rlhf(tmp_path, algorithm=RLOO, training={"responses_per_prompt": 1})


def test_without_trl_its_algorithms_name_the_extra(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trl" else find(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'hafrm\[rlhf\]'"):
        train_policy(tiny_rlhf(tmp_path, algorithm=RLOO), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_a_run_writes_the_same_things_as_ours(tmp_path, name):
    recipe = tiny_rlhf(tmp_path, algorithm=RLOO | {"name": name})
    result = train_policy(recipe, tmp_path / "run", gold=lambda _, text: float(len(text)))
    records = read_json_lines(tmp_path / "run/metrics.jsonl")
    batches = [r for r in records if r["kind"] == "rlhf"]
    assert [r["step"] for r in batches] == [1, 2, 3, 4]
    for key in ("reward", "kl", "length", "entropy", "clip_fraction", "policy_loss"):
        assert all(isinstance(r[key], float) for r in batches), key
    assert [r["step"] for r in records if r["kind"] == "held-out"] == [0, 2, 4]
    assert (tmp_path / "run/model/policy/model.safetensors").is_file()
    assert result.num_steps == 4
    assert json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])["step"] == 0
    leftovers = {p.name for p in (tmp_path / "run").iterdir()}
    assert not {"trl", "training_args.bin"} & leftovers
