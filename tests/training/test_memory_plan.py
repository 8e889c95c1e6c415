"""The planner: totals against a real joint step, budgets that fit, ranks, runs with an automatic budget."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from hafrm.cli import app
from hafrm.engine import logprobs
from hafrm.engine.layout import lay_out
from hafrm.errors import ConfigError, ModelError
from hafrm.recipe_file import dump_recipe
from hafrm.run_folder import read_json_lines
from hafrm.training import memory_plan, model_setup, run_export
from hafrm.training.loop import train
from hafrm.training.memory_plan import (
    GRAIN,
    LARGEST,
    MemoryPlan,
    Planner,
    Target,
    plan_recipe,
    target_here,
    with_token_budget,
)
from hafrm.training.memory_trace import LiveBytes
from hafrm.training.methods import get_method
from hafrm.training.parallel import Ranks
from hafrm.training.step import build_optimizer, take_step
from hafrm.training.step_batches import MicroBatch
from models_for_tests import token_groups
from tiny_meta_models import config_of, real_model, recipe_of
from tiny_runs import tiny_recipe

HAF = get_method("haf")
HERE = Ranks(0, 1, torch.device("cpu"))
MIB = 2**20


def planner(family: str = "llama", **sections: object) -> Planner:
    return Planner(recipe_of(**sections), HAF, config_of(family))


def measured_peak(family: str, plan: MemoryPlan, **sections: object) -> int:
    """Bytes of weights, optimiser state and everything that two real joint steps make, at their fullest;
    the micro-batch is the planned one, and a step's second finds the gradients in place."""
    model = real_model(family, recipe_of(**sections))
    with LiveBytes([]) as live:
        optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
        for _ in range(2):
            layout = lay_out(token_groups(planner(family, **sections).shape(plan.tokens)))
            count = layout.num_responses // 2
            chosen = torch.arange(count) * 2
            batch = MicroBatch(
                layout=layout,
                chosen=chosen,
                rejected=chosen + 1,
                margins=torch.zeros(count),
                weights=torch.ones(count),
                reference_logps=torch.zeros(2 * count),
                ids=("g",) * count,
            )
            take_step(
                model, optimizer, [batch, batch], HAF, num_comparisons=2 * count, max_grad_norm=1.0
            )
    return live.peak + sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("llama", {}),
        ("llama", {"training": {"gradient_checkpointing": True}}),
        ("llama", {"lora": {"rank": 4}}),
        ("gpt2", {}),
    ],
)
def test_the_total_is_the_peak_of_real_joint_steps(monkeypatch, family, sections):
    """Weights, gradients, moments, activations, chunks of logits and what backward holds: within 10 %, at
    640 tokens in chunks of 100 rows of logits."""
    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", 100 * 61)
    sections = {**sections, "training": {"max_tokens": 640, **sections.get("training", {})}}
    plan = planner(family, **sections).plan(Target("cpu", 2**30))
    assert plan.tokens == 640
    predicted = plan.need.step
    assert predicted == pytest.approx(measured_peak(family, plan, **sections), rel=0.1)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_pass_without_gradients_is_planned_as_it_runs(monkeypatch, family):
    """Over four times the budget, as the reference's: within 10 %, beside weights and moments."""
    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", 100 * 61)
    ours = planner(family, training={"max_tokens": 256})
    need = ours.plan(Target("cpu", 2**30)).need
    model = real_model(family, ours.recipe)
    layout = lay_out(token_groups(ours.shape(4 * 256)))
    known = [*model.parameters(), *model.buffers()]
    known += [value for value in vars(layout).values() if isinstance(value, torch.Tensor)]
    with LiveBytes(known) as live, torch.no_grad():
        model(layout)
    assert need.passes - need.weights - need.optimiser == pytest.approx(live.peak, rel=0.1)


def test_weights_are_whole_on_every_rank_until_the_reference_is_there():
    few = {"training": {"max_tokens": 128}}
    one = planner(**few).plan(Target("cuda", 2**30)).need
    many = planner(**few).plan(Target("cuda", 2**30, ranks=64)).need
    assert many.weights < one.weights / 60
    assert many.passes >= one.weights
    assert many.total == max(many.passes, many.step)


def test_auto_takes_the_largest_budget_that_fits_with_the_spare_part():
    """The usable part is nine tenths of a GPU; half as much again would not fit into it (the masks
    of a few long segments, which are nothing beside a real model's width, make the plan careful here)."""
    ours = planner("phi", training={"max_tokens": "auto", "batch_size": 128})
    plan = ours.plan(Target("cuda", 24 * MIB))
    assert 2 * 64 < plan.max_tokens < 128 * 2 * 64
    assert plan.max_tokens % GRAIN == 0
    assert plan.need.total <= 0.9 * 24 * MIB
    assert ours.need(plan.target, plan.max_tokens * 3 // 2).total > 0.9 * 24 * MIB


def test_auto_takes_no_more_than_a_step_holds_nor_than_helps():
    much = Target("cuda", 2**40)
    small = planner("phi", training={"max_tokens": "auto", "batch_size": 4})
    assert small.plan(much).max_tokens == 4 * 2 * 64
    large = planner("phi", training={"max_tokens": "auto", "batch_size": 1024})
    assert large.plan(much).max_tokens == LARGEST


def test_auto_does_not_fit_where_not_even_one_comparison_does():
    plan = planner(training={"max_tokens": "auto"}).plan(Target("cuda", MIB // 2))
    assert plan.max_tokens == 2 * 64
    assert not plan.fits


def test_a_number_is_planned_as_it_is_up_to_what_a_step_holds():
    plan = planner(training={"max_tokens": 8192, "batch_size": 2}).plan(Target("cpu", 2**30))
    assert (plan.max_tokens, plan.tokens) == (8192, 2 * 2 * 64)


def test_a_cpu_leaves_three_fifths_of_its_memory_and_a_gpu_a_tenth():
    assert Target("cpu", 1000).usable == 400
    assert Target("cuda", 1000).usable == 900


def test_several_gpus_shard_and_several_cpus_copy_unless_told_otherwise():
    few = {"training": {"max_tokens": 128}}
    one = planner(**few).plan(Target("cuda", 2**30))
    four = planner(**few).plan(Target("cuda", 2**30, ranks=4))
    assert four.sharded
    assert four.need.weights == -(-one.need.weights // 4)
    copies = planner(**few).plan(Target("cpu", 2**30, ranks=4))
    assert not copies.sharded
    assert copies.need.exchange == 0
    told = planner(training={"parallel": "ddp", "max_tokens": 128}).plan(
        Target("cuda", 2**30, ranks=4)
    )
    assert not told.sharded


def test_shards_keep_whole_gradients_where_a_step_takes_several_micro_batches():
    """16 comparisons of 80 tokens on 2 ranks are 640 tokens each: 512 take two micro-batches."""
    two = Target("cuda", 2**30, ranks=2)
    once, again = (planner().need(two, tokens).exchange for tokens in (640, 512))
    assert again - once == 4 * planner().weights.trainable


def test_auto_on_shards_finds_the_size_at_which_gradients_stay_sharded():
    """Memory for shards with one micro-batch, but not for whole gradients with several."""
    training = {"max_tokens": "auto", "batch_size": 16}
    ours = planner(training=training)
    two = Target("cuda", 0, ranks=2)
    at_one = ours.need(two, 640).total
    assert at_one > ours.need(two, 640).passes
    plan = ours.plan(replace(two, memory=int(at_one / 0.9) + 1000))
    assert plan.fits
    assert plan.max_tokens >= 640 - GRAIN


def test_alone_autocast_copies_the_weights_that_shards_are_gathered_as():
    """In bf16 autocast keeps a bfloat16 copy of every matrix; FSDP2 gathers them so, and what flows
    between layers is bfloat16 too."""
    ours = planner(training={"precision": "bf16", "max_tokens": 128})
    alone, two = (ours.plan(Target("cuda", 2**30, ranks=n)).need.activations for n in (1, 2))
    assert alone - two > 2 * ours.weights.head


def test_memory_here_is_what_this_process_may_have(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = target_here(HERE)
    assert whole.device == "cpu"
    assert 2**28 < whole.memory < 2**50
    assert target_here(Ranks(0, 2, torch.device("cpu"))).memory == whole.memory // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert target_here(Ranks(0, 8, torch.device("cpu"))).memory == whole.memory // 4


@pytest.fixture
def quick_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports have their own tests."""
    monkeypatch.setattr(run_export, "check_golden", lambda _: {})


@pytest.mark.usefixtures("quick_finish")
def test_an_automatic_budget_is_used_logged_and_recorded_and_changes_no_loss(
    tmp_path, monkeypatch, caplog
):
    """Memory for some 256 tokens; losses to 1e-4, sums in another order. The recipe keeps its word."""
    fixed = tiny_recipe(tmp_path)
    auto = tiny_recipe(tmp_path, training={"max_tokens": "auto"})
    here = Target("cpu", 6 * MIB)
    monkeypatch.setattr(memory_plan, "target_here", lambda _: here)
    with caplog.at_level(logging.INFO, "hafrm"):
        train(auto, tmp_path / "auto")
    expected = plan_of(auto, here).max_tokens
    assert 128 < expected < 4 * 128
    assert f"training.max_tokens {expected}" in caplog.text
    recorded = json.loads((tmp_path / "auto/provenance.json").read_text())["sessions"][0]
    assert recorded["training.max_tokens"] == expected
    assert 'max_tokens: "auto"' in (tmp_path / "auto/recipe.yaml").read_text()
    train(fixed, tmp_path / "fixed")
    for ours, theirs in zip(
        read_json_lines(tmp_path / "auto/metrics.jsonl"),
        read_json_lines(tmp_path / "fixed/metrics.jsonl"),
        strict=True,
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("lora", "memory", "mode"),
    [({"rank": 4}, 2**30, "ddp"), ({"rank": 4}, MIB // 8, "auto"), (None, 2**30, "auto")],
)
def test_adapters_that_fit_on_every_gpu_are_copied_and_all_else_is_sharded(
    tmp_path, monkeypatch, lora, memory, mode
):
    """Copies exchange the gradients of adapters alone; `auto` shards on GPUs."""
    target = Target("cuda", memory, ranks=4)
    monkeypatch.setattr(memory_plan, "target_here", lambda _: target)
    recipe = tiny_recipe(tmp_path, lora=lora or {}) if lora else tiny_recipe(tmp_path)
    planned = with_token_budget(recipe, HAF, HERE)
    assert planned.training.parallel == mode
    shown = plan_recipe(recipe, HAF, memory=memory / 2**30, ranks=4)
    assert shown.sharded == (mode == "auto")


def plan_of(recipe, target: Target) -> MemoryPlan:
    return Planner(recipe, HAF, AutoConfig.from_pretrained(recipe.model.path)).plan(target)


def test_an_automatic_budget_that_cannot_fit_stops_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_plan, "target_here", lambda _: Target("cpu", MIB))
    recipe = tiny_recipe(tmp_path, training={"max_tokens": "auto"})
    with pytest.raises(ConfigError, match=r"not even 2 x data\.max_length tokens fit"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_number_that_will_not_fit_is_warned_of_and_taken(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory_plan, "target_here", lambda _: Target("cpu", MIB))
    recipe = tiny_recipe(tmp_path)
    assert with_token_budget(recipe, HAF, HERE) is recipe
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "does not fit into" in record.message


def test_a_model_that_cannot_be_traced_needs_a_number(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise ModelError("asks for contents")

    monkeypatch.setattr("hafrm.training.memory_plan.trace", refuse)
    recipe = tiny_recipe(tmp_path)
    assert with_token_budget(recipe, HAF, HERE) is recipe
    assert "asks for contents" in caplog.text
    with pytest.raises(ModelError, match="asks for contents"):
        with_token_budget(tiny_recipe(tmp_path, training={"max_tokens": "auto"}), HAF, HERE)


def test_what_would_fit_is_tried_from_the_harmless_to_more_ranks(monkeypatch, tmp_path):
    """A GPU of 2 MiB: every change is planned, and two or more ranks fit at last."""
    recipe = tiny_recipe(tmp_path, training={"batch_size": 2, "precision": "fp32"})
    plan = plan_recipe(recipe, HAF, memory=0.002)
    assert not plan.fits
    words = [name for name, _ in plan.remedies]
    assert words[0] == "training.max_tokens=auto"
    assert words[1].endswith("training.gradient_checkpointing=true")
    assert words[2].endswith("training.precision=bf16")
    assert words[3].endswith("lora.rank=64")
    assert "ranks" in words[4]
    assert all(other.need.total < plan.need.total for _, other in plan.remedies)
    assert plan_recipe(recipe, HAF, memory=80.0).remedies == ()


def test_a_plan_counts_the_host_memory_and_where_the_export_is_proved():
    """bf16 LoRA: gathered weights (2 bytes a frozen one), merged in float32, cast. Training all weights
    in float32: a checkpoint of weights and two moments. A proof takes 5.2 bytes a weight and 2 GiB."""
    adapted = planner(training={"precision": "bf16"}, lora={"rank": 4})
    counts, plan = adapted.weights, adapted.plan(Target("cuda", 2**32))
    gathered = 4 * counts.trainable + counts.frozen_bytes
    assert plan.host == gathered + (4 + 2) * counts.total
    assert plan.proof == int(5.2 * counts.total) + 2**31
    whole = planner(training={"precision": "fp32"})
    assert whole.plan(Target("cuda", 2**32)).host == 12 * whole.weights.trainable


def test_the_command_prints_the_plan_loads_no_weights_and_says_by_its_exit_code_whether_it_fits(
    tmp_path, monkeypatch
):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(tiny_recipe(tmp_path, training={"batch_size": 2})))
    (tmp_path / "base/model.safetensors").unlink()
    monkeypatch.setattr(model_setup, "load_base", None)
    fine = CliRunner().invoke(app, ["plan", str(file), "--memory", "80"])
    assert fine.exit_code == 0, fine.output
    for word in ("weights", "gradients", "optimiser", "activations", "a step in all", "fits with"):
        assert word in fine.output
    assert "would fit" not in fine.output
    tight = CliRunner().invoke(app, ["plan", str(file), "--memory", "0.001", "--ranks", "2"])
    assert tight.exit_code == 1
    assert "does NOT fit" in tight.output
    assert "2 GPU rank(s), each" in tight.output
    assert "what would fit" in tight.output


def test_a_missing_model_is_named(tmp_path):
    recipe = tiny_recipe(tmp_path, model={"path": str(tmp_path / "nowhere")})
    with pytest.raises(ModelError, match="nowhere"):
        plan_recipe(recipe, HAF)
