"""benchmarks/step_flops.py: the arithmetic of a step's FLOPs against what torch's counter counts."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel
from hafrm.training.methods import get_method
from hafrm.training.setup import meta_model
from support.counted_flops import COUNTED
from support.models import tiny_hybrid, token_groups
from support.recipe_models import real_model, recipe_of, tiny_mixtral_config
from support.scripts import load_script

script = load_script("benchmarks/step_flops")
count, reference_flops = script.count, script.reference_flops
step_flops, work_of = script.step_flops, script.work_of

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
    model = real_model("llama", recipe_of(lora={"rank": 4}))
    predicted = step_flops(count(model), work_of(SHAPE)).total
    assert 1.0 <= predicted / counted_flops(model) < 1.1


def test_predicted_flops_of_a_reference_pass_are_those_of_a_forward():
    model = tiny_hybrid("llama")
    predicted = reference_flops(count(model), work_of(SHAPE)).total
    assert predicted == pytest.approx(counted_flops(model, train=False), rel=0.005)


def test_a_token_meets_its_part_of_stacked_experts():
    """Mixtral, 8 experts of which a token visits 2: two layers of attention 32 x (32 + 16 + 16 + 32), a
    router 8 x 32, and 2 x 3 x 32 x 48 of experts."""
    counts = count(meta_model(tiny_mixtral_config(), recipe_of(), get_method("haf")))
    assert counts.matrices == 2 * (32 * 96 + 8 * 32 + 2 * 3 * 32 * 48)
