"""RLOO and GRPO through TRL: the recipe in its words, and whole runs (slow, TRL takes long to load)."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel
from hafrm.errors import CheckpointError, ConfigError, ModelError
from hafrm.rlhf.actor import Actor
from hafrm.rlhf.rlhf_run import RlhfRun, by_name, input_digests, load_rewards, score_texts
from hafrm.rlhf.train_policy import train_policy
from hafrm.rlhf.trl_runs import micro_batch, start_reference, trl_options
from hafrm.run_folder import read_json_lines
from hafrm.scoring.loading import load_tokenizer
from hafrm.scoring.reward_model import IMPLICIT_RULE, PolicyModel, RewardModel
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
    with pytest.raises(ConfigError, match=r"model\.policy_from needs algorithm\.name ppo"):
        tiny_rlhf(tmp_path, algorithm=RLOO, model={"policy_from": "other"})


def test_keys_that_only_ppo_reads_are_known_by_their_descriptions(tmp_path):
    recipe = tiny_rlhf(tmp_path, algorithm=RLOO | {"lam": 0.9}, reward={"center": True})
    assert recipe.ppo_keys == ["reward.center", "algorithm.mini_batches", "algorithm.lam"]


def test_the_reference_of_trl_gets_the_weights_that_the_policy_starts_from(tmp_path):
    """Whatever its config says it came from: here other weights, under adapters that add nothing yet."""
    recipe = tiny_rlhf(tmp_path, algorithm=RLOO, lora={"rank": 2})
    actor = Actor.load(recipe, Encoder(load_tokenizer(recipe.model), max_length=64))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = {name: value.clone() for name, value in reference.state_dict().items()}
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.zero_()
    start_reference(reference, actor.causal)
    assert all(torch.equal(reference.state_dict()[n], value) for n, value in expected.items())


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


@pytest.mark.slow
def test_a_merged_start_has_no_kl_and_few_prompts_still_make_batches(tmp_path):
    """TRL reads its reference from the base of the adapter, and takes no step without a whole batch."""
    tiny_rlhf(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    recipe = tiny_rlhf(
        tmp_path,
        model={"path": str(tmp_path / "adapter")},
        algorithm=RLOO | {"epochs": 1},
        training={"learning_rate": 1e-9, "steps": 2, "batch_size": 64, "max_tokens": 2048},
    )
    assert train_policy(recipe, tmp_path / "run").num_steps == 2
    records = read_json_lines(tmp_path / "run/metrics.jsonl")
    assert [r["kl"] for r in records] == pytest.approx([0.0] * 4, abs=1e-3)


GRPO = {"name": "grpo", "epochs": 1, "kl_coefficient": 0.02}


@pytest.fixture
def both(exported, tmp_path):
    """A model with both heads, whose policy names the tiny policy as its reference."""
    folder = shutil.copytree(exported, tmp_path / "both")
    rule = {"reference": str(tmp_path / "base"), "beta": 0.1, "per_token": False}
    (folder / "policy" / IMPLICIT_RULE).write_text(json.dumps(rule))
    return folder


def two_rewards(folder, both, weight=0.5, **sections):
    reward = {"model": str(both), "implicit_weight": weight}
    return tiny_rlhf(folder, reward=reward, **{"algorithm": GRPO, **sections})


def test_the_implicit_reward_is_a_second_one_of_grpo_alone(tmp_path, both):
    options = trl_options(two_rewards(tmp_path, both))
    assert options["multi_objective_aggregation"] == "normalize_then_sum"
    assert options["reward_weights"] == [1, 0.5]
    assert "reward_weights" not in trl_options(two_rewards(tmp_path, both, weight=0.0))
    for name in ("ppo", "rloo"):
        with pytest.raises(
            ConfigError, match=rf"needs algorithm.name grpo: {name} learns from one"
        ):
            two_rewards(tmp_path, both, algorithm={"name": name})
    with pytest.raises(ModelError, match="gives reward, not implicit"):
        load_rewards(str(both / "reward"), 0.5)


def test_both_rewards_come_from_one_forward_and_are_those_of_each_head(tmp_path, both, monkeypatch):
    two_rewards(tmp_path, both)  # writes the reference
    scorer, forwards, forward = load_rewards(str(both), 0.5), [], HybridModel.forward

    def counting(self, layout):
        forwards.append(self)
        return forward(self, layout)

    prompts, texts = ["Say sun.", "And sea?"], [["sun", "the sea"], ["sea"]]
    monkeypatch.setattr(HybridModel, "forward", counting)
    rewards, num_cut = score_texts(scorer, prompts, texts)
    assert (rewards.shape, num_cut) == ((3, 2), 0)
    assert forwards == [scorer.model, scorer.reference]
    for name, head in (("reward", RewardModel), ("implicit", PolicyModel)):
        own, _ = score_texts(head.from_pretrained(both), prompts, texts)
        assert by_name(rewards)[name] == pytest.approx(own, abs=1e-5), name
        assert own.std() > 1e-3, name


def test_a_run_of_two_rewards_depends_on_the_reference_too(tmp_path, both):
    def digests(weight):
        return input_digests(two_rewards(tmp_path, both, weight), with_gold=False)["inputs"]

    more = set(digests(0.5)) - set(digests(0.0))
    assert f"reward.model {tmp_path / 'base' / 'model.safetensors'}" in more


PAIRS = np.array([(1, 10), (0, 0), (1, 0), (0, 10), (1, 5), (0, 5), (3, 3), (3, 3)], np.float32)
"""(reward, implicit) of two responses to each of four prompts: both agree, differ, one ties, both tie."""


@pytest.mark.slow
def test_advantages_are_gdpo_s(tmp_path, both, monkeypatch):
    """In a group of two the better one has (a - b) / 2 over a deviation of |a - b| / sqrt 2: 1 / sqrt 2,
    whatever the scale, and a tie 0. With weights 1 and 0.5 the first of each group has 1.5, 0.5, 1 and 0
    over sqrt 2. Their squares sum to 3.5 over the batch: a deviation of sqrt(3.5 / 7) = 1 / sqrt 2. So the
    advantages are 1.5, 0.5, 1 and 0. GRPO on the sums has +, -, + of one size: (1, 0) loses to (0, 10)."""
    trl = pytest.importorskip("trl")
    advantages, score = [], trl.GRPOTrainer._generate_and_score_completions

    def spy(self, inputs):
        result = score(self, inputs)
        advantages.append(result["advantages"].tolist())
        return result

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", spy)
    monkeypatch.setattr(RlhfRun, "reward", lambda *_: PAIRS)
    recipe = two_rewards(tmp_path, both, training={"steps": 1, "max_tokens": 8 * 46})
    train_policy(recipe, tmp_path / "run")
    expected = [1.5, -1.5, 0.5, -0.5, 1, -1, 0, 0]
    assert advantages[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_a_run_of_two_rewards_logs_the_mean_of_each(tmp_path, both):
    pytest.importorskip("trl")
    train_policy(two_rewards(tmp_path, both), tmp_path / "run")
    records = read_json_lines(tmp_path / "run/metrics.jsonl")
    for kind, num in (("rlhf", 4), ("held-out", 3)):
        means = [(r["reward"], r["implicit"]) for r in records if r["kind"] == kind]
        assert len(means) == num
        assert np.isfinite(means).all()
        assert all(reward != implicit for reward, implicit in means)
