"""The plan of a run's memory: against real joint steps, budgets that fit, ranks, automatic budgets."""

import json
import logging

import pytest
import torch
from typer.testing import CliRunner

from hafrm.cli import app
from hafrm.engine import logprobs
from hafrm.engine.layout import lay_out
from hafrm.errors import ConfigError
from hafrm.recipe_file import dump_recipe
from hafrm.training import memory_plan, setup
from hafrm.training.loop import run_training
from hafrm.training.memory_plan import (
    LARGEST,
    MemoryPlan,
    Target,
    Weights,
    count_weights,
    plan_memory,
    plan_recipe,
    state_bytes,
    target_here,
    with_token_budget,
)
from hafrm.training.methods import get_method, resolve_method
from hafrm.training.parallel import Ranks
from hafrm.training.passes import pass_tokens
from hafrm.training.setup import meta_model
from hafrm.training.step_batches import MicroBatch
from support.live_bytes import LiveBytes
from support.models import FAMILIES, token_groups
from support.recipe_models import meta_of, real_model, recipe_of, tiny_mixtral_config
from support.step_pairs import adamw, one_step
from support.tiny_runs import tiny_recipe

HAF = get_method("haf")
HERE = Ranks(0, 1, torch.device("cpu"))
MIB = 2**20
BF16 = {"precision": "bf16"}
CHECKPOINTED = {"gradient_checkpointing": True}


def plan(target: Target, family: str = "llama", **sections: object) -> MemoryPlan:
    recipe = recipe_of(**sections)
    return plan_memory(recipe, count_weights(meta_of(family, recipe)), target)


def measured_peak(family: str, **sections: object) -> int:
    """Bytes of weights, optimiser state and everything that two real joint steps make, at their fullest;
    ten comparisons of 64 tokens, two fifths of them prompt, twice a step: the second finds gradients."""
    model = real_model(family, recipe_of(**sections))
    layout = lay_out(token_groups([(25, (26, 13))] * 10))
    chosen = torch.arange(10) * 2
    batch = MicroBatch(
        layout=layout,
        chosen=chosen,
        rejected=chosen + 1,
        margins=torch.zeros(10),
        weights=torch.ones(10),
        reference_logps=torch.zeros(20),
        ids=("g",) * 10,
    )
    with LiveBytes() as live:
        optimizer = adamw(model)
        for _ in range(2):
            one_step(model, [batch, batch], HAF, optimizer, num_comparisons=20)
    return live.peak + sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        *((family, {}) for family in ("llama", "qwen2", "gpt2", "phi", "mistral")),
        ("llama", {"training": CHECKPOINTED}),
        ("llama", {"lora": {"rank": 4}}),
        ("phi", {"training": CHECKPOINTED, "lora": {"rank": 4}}),
    ],
)
def test_the_step_is_planned_near_the_peak_of_real_joint_steps(monkeypatch, family, sections):
    """Weights, gradients, moments, activations, chunks of logits and what backward holds, of tiny models,
    beside whose width masks and single numbers count: 15 % too low to 30 % too high."""
    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", 100 * 61)
    training = {"max_tokens": 640, "precision": "fp32", **sections.get("training", {})}
    sections = {**sections, "training": training}
    need = plan(Target("cpu", 2**30), family, **sections).need
    assert 0.85 < need.step / measured_peak(family, **sections) < 1.3


@pytest.mark.parametrize(
    ("family", "lora"),
    [*((family, None) for family in FAMILIES), ("llama-tied", {"rank": 4}), ("gpt2", {"rank": 4})],
)
def test_weights_of_every_family_are_counted_as_the_real_model_has_them(family, lora):
    recipe = recipe_of(**({"lora": lora, "training": BF16} if lora else {}))
    weights, real = count_weights(meta_of(family, recipe)), real_model(family, recipe)
    assert weights == count_weights(real) or lora  # the tiny real model is loaded in float32
    assert weights.total == sum(p.numel() for p in real.parameters())
    assert weights.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert weights.frozen_bytes == 2 * (weights.total - weights.trainable)
    assert weights.adapters == bool(lora)


def test_the_widths_of_a_layer_are_those_of_its_matrices_and_norms():
    """Llama: Q and O 32 + 32, K and V 32 + 16, gate, up and down 32 + 48, 48 of the gated product; two
    norms of 32. Qwen3 also norms 4 query and 2 key heads of 8; GPT-2 has QKV 32 + 96, O 64, MLP 160 twice.
    Outside are embeddings, final norm and policy head, but not the reward head."""
    llama, qwen3, gpt2 = (
        count_weights(meta_of(f, recipe_of())) for f in ("llama", "qwen3", "gpt2")
    )
    assert llama.features == 2 * 64 + 2 * 48 + 3 * 80 + 48
    assert (llama.normed, llama.head_normed, llama.rms) == (64, 0, True)
    assert (qwen3.normed, qwen3.head_normed) == (64, 32 + 16)
    assert (gpt2.features, gpt2.rms) == (128 + 64 + 2 * 160, False)
    assert llama.total == 2 * llama.layer + llama.outside + 32
    assert llama.outside == 2 * 61 * 32 + 32
    without = count_weights(meta_of("llama", recipe_of(), method="bt"))
    assert (without.vocab, without.total) == (0, llama.total - 61 * 32)


def test_of_stacked_experts_a_token_meets_those_it_is_sent_to():
    """Mixtral, 2 of 8 experts: attention as above, a router 32 + 8, 2 x (32 + 96) and 2 x (48 + 32) of
    experts, and 2 x 48 of their gated products."""
    weights = count_weights(meta_model(tiny_mixtral_config(), recipe_of(), HAF))
    assert weights.features == 2 * 64 + 2 * 48 + 40 + 2 * 128 + 2 * 80 + 2 * 48


def test_a_meta_model_takes_no_random_number_and_no_memory():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = meta_of("llama", recipe_of(lora={"rank": 4}))
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def weights(**changed: int) -> Weights:
    return Weights(**{**dict.fromkeys(Weights._fields, 0), **changed})


def test_states_are_sixteen_bytes_a_trained_weight_and_two_a_frozen_one_and_shards_divide_them():
    """float32 weights, gradients and two moments. 8 ranks: states / 8. Exchange in bfloat16:
    2 (2 x 10 + 30) gathered, 6 x 10 + 2 x 30 of gradients; several micro-batches keep them whole."""
    states = state_bytes(weights(trainable=100, frozen_bytes=2000))
    assert states == (2400, 400, 800, 0)
    whole = weights(trainable=800, layer=10, layer_trainable=10, outside=30, outside_trainable=30)
    once = state_bytes(whole, shards=8, gathered=2, accumulates=False)
    assert once == (400, 400, 800, 2 * 50 + 6 * 10 + 2 * 30)
    again = state_bytes(whole, shards=8, gathered=2, accumulates=True)
    assert again[3] - once[3] == 4 * 800


def test_log_probs_are_planned_in_the_chunks_of_their_device_and_without_a_policy_head_not_at_all():
    """A frozen head in bfloat16: a chunk of 2^27 logits on CUDA, 2^24 on a CPU, its copy and the next; the
    CPU's float32 product reads a copy of the head."""
    recipe = recipe_of(training=BF16)
    head = weights(vocab=2**17, width=64, adapters=True)
    cpu, cuda = (
        memory_plan.logprob_bytes(recipe, head, 4096, Target(device, 2**30), train=True)
        for device in ("cpu", "cuda")
    )
    assert cuda - cpu == 3 * 4 * (2**27 - 2**24) - 4 * 2**17 * 64
    assert memory_plan.logprob_bytes(recipe, weights(), 9, Target("cpu", 1), train=True) == 0


def test_auto_takes_the_largest_budget_that_fits_with_the_spare_part():
    """No more than a step holds nor than helps, and no less than a comparison."""
    training = {"max_tokens": "auto", "batch_size": 128}
    best = plan(Target("cuda", 24 * MIB), "phi", training=training)
    assert best.fits
    assert 2 * 64 < best.max_tokens < 128 * 2 * 64
    more = {**training, "max_tokens": best.max_tokens + memory_plan.GRAIN}
    assert not plan(Target("cuda", 24 * MIB), "phi", training=more).fits
    for batch_size, memory, tokens in (
        (4, 2**40, 4 * 2 * 64),
        (1024, 2**40, LARGEST),
        (4, MIB // 2, 2 * 64),
    ):
        training["batch_size"] = batch_size
        best = plan(Target("cuda", memory), "phi", training=training)
        assert (best.max_tokens, best.fits) == (tokens, memory == 2**40)
    number = plan(Target("cpu", 2**30), training={"max_tokens": 8192, "batch_size": 2})
    assert (number.max_tokens, number.tokens) == (8192, 2 * 2 * 64)


def test_several_gpus_shard_and_several_cpus_copy_unless_the_recipe_says_otherwise():
    """Weights are whole on every rank until the reference is there."""
    few = {"max_tokens": 128}
    gpus, cpus = (Target(device, 2**30, ranks=4) for device in ("cuda", "cpu"))
    one, four = (plan(t, training=few) for t in (Target("cuda", 2**30), gpus))
    assert four.sharded
    assert four.need.weights == -(-one.need.weights // 4)
    assert four.need.passes >= one.need.weights
    copies = plan(cpus, training=few)
    assert (copies.sharded, copies.need.exchange) == (False, 0)
    assert not plan(gpus, training={"parallel": "ddp", **few}).sharded


def test_shards_keep_whole_gradients_in_several_micro_batches_and_no_copies_of_autocast():
    """16 comparisons of 80 tokens on 2 ranks are 640 tokens each: 512 take two micro-batches."""
    two, counted = Target("cuda", 2**30, ranks=2), count_weights(meta_of("llama", recipe_of()))
    once, again = (plan(two, training={"max_tokens": n}) for n in (768, 512))
    assert again.need.exchange - once.need.exchange == 4 * counted.trainable
    training = {**BF16, "max_tokens": 128}
    alone = plan(Target("cuda", 2**30), training=training).need.activations
    assert alone - plan(two, training=training).need.activations > 2 * 2 * counted.layer


def test_ranks_that_run_sequences_together_divide_what_layers_hold_but_not_the_weights_twice():
    """The heads of keys, 2, divide among 4 GPUs in teams of 2; a step has half as many sequences."""
    gpus = Target("cuda", 2**30, ranks=4)
    apart, together = (
        plan(gpus, training={**BF16, "max_tokens": 512, "parallel": p}).need
        for p in ("fsdp", "ulysses")
    )
    assert together.activations == apart.activations // 2
    assert together.weights == apart.weights
    assert together.passes < apart.passes


def test_masks_are_planned_where_attention_pads_groups_on_a_gpu():
    """float32 has no varlen kernel: 5 bytes a pair of tokens stay, positions take 10 more to make it."""
    masks = 128 * 128
    training = {"max_tokens": 128, "precision": "fp32"}
    cpu, gpu = (plan(Target(d, 2**30), training=training).need for d in ("cpu", "cuda"))
    assert gpu.activations - cpu.activations == 5 * masks
    half = plan(Target("cuda", 2**30), training={**training, **BF16}).need
    assert half.activations < gpu.activations


def test_passes_are_planned_at_the_tokens_that_they_run():
    """Four micro-batches' up to 2^15, and beyond that a micro-batch's."""
    assert [pass_tokens(n) for n in (1024, 16384, 65536)] == [4096, 32768, 65536]


def test_memory_here_is_what_this_process_may_have(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = target_here(HERE)
    assert whole.device == "cpu"
    assert 2**28 < whole.memory < 2**50
    assert target_here(Ranks(0, 2, torch.device("cpu"))).memory == whole.memory // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert target_here(Ranks(0, 8, torch.device("cpu"))).memory == whole.memory // 4


def test_an_automatic_budget_is_used_and_recorded(tmp_path, monkeypatch):
    """Memory for some 256 tokens. The recipe keeps its word."""
    auto = tiny_recipe(tmp_path, method={"name": "bt"}, training={"max_tokens": "auto", "steps": 1})
    monkeypatch.setattr(memory_plan, "target_here", lambda _: Target("cpu", 8 * MIB))
    jobs = []
    run_training(auto, tmp_path / "auto", finish=jobs.append)
    budget = jobs[0].recipe.training.token_budget
    recorded = json.loads((tmp_path / "auto/provenance.json").read_text())["sessions"][0]
    assert 128 <= recorded["training.max_tokens"] == budget <= 512
    assert 'max_tokens: "auto"' in (tmp_path / "auto/recipe.yaml").read_text()


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
    recipe = tiny_recipe(tmp_path, lora=lora) if lora else tiny_recipe(tmp_path)
    assert with_token_budget(recipe, HAF, HERE).training.parallel == mode
    shown = plan_recipe(recipe, HAF, memory=memory / 2**30, ranks=4)
    assert shown.sharded == (mode == "auto")


def test_a_length_that_the_model_does_not_take_is_refused_before_data_are_read(tmp_path):
    recipe = tiny_recipe(tmp_path, data={"max_length": 10_000}, training={"max_tokens": 20_000})
    with pytest.raises(ConfigError, match=r"data\.max_length is 10000, but the model takes"):
        plan_recipe(recipe, resolve_method(recipe))


def test_what_cannot_fit_stops_an_automatic_budget_and_a_number_is_warned_of_and_taken(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(memory_plan, "target_here", lambda _: Target("cpu", MIB))
    recipe = tiny_recipe(tmp_path, training={"max_tokens": "auto"})
    with pytest.raises(ConfigError, match=r"not even 2 x data\.max_length tokens fit"):
        run_training(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    caplog.clear()
    assert with_token_budget(tiny_recipe(tmp_path), HAF, HERE).training.max_tokens == 256
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "does not fit" in record.message


def test_a_plan_counts_what_lies_on_the_host_and_the_proof_of_the_export_where_it_has_room():
    """One weight on its way to a file, merged in float32; offloaded shards with gradients and moments (16
    bytes a weight); the merged export in float32, with three tenths and 2 GiB for a batch."""
    lora, gpu = {"training": BF16, "lora": {"rank": 4}}, Target("cuda", 2**32)
    adapted, counts = plan(gpu, **lora), count_weights(meta_of("llama", recipe_of(**lora)))
    assert adapted.need.host == 4 * 4 * counts.largest
    assert adapted.proof == int(1.3 * 4 * (counts.total - counts.trainable)) + 2**31
    assert (adapted.prover, plan(Target("cuda", 2**31), **lora).prover) == ("GPU", "host")
    assert "proof of the export: at most 2 on the GPU" in str(adapted)
    training = {"precision": "fp32", "parallel": "fsdp", "offload": "weights"}
    whole = count_weights(meta_of("llama", recipe_of()))
    need = plan(Target("cuda", 2**32, ranks=2), training=training).need
    assert need.host == 16 * whole.trainable // 2 + 4 * 4 * whole.largest


def test_the_command_prints_the_plan_loads_no_weights_and_says_by_its_exit_code_whether_it_fits(
    tmp_path, monkeypatch
):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(tiny_recipe(tmp_path, training={"batch_size": 2})))
    (tmp_path / "base/model.safetensors").unlink()
    monkeypatch.setattr(setup, "load_base", None)
    fine = CliRunner().invoke(app, ["plan", str(file), "--memory", "80"])
    assert fine.exit_code == 0, fine.output
    assert "a step in all" in fine.output
    assert "needs less" not in fine.output
    tight = CliRunner().invoke(app, ["plan", str(file), "--memory", "0.001", "--ranks", "2"])
    assert tight.exit_code == 1
    assert "2 CUDA rank(s), each" in tight.output
    output = " ".join(tight.output.split())
    assert "does not fit" in output
    assert "training.gradient_checkpointing=true" in output
