"""Models out of run folders: from a checkpoint, in any dtype, proved before they appear."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hafrm.errors import CheckpointError, ConfigError, ModelError, NumericsError, VerificationError
from hafrm.export import stock_export
from hafrm.export.checklist import verify_directory
from hafrm.scoring.loading import find_heads
from hafrm.scoring.reward_model import RewardModel, read_implicit_rule
from hafrm.training import run_export
from hafrm.training.loop import run_training
from hafrm.training.run_export import ExportOptions, export_from_run
from support.models import tiny_hybrid
from support.tiny_runs import tiny_recipe

LORA = {"rank": 2, "alpha": 8, "targets": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_export, "check_golden", lambda _: {})
        run_training(tiny_recipe(folder, lora=LORA, method={"name": "bt"}), folder / "run")
    return folder / "run"


def weights(folder):
    return load_file(folder / "model.safetensors")


def best_step(run):
    return json.loads((run / "checkpoints/step-6/state.json").read_text())["best_step"]


def test_a_reference_on_the_hub_keeps_the_commit_that_training_began_with(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_export, "reference_place", lambda _: "org/base")
    monkeypatch.setattr(run_export, "find_adapter", lambda *_: None)
    monkeypatch.setattr(run_export, "export_policy", lambda *_, **__: None)
    recipe = tiny_recipe(finished.parent, model={"revision": "step10"})
    model = tiny_hybrid()
    for commit, kept in (("c" * 40, "c" * 40), (None, "step10")):
        model.backbone.config._commit_hash = commit
        run_export._write_policy(model, None, tmp_path, torch.float32, recipe)
        rule = read_implicit_rule(tmp_path)
        assert (rule.reference, rule.revision) == ("org/base", kept)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_the_best_checkpoint_is_the_finished_model_rounded_once_to_a_dtype(
    finished, tmp_path, name
):
    done = export_from_run(finished, tmp_path / "out", ExportOptions(dtype=name))
    dtype = getattr(torch, name)
    before, after = weights(finished / "model/reward"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value.to(dtype)) for key, value in before.items())
    assert (done.source, done.dtype, done.merged) == (f"step-{best_step(finished)}", name, None)
    assert done.num_golden > 5
    assert verify_directory(tmp_path / "out").ok
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "reward model" in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_is_exported_by_name_and_one_that_is_not_there_is_refused(finished, tmp_path):
    for wanted, step in (("latest", 6), ("4", 4)):
        done = export_from_run(finished, tmp_path / wanted, ExportOptions(checkpoint=wanted))
        assert done.source == f"step-{step}"
        stored = load_file(finished / f"checkpoints/step-{step}/model.safetensors")
        assert torch.equal(weights(tmp_path / wanted)["score.weight"], stored["reward_head.weight"])
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1; it has.*4, 6\]"):
        export_from_run(finished, tmp_path / "out", ExportOptions(checkpoint="1"))
    with pytest.raises(ConfigError, match="best, latest or a step"):
        export_from_run(finished, tmp_path / "out", ExportOptions(checkpoint="newest"))
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export_from_run(run, tmp_path / "out", ExportOptions())


def test_merged_lora_scores_as_the_trained_model_and_keeps_its_head(lora, tmp_path):
    """TRL#368, TRL#398, peft#1836, peft#2502: adapters merged, head neither lost nor left random."""
    done = export_from_run(lora, tmp_path / "out", ExportOptions(checkpoint="latest"))
    assert (done.merged, done.source) == (True, "step-6")
    stored = load_file(lora / "checkpoints/step-6/model.safetensors")
    merged = weights(tmp_path / "out")
    assert torch.equal(merged["score.weight"], stored["reward_head.weight"])
    name = "layers.0.mlp.up_proj"
    a = stored[f"backbone.{name}.lora_A.default.weight"]
    b = stored[f"backbone.{name}.lora_B.default.weight"]
    base = weights(lora.parent / "base")[f"model.{name}.weight"]
    assert torch.allclose(merged[f"model.{name}.weight"], base + 8 / 2 * (b @ a), atol=1e-6)
    assert verify_directory(tmp_path / "out").ok


def test_an_adapter_is_written_with_its_head_and_gives_the_merged_scores(lora, tmp_path):
    """Replayed by PEFT on the base checkpoint: OpenRLHF#1342 lost the head here."""
    done = export_from_run(lora, tmp_path / "out", ExportOptions(merge_lora=False))
    assert (done.merged, done.dtype) == (False, "float32")
    assert done.difference < 1e-4
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "golden_scores.jsonl"} <= names
    assert "model.safetensors" not in names
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["modules_to_save"], config["target_modules"]) == (["score"], LORA["targets"])
    with pytest.raises(ModelError, match="LoRA adapter"):
        verify_directory(tmp_path / "out")


def test_the_policy_comes_out_with_its_rule_and_the_same_log_probs(finished, tmp_path):
    done = export_from_run(finished, tmp_path / "out", ExportOptions("policy", "bfloat16"))
    assert done.num_golden > 5
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    rule = read_implicit_rule(tmp_path / "out")
    assert (rule.beta, rule.revision) == (0.1, None)
    assert rule.reference == str((finished.parent / "base").absolute())
    assert weights(tmp_path / "out")["lm_head.weight"].dtype == torch.bfloat16


def test_what_a_run_cannot_give_is_refused_with_the_reason(finished, lora, tmp_path):
    for run, said, options in (
        (finished, "has no adapters", {"merge_lora": True}),
        (lora, "trains no policy head", {"head": "policy"}),
        (finished, "one of float32, bfloat16, float16", {"dtype": "int8"}),
        (lora, "adapters stay in float32", {"dtype": "bfloat16", "merge_lora": False}),
        (lora, "only reward models", {"head": "policy", "merge_lora": False}),
    ):
        with pytest.raises(ConfigError, match=said):
            export_from_run(run, tmp_path / "out", ExportOptions(**options))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export_from_run(finished, tmp_path / "out", ExportOptions())


def test_an_export_whose_proof_fails_is_kept_as_unverified_until_it_is_repeated(
    finished, tmp_path, monkeypatch
):
    def disagree(_):
        raise NumericsError("differ")

    with monkeypatch.context() as patch:
        patch.setattr(run_export, "check_golden", disagree)
        with pytest.raises(VerificationError, match=r"differ.*kept as .*out\.unverified"):
            export_from_run(finished, tmp_path / "out", ExportOptions())
    assert {p.name for p in tmp_path.iterdir()} == {"out.unverified"}
    config = tmp_path / "out.unverified/config.json"
    config.rename(tmp_path / "config.json")  # what is no export may be the user's
    with pytest.raises(CheckpointError, match="is not an export: move it away"):
        export_from_run(finished, tmp_path / "out", ExportOptions())
    (tmp_path / "config.json").rename(config)
    assert RewardModel.from_pretrained(tmp_path / "out.unverified").score("Say sun.", "sun")
    export_from_run(finished, tmp_path / "out", ExportOptions())
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_weights_beyond_float16_are_refused(finished, tmp_path, monkeypatch):
    read = stock_export._read_weight

    def large(module, *args):
        value = read(module, *args)
        return value * 1e9 if isinstance(module, nn.Linear) else value

    monkeypatch.setattr(stock_export, "_read_weight", large)
    with pytest.raises(ModelError, match=r"score\.weight.*do not fit into float16"):
        export_from_run(finished, tmp_path / "out", ExportOptions(dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_data_that_is_gone_costs_conversations_only(finished, tmp_path, caplog):
    run = shutil.copytree(finished, tmp_path / "run")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("train.jsonl", "moved.jsonl"))
    assert export_from_run(run, tmp_path / "out", ExportOptions()).num_golden == 2
    assert "fewer conversations are replayed" in caplog.text


@pytest.mark.slow
def test_the_proof_runs_in_a_fresh_process(finished, lora, tmp_path):
    assert export_from_run(finished, tmp_path / "whole", ExportOptions()).difference < 1e-4
    adapter = ExportOptions(merge_lora=False)
    assert export_from_run(lora, tmp_path / "adapter", adapter).difference < 1e-4


def test_a_lora_export_is_a_model_to_score_with_and_to_continue_from(lora, tmp_path):
    export_from_run(lora, tmp_path / "out", ExportOptions(merge_lora=False))
    export_from_run(lora, tmp_path / "whole", ExportOptions())
    prompt, responses = "Say sun.", ["Here you are: sun.", "No."]
    merged, adapter = (
        RewardModel.from_pretrained(tmp_path / name).score(prompt, responses)
        for name in ("whole", "out")
    )
    assert adapter == pytest.approx(merged, abs=1e-6)
    assert find_heads(tmp_path / "out").reward == tmp_path / "out"


@pytest.mark.parametrize("head", ["reward", "policy"])
def test_an_export_that_differs_from_the_model_in_memory_is_not_verified(
    finished, tmp_path, monkeypatch, head
):
    """As a re-tied LM head or a lost reward head would: the directory agrees with itself alone."""
    read = stock_export._read_weight

    def other(module, *args):
        value = read(module, *args)
        is_head = isinstance(module, nn.Linear) and (len(value) == 1) == (head == "reward")
        return value * 1.01 if is_head else value

    monkeypatch.setattr(stock_export, "_read_weight", other)
    with pytest.raises(VerificationError, match=r"model in memory gave.*kept as"):
        export_from_run(finished, tmp_path / "out", ExportOptions(head))
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "model")
    with pytest.raises(VerificationError, match="scores that the model in memory gave"):
        run_training(tiny_recipe(finished.parent), run, resume=True)
    monkeypatch.setattr(stock_export, "_read_weight", read)
    run_training(tiny_recipe(finished.parent), run, resume=True)
    assert (run / "model" / head).is_dir()
