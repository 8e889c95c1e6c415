"""Exported directories are what stock transformers makes of them: the same scores, nothing left over."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

from hafrm import tensor_files
from hafrm.data.encoding import Encoder
from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel, split_causal_lm
from hafrm.errors import CheckpointError, ModelError, NumericsError
from hafrm.export.checklist import replay_directory
from hafrm.export.proof import InMemory
from hafrm.export.stock_export import export_policy, export_reward
from hafrm.preferences import Message
from hafrm.scoring.forward import Scores
from hafrm.scoring.loading import load_policy
from hafrm.scoring.reward_model import RewardModel
from hafrm.training.methods import get_method
from hafrm.training.setup import assemble
from support.chat_tokenizers import GEMMA_LIKE, chat_tokenizer
from support.export_faults import FAULTS
from support.exports import GOLDEN_GROUP, export_both, hybrid_with_encoder, saved_whole
from support.models import FAMILIES
from support.recipe_models import config_of, recipe_of, tiny_mixtral_config


@pytest.fixture(scope="module")
def good(exported):
    return exported / "reward"


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"granite", "cohere", "gemma3"}))
def test_stock_classes_load_an_export_and_give_our_numbers(tmp_path, family):
    """Rewards and log-probs within 1e-5 (relative to max(1, |value|)), one at a time."""
    model, encoder = export_both(tmp_path, family)
    (ids,), _ = encoder.encode([GOLDEN_GROUP])
    ours = model(lay_out([ids]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    loaded = []
    kinds = {"reward": AutoModelForSequenceClassification, "policy": AutoModelForCausalLM}
    for name, kind in kinds.items():
        stock, info = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        loaded.append(stock)
    stock, policy = loaded
    assert stock.config.num_labels == 1
    assert stock.config.problem_type == "regression"
    assert stock.config.get_text_config().pad_token_id not in (None, tokenizer.eos_token_id)
    start = len(ids.prompt_ids)
    for k, response in enumerate(GOLDEN_GROUP.responses):
        messages = [m._asdict() for m in (*GOLDEN_GROUP.prompt, Message("assistant", response))]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        sequence = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            reward = stock(sequence).logits[0, 0]
            logps = policy(sequence).logits[0].log_softmax(-1)[start - 1 : -1]
        logp = logps.gather(1, sequence[0, start:, None]).sum()
        assert torch.allclose(ours.rewards[k], reward, atol=1e-5, rtol=1e-5)
        assert torch.allclose(ours.logps[k], logp, atol=1e-5, rtol=1e-5)
    suffixes = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja"}


def test_a_dialogue_is_read_at_its_last_eos_and_the_pipeline_applies_no_sigmoid(good):
    """huggingface/trl#6952, trl#3750: read before the first pad-like token, inner turns won;
    vllm-project/vllm#18313, #20807: one label got a softmax, later a sigmoid."""
    turns = [("user", "Say sun."), ("assistant", "sun"), ("user", "Say sea."), ("assistant", "sea")]
    messages = [{"role": role, "content": content} for role, content in turns]
    tokenizer = AutoTokenizer.from_pretrained(good)
    model = AutoModelForSequenceClassification.from_pretrained(good).eval()
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ends = (ids[0] == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
    assert len(ends) == 4
    with torch.no_grad():
        values = model.score(model.model(ids).last_hidden_state)[0, :, 0]
    ours = RewardModel.from_pretrained(good).score(messages[:3], "sea")
    assert ours == pytest.approx(values[ends[-1]].item(), abs=1e-5)
    assert abs(values[ends[1]].item() - ours) > 1e-3
    (answer,) = pipeline("text-classification", str(good))(text)
    assert answer["score"] == pytest.approx(ours, abs=1e-5)


def test_nothing_is_left_when_writing_fails_midway_or_there_is_no_head(tmp_path, monkeypatch):
    model, encoder = hybrid_with_encoder()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(encoder, "export_tokenizer", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        export_reward(model, encoder, tmp_path / "reward")
    model.reward_head = None
    with pytest.raises(ModelError, match="no reward head"):
        export_reward(model, encoder, tmp_path / "reward")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault", ["two labels", "no problem type", "pad is EOS", "no EOS", "other rewards"]
)
def test_the_golden_replay_finds_a_planted_fault(good, tmp_path, fault):
    """A good directory is within 1e-5, alone and padded on either side; see test_run_end.py."""
    folder = shutil.copytree(good, tmp_path / "reward")
    FAULTS[fault][1](folder)
    replay = replay_directory(folder)
    assert replay.faults or max(replay.differences.values()) > 1e-3


def test_plain_generation_stops_where_the_templates_turn_and_the_base_end(tmp_path):
    """Gemma and Llama 3 end turns in a token that is not the tokenizer's EOS."""
    model, _ = hybrid_with_encoder()
    encoder = Encoder(chat_tokenizer(GEMMA_LIKE), max_length=128)
    sep, end = encoder.tokenizer.convert_tokens_to_ids(["<|sep|>", "<|endoftext|>"])
    GenerationConfig(eos_token_id=[encoder.eos_id, end]).save_pretrained(tmp_path)
    for place, ends in ((tmp_path, [sep, encoder.eos_id, end]), ("gone", [sep, encoder.eos_id])):
        model.backbone.config._name_or_path = str(place)
        export_policy(model, encoder, tmp_path / "policy")
        config = GenerationConfig.from_pretrained(tmp_path / "policy")
        assert config.eos_token_id == ends
        shutil.rmtree(tmp_path / "policy")


def test_an_untied_head_under_a_config_that_says_tied_is_exported_untied(tmp_path):
    model, encoder = hybrid_with_encoder()
    model.backbone.config.tie_word_embeddings = True  # as a merged adapter leaves it
    export_policy(model, encoder, tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = load_policy(tmp_path / "policy", dtype=torch.float32, device="cpu")
    assert torch.equal(loaded.policy_head.weight, model.policy_head.weight)
    model.policy_head.weight = model.backbone.get_input_embeddings().weight
    export_policy(model, encoder, tmp_path / "tied")
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"]


def test_an_export_has_the_dropout_of_its_base_which_training_switches_off(tmp_path):
    model, encoder = hybrid_with_encoder("gpt2")
    assert model.backbone.config.attn_pdrop == 0.0
    HybridModel(model.backbone, policy_head=model.policy_head)  # wrapped twice, as for a reference
    export_reward(model, encoder, tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert (config["attn_pdrop"], config["resid_pdrop"]) == (0.1, 0.1)
    assert not any("hafrm" in key for key in config)


@pytest.mark.parametrize(
    ("family", "lora"),
    [("llama", False), ("llama", True), ("gpt2", True), ("mixtral", False), ("llama-tied", True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_written_one_by_one_are_the_file_that_transformers_writes_of_all(
    tmp_path, monkeypatch, family, lora, dtype
):
    """To the bit; with experts, which files hold one by one, the tensors and not their order. In several
    files with an index where they are large."""
    config = tiny_mixtral_config() if family == "mixtral" else config_of(family)
    backbone, head = split_causal_lm(AutoModelForCausalLM.from_config(config).eval())
    recipe = recipe_of(**({"lora": {"rank": 4}} if lora else {}))
    model, encoder = assemble(backbone, head, recipe, get_method("haf")), hybrid_with_encoder()[1]
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    for export, auto in (
        (export_reward, AutoModelForSequenceClassification),
        (export_policy, AutoModelForCausalLM),
    ):
        one, all_ = tmp_path / export.__name__, tmp_path / f"{export.__name__}-whole"
        export(model, encoder, one, dtype=dtype)
        saved_whole(one, model, auto, all_)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, all_))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        if family != "mixtral":
            files = [(folder / "model.safetensors").read_bytes() for folder in (one, all_)]
            assert files[0] == files[1]
    monkeypatch.setattr(tensor_files, "MOST_BYTES", 30_000)
    export_reward(model, encoder, tmp_path / "split", dtype=dtype)
    assert len(list((tmp_path / "split").glob("model-*.safetensors"))) > 1
    kind = AutoModelForSequenceClassification
    whole, split = (kind.from_pretrained(tmp_path / n) for n in ("export_reward", "split"))
    for (name, value), again in zip(
        whole.state_dict().items(), split.state_dict().values(), strict=True
    ):
        assert torch.equal(value, again), name


def test_rounding_to_half_precision_may_shift_all_rewards_but_not_reorder_them(
    tmp_path, good, caplog
):
    """A bfloat16 LoRA run of SmolLM2-135M was refused its export: all rewards moved by 0.46, which changes
    no comparison, and scattered by 0.10 of a spread of 0.66."""
    export_reward(*hybrid_with_encoder(), tmp_path / "half", dtype=torch.bfloat16)
    rewards = np.linspace(-1, 1, 34, dtype=np.float32)
    empty = np.array([], dtype=np.int64)
    in_half, in_full = (
        InMemory([], [], Scores(rewards, None, empty, empty), half) for half in (True, False)
    )
    shifted = rewards + np.float32(0.46)
    with caplog.at_level("INFO", "hafrm"):
        assert in_half.check_rewards(good, shifted) < 1e-6
        assert in_full.check_rewards(tmp_path / "half", shifted) < 1e-6
    assert "half precision moves the rewards by +0.46 and scatters them by" in caplog.text
    with pytest.raises(NumericsError, match=r"differ by 0.46 \(tolerated 0.0001\)"):
        in_full.check_rewards(good, shifted)
    for size in (1, 0.05):  # rewards of an untrained head are much alike
        memory = replace(in_half, scores=replace(in_half.scores, rewards=size * rewards))
        memory.check_rewards(good, size * (rewards + 0.2 * rewards[::-1]))
        for wrong in (rewards[::-1], 2 * rewards, np.zeros_like(rewards), rewards * np.nan):
            with pytest.raises(NumericsError, match="differ by"):
                memory.check_rewards(good, size * wrong)


def test_log_probs_in_half_precision_are_held_to_their_root_mean_square(good):
    logps, lengths = np.linspace(-9, -1, 34), np.full(34, 2)
    scores = Scores(None, logps, lengths, np.array([], dtype=np.int64))
    one_off = np.where(np.arange(34) == 0, 0.4, 0.0)  # 0.2 nat for each of its two tokens
    for half, right, wrong in ((True, one_off, 0.3), (False, 1e-5, one_off)):
        memory = InMemory([], [], scores, half)
        memory.check_logps(good, logps + right)
        with pytest.raises(NumericsError, match="differ by"):
            memory.check_logps(good, logps + wrong)
