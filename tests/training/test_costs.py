"""Arithmetic of a step against what is counted and measured: FLOPs, and the bytes of log-probs."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from flops_for_tests import COUNTED
from hafrm.engine import logprobs
from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel
from hafrm.training.costs import (
    Counts,
    Work,
    copies_bytes,
    logprob_bytes,
    reference_flops,
    shards_bytes,
    step_flops,
    work_of,
)
from hafrm.training.shadow import LiveBytes, count
from models_for_tests import tiny_hybrid, token_groups
from tiny_shadows import adapted

SHAPE = ((67, (31, 22)), (41, (13, 29)), (52, (18, 18, 9)))


def counted_flops(model: HybridModel, *, train: bool = True) -> int:
    """What one joint step, or one forward, really multiplies."""
    layout = lay_out(token_groups(SHAPE))
    with (
        FlopCounterMode(display=False, custom_mapping=COUNTED) as counter,
        torch.set_grad_enabled(train),
    ):
        outputs = model(layout)
        if train:
            pairs = (
                outputs.rewards[1:] - outputs.rewards[:-1] + outputs.logps[1:] - outputs.logps[:-1]
            )
            F.softplus(pairs).sum().backward()
    return counter.get_total_flops()


def counts(**changed: int) -> Counts:
    values = dict.fromkeys(Counts.__dataclass_fields__, 0)
    return Counts(**{**values, **changed})


def test_work_counts_each_prompt_once_and_each_branchs_keys():
    """67 + 31 + 22 + 41 + ... = 300 tokens, 140 of them scored; the second branch of (3, (2, 1)) is one
    query over 4 keys: 3.5; the first 5 causal queries: 12.5."""
    work = work_of(SHAPE)
    assert (work.tokens, work.scored) == (300, 140)
    assert work_of([(3, (2, 1))]).attention == 5**2 / 2 + 1 * 3 + 1 / 2


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "opt", "gemma3", "qwen3"])
def test_predicted_flops_are_those_of_a_real_step(family):
    """Within 0.5 %: left out are the reward head and what is no product; windows count as full, which in
    Gemma-3's window of 7 is 4 %."""
    model = tiny_hybrid(family)
    predicted = step_flops(count(model), work_of(SHAPE)).total
    measured = counted_flops(model)
    assert predicted == pytest.approx(measured, rel=0.05 if family == "gemma3" else 0.005)


def test_predicted_flops_of_checkpointing_are_too_high_by_the_products_not_repeated():
    """Above the real ones, by at most a layer's last product of eight: 48 x 32 of 32 x (32 + 32 + 16 +
    16) + 3 x 48 x 32 weights, 2 / 8 of a fifth = 5 %."""
    model = tiny_hybrid("llama")
    model.checkpoint_activations()
    predicted = step_flops(count(model), work_of(SHAPE), checkpointing=True).total
    assert 1.0 < predicted / counted_flops(model) < 1.06


def test_predicted_flops_of_lora_are_too_high_by_the_first_layers_inputs():
    """Nothing asks for the gradient of the first layer's input: half of its projections' backward, in a
    model of two layers less than a tenth."""
    model = adapted("llama")
    predicted = step_flops(count(model), work_of(SHAPE)).total
    assert 1.0 <= predicted / counted_flops(model) < 1.1


def test_predicted_flops_of_a_reference_pass_are_those_of_a_forward():
    model = tiny_hybrid("llama")
    predicted = reference_flops(count(model), work_of(SHAPE)).total
    assert predicted == pytest.approx(counted_flops(model, train=False), rel=0.005)


@pytest.mark.parametrize(
    ("frozen", "stored"),
    [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)],
)
@pytest.mark.parametrize("scored", [50, 500])
def test_predicted_bytes_of_log_probs_are_those_of_the_kernel(monkeypatch, frozen, stored, scored):
    """float32 products in chunks of 100 rows: within 5 % (columns of one number a row). The gradient that
    is spread over all tokens is tested with the whole step; a trained head is stored in float32."""
    vocab, width = 1000, 64
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", 100 * vocab)
    hidden = torch.randn(scored, width, requires_grad=True)
    weight = torch.randn(vocab, width).to(stored).requires_grad_(not frozen)
    targets = torch.randint(0, vocab, (scored,))
    upstream = torch.ones(scored)
    known = [hidden, weight, targets, upstream]
    with LiveBytes(known) as live:
        logprobs.token_logprobs(hidden, weight, targets).backward(upstream)
    head = counts(vocab=vocab, width=width, head=vocab * width, adapters=int(frozen))
    size = 2 if stored == torch.bfloat16 else 4
    predicted = logprob_bytes(head, Work(0, scored, 0.0), device="cpu", product=4, stored=size)
    # the rows that predict were made before, so that only their gradient is new
    predicted -= 4 * width * scored
    assert predicted == pytest.approx(live.peak, rel=0.05)


def test_log_probs_on_a_gpu_are_planned_in_the_chunks_that_it_runs():
    """A frozen head: a chunk of 2^27 logits, its copy and the chunk after it, in float32."""
    head = counts(vocab=2**17, width=64, head=2**17 * 64, adapters=1)
    work = Work(0, 4096, 0.0)
    on = {
        device: logprob_bytes(head, work, device=device, product=2, stored=2)
        for device in ("cpu", "cuda")
    }
    assert on["cuda"] - on["cpu"] == 3 * 4 * (2**27 - 2**24)


def test_no_policy_head_needs_no_log_prob_bytes():
    assert logprob_bytes(counts(vocab=10), Work(5, 5, 0.0), device="cpu", product=4, stored=4) == 0


def test_states_are_sixteen_bytes_a_trained_weight_and_two_a_frozen_one():
    """float32 weights, gradients and two moments; bfloat16 for what is frozen."""
    found = copies_bytes(counts(trainable=100, frozen=1000, frozen_bytes=2000))
    assert found == (2400, 400, 800, 0)


def test_shards_divide_the_states_and_hold_two_layers_and_the_outside():
    """8 ranks: states / 8. Exchange in bfloat16: 2 (2 x 10 + 30) gathered, 6 x 10 + 2 x 30 of gradients;
    several micro-batches keep all gradients whole in float32."""
    whole = counts(trainable=800, layer=10, layer_trainable=10, outside=30, outside_trainable=30)
    once = shards_bytes(whole, 8, gathered=2, accumulates=False)
    assert once == (400, 400, 800, 2 * 50 + 6 * 10 + 2 * 30)
    again = shards_bytes(whole, 8, gathered=2, accumulates=True)
    assert again[3] - once[3] == 4 * 800
