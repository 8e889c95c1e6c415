"""A model on the meta device against the real one: its weights, and the bytes of a real step."""

import pytest
import torch
from torch import Tensor

from hafrm.engine import logprobs
from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel
from hafrm.errors import ModelError
from hafrm.training.memory_trace import (
    Footprint,
    LiveBytes,
    Weights,
    count_weights,
    logprob_bytes,
    meta_model,
    state_bytes,
    trace,
)
from hafrm.training.methods import get_method
from models_for_tests import FAMILIES, token_groups
from tiny_meta_models import meta_of, real_model, recipe_of

SHAPE = 3 * [(20, (15, 10)), (9, (6, 4, 3))]
LORA = {"rank": 4, "targets": ["q_proj", "down_proj"]}


def measured(model: HybridModel, *, half: bool) -> Footprint:
    """What a real step keeps and holds, rewards only; gradients are there, as after a first micro-batch."""
    layout = lay_out(token_groups(SHAPE))
    model.policy_head = None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    existing = [*model.parameters(), *model.buffers()]
    existing += [p.grad for p in model.parameters() if p.grad is not None]
    existing += [value for value in vars(layout).values() if isinstance(value, Tensor)]
    with LiveBytes(existing) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = model(layout)
        kept = live.alive
        outputs.rewards.sum().backward()
    return Footprint(kept, live.peak - kept)


@pytest.mark.parametrize(
    ("family", "training", "lora"),
    [
        *((family, {}, None) for family in FAMILIES),
        ("llama", {"precision": "bf16"}, None),
        ("llama", {"gradient_checkpointing": True}, None),
        ("llama", {"gradient_checkpointing": True, "precision": "bf16"}, None),
        ("llama", {"sharing": "off"}, None),
        ("llama", {}, LORA),
        ("llama", {"precision": "bf16"}, LORA),
        ("mistral", {"gradient_checkpointing": True}, LORA),
        ("phi", {"precision": "bf16", "sharing": "off"}, None),
    ],
)
def test_a_trace_keeps_and_holds_the_bytes_of_a_real_step(family, training, lora):
    """Within 10 %: the masks of a few short segments, which are nothing beside a real model's width."""
    recipe = recipe_of(training=training, **({"lora": lora} if lora else {}))
    half = training.get("precision") == "bf16"
    predicted = trace(meta_of(family, recipe), SHAPE, half=half)
    real = measured(real_model(family, recipe), half=half)
    assert sum(predicted) == pytest.approx(sum(real), rel=0.1)
    assert predicted.kept == pytest.approx(real.kept, rel=0.1)


@pytest.mark.parametrize(
    ("family", "lora"),
    [*((family, None) for family in FAMILIES), ("llama-tied", {"rank": 4}), ("gpt2", {"rank": 4})],
)
def test_weights_of_every_family_are_counted_as_the_real_model_has_them(family, lora):
    sections = {} if lora is None else {"lora": lora, "training": {"precision": "bf16"}}
    recipe = recipe_of(**sections)
    weights = count_weights(meta_of(family, recipe))
    real = real_model(family, recipe)
    assert weights == count_weights(real) or lora  # the tiny real model is loaded in float32
    parameters = list(real.parameters())
    assert weights.total == sum(p.numel() for p in parameters)
    assert weights.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert weights.frozen_bytes == 2 * (weights.total - weights.trainable)
    assert weights.adapters == bool(lora)
    assert weights.head == real.policy_head.weight.numel()


def test_layers_and_the_outside_make_up_the_model():
    """Two equal layers; outside are embeddings, final norm and policy head, but not the reward head."""
    weights = count_weights(meta_of("llama", recipe_of()))
    assert weights.total == 2 * weights.layer + weights.outside + 32
    assert weights.outside == 2 * 61 * 32 + 32
    without = count_weights(meta_of("llama", recipe_of(), method="bt"))
    assert (without.head, without.total) == (0, weights.total - 61 * 32)


def test_a_meta_model_takes_no_random_number_and_no_memory():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = meta_of("llama", recipe_of(lora={"rank": 4}))
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_model_can_be_traced_again():
    model = meta_of("llama", recipe_of())
    first = trace(model, SHAPE, half=False)
    assert trace(model, SHAPE, half=False) == first
    twice = trace(model, 2 * SHAPE, half=False)
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
    model = meta_model(config, recipe_of(), get_method("haf"))
    first = trace(model, SHAPE, half=False)
    assert trace(model, 2 * SHAPE, half=False).kept > 1.9 * first.kept


def test_a_recurrent_model_which_shares_nothing_is_counted_and_traced_too():
    import transformers

    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2)
    model = meta_model(config, recipe_of(), get_method("haf"))
    assert trace(model, SHAPE, half=False).kept > 0


def test_a_model_that_reads_contents_needs_a_number():
    model = meta_of("llama", recipe_of())
    layer = model.backbone.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: inputs[0].sum().item() and None)
    with pytest.raises(ModelError, match=r"give training\.max_tokens as a number"):
        trace(model, SHAPE, half=False)


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


def weights(**changed: int) -> Weights:
    values = dict.fromkeys(Weights.__dataclass_fields__, 0)
    return Weights(**{**values, "adapters": False, **changed})


@pytest.mark.parametrize(
    ("frozen", "stored"),
    [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)],
)
@pytest.mark.parametrize("scored", [50, 500])
def test_predicted_bytes_of_log_probs_are_those_of_the_kernel(monkeypatch, frozen, stored, scored):
    """float32 products in chunks of 100 rows: within 5 % (columns of one number a row). The gradient that
    is spread over all tokens is tested with the whole step; a trained head is stored in float32."""
    vocab, width = 1000, 64
    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", 100 * vocab)
    hidden = torch.randn(scored, width, requires_grad=True)
    weight = torch.randn(vocab, width).to(stored).requires_grad_(not frozen)
    targets = torch.randint(0, vocab, (scored,))
    upstream = torch.ones(scored)
    with LiveBytes([hidden, weight, targets, upstream]) as live:
        logprobs.token_logprobs(hidden, weight, targets).backward(upstream)
    head = weights(vocab=vocab, width=width, head=vocab * width, adapters=frozen)
    size = 2 if stored == torch.bfloat16 else 4
    predicted = logprob_bytes(head, [(0, (scored,))], device="cpu", product=4, stored=size)
    # The rows that predict were made before: only their gradient is new, spread over no other token.
    predicted -= 2 * 4 * width * scored
    assert predicted == pytest.approx(live.peak, rel=0.05)


def test_log_probs_on_a_gpu_are_planned_in_the_chunks_that_it_runs():
    """A frozen head: a chunk of 2^27 logits, its copy and the chunk after it, in float32."""
    head = weights(vocab=2**17, width=64, head=2**17 * 64, adapters=True)
    on = {
        device: logprob_bytes(head, [(0, (4096,))], device=device, product=2, stored=2)
        for device in ("cpu", "cuda")
    }
    assert on["cuda"] - on["cpu"] == 3 * 4 * (2**27 - 2**24)


def test_no_policy_head_needs_no_log_prob_bytes():
    assert logprob_bytes(weights(vocab=10), [(5, (5,))], device="cpu", product=4, stored=4) == 0


def test_states_are_sixteen_bytes_a_trained_weight_and_two_a_frozen_one():
    """float32 weights, gradients and two moments; bfloat16 for what is frozen."""
    states = state_bytes(weights(trainable=100, frozen_bytes=2000))
    assert states == (2400, 400, 800, 0)


def test_shards_divide_the_states_and_hold_two_layers_and_the_outside():
    """8 ranks: states / 8. Exchange in bfloat16: 2 (2 x 10 + 30) gathered, 6 x 10 + 2 x 30 of gradients;
    several micro-batches keep all gradients whole in float32."""
    whole = weights(trainable=800, layer=10, layer_trainable=10, outside=30, outside_trainable=30)
    once = state_bytes(whole, shards=8, gathered=2, accumulates=False)
    assert once == (400, 400, 800, 2 * 50 + 6 * 10 + 2 * 30)
    again = state_bytes(whole, shards=8, gathered=2, accumulates=True)
    assert again[3] - once[3] == 4 * 800
