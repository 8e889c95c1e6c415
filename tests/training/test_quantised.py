"""QLoRA: adapters on a base in 4 bits; the merged export scores as the model in memory."""

import shutil

import pytest
import torch
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from hafrm.errors import ConfigError, ModelError
from hafrm.export import proof
from hafrm.recipe import ModelSection
from hafrm.recipe_file import build_recipe
from hafrm.scoring import loading, model_files
from hafrm.scoring.reward_model import RewardModel
from hafrm.training import run_export
from hafrm.training.loop import run_training
from hafrm.training.memory_plan import count_weights, plan_recipe
from hafrm.training.methods import resolve_method
from hafrm.training.passes import reference_file, reference_weights
from hafrm.training.run_export import ExportOptions, export_from_run
from hafrm.training.setup import build_encoder, build_model, meta_model
from support.models import GPT2
from support.tiny_runs import tiny_recipe, write_base

SECTIONS = {"model": {"quantization": "nf4"}, "lora": {"rank": 4, "alpha": 8.0}}
TRAINING = {"learning_rate": 1e-2, "precision": "fp32"}


def quantised_model(recipe):
    method, encoder = resolve_method(recipe), build_encoder(recipe)
    return build_model(recipe, method, encoder, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    write_base(folder, width=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_export, "check_golden", lambda _: {})
        run_training(tiny_recipe(folder, training=TRAINING, **SECTIONS), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_merged_export_scores_as_the_quantised_model_did(tmp_path, monkeypatch, precision):
    """Rewards relative to max(1, |reward|), log-probs in nat per token: to 1e-5 in float32, and 0.03 where
    the model computed in bfloat16. The linear layers are off by what 4 bits lose: a tenth of a weight."""
    write_base(tmp_path, width=128)
    differences = []
    within = proof._within
    monkeypatch.setattr(
        proof, "_within", lambda *a: differences.append(within(*a)) or differences[-1]
    )
    monkeypatch.setattr(run_export, "check_golden", lambda _: {})
    training = {**TRAINING, "precision": precision}
    best = run_training(
        tiny_recipe(tmp_path, training=training, **SECTIONS), tmp_path / "run"
    ).best_step
    assert len(differences) == 2
    assert max(differences) < {"fp32": 1e-5, "bf16": 0.03}[precision]
    if precision == "fp32":
        base = load_file(tmp_path / "base/model.safetensors")
        step = load_file(tmp_path / f"run/checkpoints/step-{best}/model.safetensors")
        merged = load_file(tmp_path / "run/model/policy/model.safetensors")
        name = "layers.0.mlp.up_proj"
        a, b = (step[f"backbone.{name}.lora_{k}.default.weight"] for k in "AB")
        whole = base[f"model.{name}.weight"]
        lost = merged[f"model.{name}.weight"] - 8 / 4 * (b @ a) - whole
        assert 0.08 < float(lost.norm() / whole.norm()) < 0.1
        assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_quantised_run_is_resumed_and_exported_again_to_the_bit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_export, "check_golden", lambda _: {})
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints/step-6")
    run_training(tiny_recipe(run.parent, training=TRAINING, **SECTIONS), again, resume=True)
    for head in ("reward", "policy"):
        files = [folder / "model" / head / "model.safetensors" for folder in (run, again)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert isinstance(RewardModel.from_pretrained(run).score("Say sun.", "sun"), float)


@pytest.mark.slow
def test_a_fresh_process_replays_a_quantised_run(run, tmp_path):
    assert export_from_run(run, tmp_path / "out", ExportOptions()).difference < 1e-4


def test_only_linear_layers_are_quantised_and_evaluation_computes_as_training(tmp_path):
    """bitsandbytes would repack weights on a CPU with AVX512 and round products to bfloat16."""
    write_base(tmp_path, width=128)
    model = quantised_model(tiny_recipe(tmp_path, training=TRAINING, **SECTIONS))
    packed = {n for n, p in model.named_parameters() if isinstance(p, Params4bit)}
    assert len(packed) == 2 * 7
    assert all(".base_layer." in name for name in packed)
    layer = model.backbone.layers[0].mlp.up_proj.base_layer
    states = torch.randn(3, 128)
    with torch.no_grad():
        before, after = layer.train()(states), layer.eval()(states)
    assert torch.equal(before, after)


def test_the_reference_of_a_quantised_base_is_not_that_of_the_base(tmp_path):
    write_base(tmp_path, width=128)
    recipes = [tiny_recipe(tmp_path, **SECTIONS), tiny_recipe(tmp_path, lora=SECTIONS["lora"])]
    models = [(quantised_model(recipe), recipe.model.path) for recipe in recipes]
    files = [reference_file(m, [], None, reference_weights(m, path)) for m, path in models]
    assert None not in files
    assert files[0] != files[1]


def test_a_plan_counts_a_quantised_base_as_it_is_and_copies_it_to_every_gpu(tmp_path):
    """To 5 %: small matrices have tables of their own."""
    write_base(tmp_path, width=128)
    recipe = tiny_recipe(tmp_path, training={**TRAINING, "max_tokens": "auto"}, **SECTIONS)
    real = quantised_model(recipe)
    weights = count_weights(
        meta_model(real.backbone.config, recipe, resolve_method(recipe)), quantised=True
    )
    frozen = [p for p in real.parameters() if not p.requires_grad]
    scales = sum(p.numel() * 2 for p in frozen if isinstance(p, Params4bit)) // 64
    assert weights.frozen_bytes == pytest.approx(sum(p.nbytes for p in frozen) + scales, rel=0.05)
    plan = plan_recipe(recipe, resolve_method(recipe), memory=8.0, ranks=2)
    assert not plan.sharded


def test_what_cannot_be_quantised_is_refused(run, tmp_path, monkeypatch):
    model, data = {"path": "x", "quantization": "nf4"}, {"train": "x"}
    for sections in ({}, {"lora": {}, "training": {"parallel": "fsdp"}}):
        with pytest.raises(
            ConfigError, match=r"model\.quantization needs `lora`, and.*auto or ddp"
        ):
            build_recipe({"model": model, "data": data, **sections})
    with pytest.raises(ConfigError, match=r"was quantised.*remove --no-merge-lora"):
        export_from_run(run, tmp_path / "out", ExportOptions(merge_lora=False))
    recipe = tiny_recipe(tmp_path, **SECTIONS)
    with pytest.raises(ModelError, match=r"transposed.*multiples of 64"):
        quantised_model(recipe)
    sizes = {**GPT2, "vocab_size": 400, "n_embd": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"transposed"):
        loading.load_base(
            ModelSection(path=str(tmp_path / "gpt2"), quantization="nf4"),
            torch.float32,
            torch.device("cpu"),
        )
    with monkeypatch.context() as patch:
        patch.setattr(model_files, "find_adapter", lambda *_: "an adapter")
        with pytest.raises(ConfigError, match="merge it first"):
            quantised_model(recipe)
    monkeypatch.setattr(model_files, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'hafrm\[qlora\]'"):
        quantised_model(recipe)
