"""What training starts from: causal LMs, reward models, adapters, value heads and runs of ours."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hafrm.errors import ConfigError, ModelError
from hafrm.scoring.loading import check_base, load_policy, load_reward, model_digest
from hafrm.training.loop import run_training
from hafrm.training.methods import get_method
from hafrm.training.setup import build_encoder, build_model
from support.tiny_runs import tiny_recipe, write_base

HEAD = torch.linspace(-1, 1, 32)[None]
VALUE_HEAD = {"v_head.summary.weight": HEAD, "v_head.summary.bias": torch.ones(1)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """`base`, and what others make of it: `rm`, `rm-tied`, `adapter`, `trl`, `factory`, ..."""
    folder = tmp_path_factory.mktemp("bases")
    base = write_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, source in (("rm", base), ("rm-tied", write_base(folder / "tied", tied=True))):
        reward = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
        reward.score.weight.data.copy_(HEAD)
        reward.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    causal = AutoModelForCausalLM.from_pretrained(base)
    weights = dict(causal.state_dict())
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(causal, lora)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    for name in ("trl", "mlp", "factory"):
        shutil.copytree(base, folder / name)
    for name in ("factory-adapter", "pickle"):
        shutil.copytree(folder / "adapter", folder / name)
    mlp = {"v_head.summary.0.weight": torch.ones(8, 32), "v_head.summary.2.weight": HEAD[:, :8]}
    for name, head in (("trl", VALUE_HEAD), ("mlp", mlp)):
        save_file(weights | head, folder / name / "model.safetensors", metadata={"format": "pt"})
    for name in ("factory", "factory-adapter"):
        save_file(VALUE_HEAD, folder / name / "value_head.safetensors")
    torch.save(VALUE_HEAD, folder / "pickle" / "pytorch_model.bin")
    return folder


def build(stored: Path, name: str, method: str = "haf", **model: object):
    recipe = tiny_recipe(stored, model={"path": str(stored / name), **model})
    chosen = get_method(method)
    check_base(recipe.model, policy=chosen.trains_policy, reward=chosen.trains_reward)
    return build_model(recipe, chosen, build_encoder(recipe), torch.device("cpu"))


@pytest.mark.parametrize("name", ["rm-tied", "trl", "factory", "factory-adapter", "rm"])
def test_training_continues_with_the_reward_head_that_is_there(stored, caplog, name):
    caplog.set_level("INFO", "hafrm")
    from_base = {"policy_from": str(stored / "base")} if name == "rm" else {}
    model = build(stored, name, **from_base)
    assert torch.equal(model.reward_head.weight, HEAD)
    assert f"reward head: that of {stored / name}" in caplog.text
    assert not torch.equal(
        build(stored, name, reward_head="new", **from_base).reward_head.weight, HEAD
    )
    assert "reward head: a new one" in caplog.text
    if name == "rm":
        lm_head = load_policy(stored / "base", dtype=torch.float32, device="cpu").policy_head
        assert torch.equal(model.policy_head.weight, lm_head.weight)
        assert build(stored, name, "bt").policy_head is None


def test_an_adapter_is_merged_into_its_base_and_all_weights_train(stored):
    model = build(stored, "adapter")
    merged = AutoModelForCausalLM.from_pretrained(stored / "merged")
    own = dict(model.backbone.named_parameters())
    for name, value in merged.model.named_parameters():
        assert torch.allclose(own[name], value, atol=1e-7), name
        assert own[name].requires_grad
    assert torch.allclose(model.policy_head.weight, merged.lm_head.weight, atol=1e-7)
    assert model_digest(stored / "adapter") != model_digest(stored / "factory-adapter")


def test_a_run_is_continued_from_both_of_its_heads(finished):
    recipe = tiny_recipe(finished.parent, model={"path": str(finished), "reward_head": "keep"})
    model = build_model(recipe, get_method("haf"), build_encoder(recipe), torch.device("cpu"))
    reward = load_reward(finished / "model/reward", dtype=torch.float32, device="cpu")
    policy = load_policy(finished / "model/policy", dtype=torch.float32, device="cpu")
    assert torch.equal(model.reward_head.weight, reward.reward_head.weight)
    assert torch.equal(model.policy_head.weight, policy.policy_head.weight)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(
            model.backbone.parameters(), reward.backbone.parameters(), strict=True
        )
    )


def resize(base: Path) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 445}))


def truncate(base: Path) -> None:
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)


def drop_weights(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "model", "error", "said"),
    [
        ("rm", None, {}, ModelError, "without an LM head: .*model.policy_from, or .*bt"),
        ("base", None, {"reward_head": "keep"}, ModelError, "has no reward head"),
        ("base", None, {"policy_from": "base"}, ConfigError, "policy_from is not needed"),
        ("mlp", None, {}, ModelError, r"summary.0.weight.*reward_head: new"),
        ("pickle", None, {}, ModelError, "reward head in a pickle"),
        ("base", resize, {}, ModelError, r"has the sizes \[440, 32\], but \[445, 32\] by"),
        ("base", truncate, {}, ModelError, "model.safetensors is damaged"),
    ],
)
def test_a_base_that_cannot_be_started_from_is_refused_before_data_is_read(
    stored, tmp_path, monkeypatch, name, change, model, error, said
):
    base = shutil.copytree(stored / name, tmp_path / name)
    if change is not None:
        change(base)
    recipe = tiny_recipe(
        tmp_path, model={"path": str(base), **model}, data={"train": ["gone.jsonl"]}
    )
    with pytest.raises(error, match=said) as refusal:
        run_training(recipe, tmp_path / "run")
    assert len(str(refusal.value)) < 300 + len(str(base))
    assert not (tmp_path / "run").exists()


def test_weights_that_an_adapter_lacks_are_named(stored, tmp_path):
    adapter = shutil.copytree(stored / "adapter", tmp_path / "adapter")
    drop_weights(adapter)
    with pytest.raises(ModelError, match=r"lacks the adapter's weights for .*lora_"):
        build(stored.parent, str(adapter))
