"""A shadow is held to the real model: its weights to the last one, its bytes to those of a real step."""

import pytest
import torch
from torch import Tensor, nn

from hafrm.engine.layout import Layout
from hafrm.engine.model import HybridModel
from hafrm.errors import ModelError
from hafrm.training.methods import get_method
from hafrm.training.shadow import Footprint, LiveBytes, count, layout_of, shadow_model, trace
from models_for_tests import FAMILIES
from tiny_shadows import real_model, recipe_of, shadow_of

SHAPE = [(20, (15, 10)), (9, (6, 4, 3))]
LORA = {"rank": 4, "targets": ["q_proj", "down_proj"]}


def measured(model: HybridModel, layout: Layout, *, half: bool) -> Footprint:
    """What a real step keeps and holds, rewards only; gradients are there, as after a first micro-batch."""
    model.policy_head = None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *model.buffers()]
    known += [p.grad for p in model.parameters() if p.grad is not None]
    known += [value for value in vars(layout).values() if isinstance(value, Tensor)]
    with LiveBytes(known) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = model(layout)
        kept = live.alive
        outputs.rewards.sum().backward()
    return Footprint(kept, live.peak - kept)


def saved_bytes(model: HybridModel, layout: Layout) -> int:
    """The storages that autograd is asked to save, as a hook sees them: a second way to count."""
    model.policy_head = None
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(layout)
        assert outputs.rewards.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shadow_of_every_family_keeps_what_autograd_saves_of_a_real_forward(family):
    """Within 1 %: a mask, an index or a table that autograd has no use for."""
    recipe = recipe_of()
    saved = saved_bytes(real_model(family, recipe), layout_of(SHAPE))
    found = trace(shadow_of(family, recipe), layout_of(SHAPE), half=False, cuda=False)
    assert found.kept == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize(
    ("family", "training", "lora"),
    [
        ("llama", {}, None),
        ("llama", {"precision": "bf16"}, None),
        ("llama", {"gradient_checkpointing": True}, None),
        ("llama", {"gradient_checkpointing": True, "precision": "bf16"}, None),
        ("llama", {"sharing": "off"}, None),
        ("llama", {}, LORA),
        ("mistral", {"gradient_checkpointing": True}, LORA),
        ("gemma2", {}, None),
        ("gpt2", {"precision": "bf16"}, None),
        ("phi", {"precision": "bf16", "sharing": "off"}, None),
    ],
)
def test_the_shadow_keeps_and_holds_exactly_the_bytes_of_a_real_step(family, training, lora):
    """To the byte, however the step is run: it is the same code."""
    sections = {"training": training, **({"lora": lora} if lora else {})}
    recipe = recipe_of(**sections)
    half = training.get("precision") == "bf16"
    found = trace(shadow_of(family, recipe), layout_of(SHAPE), half=half, cuda=False)
    assert found == measured(real_model(family, recipe), layout_of(SHAPE), half=half)


@pytest.mark.parametrize(
    ("family", "lora"),
    [*((family, None) for family in FAMILIES), ("llama-tied", {"rank": 4}), ("gpt2", {"rank": 4})],
)
def test_weights_of_every_family_are_counted_as_the_real_model_has_them(family, lora):
    sections = {} if lora is None else {"lora": lora, "training": {"precision": "bf16"}}
    recipe = recipe_of(**sections)
    counts = count(shadow_of(family, recipe))
    real = real_model(family, recipe)
    assert counts == count(real) or lora  # the tiny real model is loaded in float32
    parameters = list(real.parameters())
    assert counts.total == sum(p.numel() for p in parameters)
    assert counts.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert counts.frozen_bytes == 2 * counts.frozen
    assert counts.adapters == sum(p.numel() for n, p in real.named_parameters() if "lora_" in n)
    modules = {**dict(real.backbone.named_modules())}
    plain = [m for n, m in modules.items() if isinstance(m, nn.Linear) and "lora_" not in n]
    if family != "gpt2":  # whose products are Conv1D
        assert counts.matrices == sum(m.weight.numel() for m in plain)
    assert counts.head == real.policy_head.weight.numel()


def test_a_head_that_no_method_trains_is_not_counted():
    counts = count(shadow_of("llama", recipe_of(), method="bt"))
    assert counts.head == 0
    assert counts.total == count(shadow_of("llama", recipe_of())).total - 61 * 32


def test_layers_and_the_outside_make_up_the_model():
    """Two equal layers; outside are embeddings, final norm and policy head, but not the reward head."""
    counts = count(shadow_of("llama", recipe_of()))
    assert counts.total == 2 * counts.layer + counts.outside + 32
    assert counts.outside == 2 * 61 * 32 + 32


def test_a_token_meets_its_share_of_stacked_experts():
    """Mixtral, 8 experts of which a token visits 2: two layers of attention 32 x (32 + 16 + 16 + 32), a
    router 8 x 32, and 2 x 3 x 32 x 48 of experts."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    counts = count(shadow_model(config, recipe_of(), get_method("haf")))
    assert counts.matrices == 2 * (32 * 96 + 8 * 32 + 2 * 3 * 32 * 48)
    assert counts.total > counts.matrices + 2 * 6 * 3 * 32 * 48


def test_a_shadow_takes_no_random_number_and_no_memory():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = shadow_of("llama", recipe_of(lora={"rank": 4}))
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_shadow_can_be_traced_again_and_keeps_its_heads():
    model = shadow_of("llama", recipe_of())
    policy_head, reward_head = model.policy_head, model.reward_head
    first = trace(model, layout_of(SHAPE), half=False, cuda=False)
    assert trace(model, layout_of(SHAPE), half=False, cuda=False) == first
    assert (model.policy_head, model.reward_head) == (policy_head, reward_head)
    twice = trace(model, layout_of(2 * SHAPE), half=False, cuda=False)
    assert twice.kept == pytest.approx(2 * first.kept, rel=0.03)


def test_a_model_that_keeps_a_tensor_of_its_forward_can_be_traced_again():
    """longrope keeps its long factors."""
    import transformers

    config = transformers.Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    )
    model = shadow_model(config, recipe_of(), get_method("haf"))
    first = trace(model, layout_of(SHAPE), half=False, cuda=False)
    assert trace(model, layout_of(2 * SHAPE), half=False, cuda=False).kept > 1.9 * first.kept


def test_a_policy_without_reward_head_can_be_traced():
    model = shadow_of("llama", recipe_of(), method="dpo")
    found = trace(model, layout_of(SHAPE), half=False, cuda=False)
    assert found == trace(shadow_of("llama", recipe_of()), layout_of(SHAPE), half=False, cuda=False)
    assert model.reward_head is None


@pytest.mark.parametrize(("family", "more"), [("gpt2", True), ("llama", False)])
def test_on_a_gpu_autocast_keeps_layer_norms_in_float32(family, more):
    """CUDA's autocast computes `layer_norm` in float32, a CPU's in bfloat16; a Llama has its own norms,
    which are float32 on both."""
    recipe = recipe_of(training={"precision": "bf16"}, lora={"rank": 4})
    cpu, gpu = (
        trace(shadow_of(family, recipe), layout_of(SHAPE), half=True, cuda=cuda).kept
        for cuda in (False, True)
    )
    assert (gpu > 1.1 * cpu) == more
    assert gpu >= cpu


def test_on_a_gpu_layers_are_computed_again_as_they_were_at_first():
    """Casting holds in backward too; checkpointing compares what it keeps with what it recomputes."""
    training = {"precision": "bf16", "gradient_checkpointing": True}
    model = shadow_of("phi", recipe_of(training=training))
    whole = trace(shadow_of("phi", recipe_of()), layout_of(SHAPE), half=True, cuda=True)
    assert trace(model, layout_of(SHAPE), half=True, cuda=True).kept < whole.kept / 3


def test_on_a_gpu_grouped_heads_in_float32_keep_keys_and_values_for_every_query_head():
    """Keys and values of 8 numbers in two layers: for 4 heads those of the five segments (35 + 30 + 15 + 13
    + 12), and not for 2 heads those of the row (67) and of the second and later segments (30 + 13 + 12).
    The fused kernel keeps no score."""
    recipe = recipe_of()
    cpu, gpu = (
        trace(shadow_of("llama", recipe), layout_of(SHAPE), half=False, cuda=cuda).kept
        for cuda in (False, True)
    )
    assert gpu - cpu == 2 * 2 * 4 * 8 * (4 * 105 - 2 * 67 - 2 * 55)


def test_a_recurrent_model_which_shares_nothing_is_counted_and_traced_too():
    import transformers

    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2)
    model = shadow_model(config, recipe_of(), get_method("haf"))
    counts = count(model)
    assert (counts.layers, counts.attention_width) == (2, 0)
    assert trace(model, layout_of(SHAPE), half=False, cuda=False).kept > 0


def test_a_model_that_asks_for_contents_is_told_apart():
    model = shadow_of("llama", recipe_of())
    layer = model.backbone.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: inputs[0].sum().item() and None)
    with pytest.raises(ModelError, match=r"give training\.max_tokens as a number"):
        trace(model, layout_of(SHAPE), half=False, cuda=False)


def test_live_bytes_forgets_what_is_freed_and_leaves_out_what_was_there():
    there = torch.zeros(100)
    with LiveBytes([there]) as live:
        made = there + 1
        view = made[:10]
        assert live.alive == 400
        del made
        assert live.alive == 400, "a view holds it"
        del view
        assert live.alive == 0
        there.add_(1)
        assert (live.alive, live.peak) == (0, 400)
