"""benchmarks/step_flops.py: the arithmetic of a step's FLOPs against what torch's counter counts."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel
from support.counted_flops import COUNTED
from support.models import token_groups
from support.recipe_models import real_model, recipe_of
from support.scripts import load_script

script = load_script("benchmarks/step_flops")
SHAPE = ((67, (31, 22)), (41, (13, 29)), (52, (18, 18, 9)))
"""300 tokens, 140 of them scored."""


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


@pytest.mark.parametrize(
    ("family", "kind", "low", "high"),
    [
        # left out are the reward head and what is no product
        *((family, "plain", 0.995, 1.005) for family in ("llama", "gpt2", "gemma3")),
        # a layer's last product of eight is not repeated: 2 / 8 of a fifth = 5 %
        ("llama", "checkpointed", 1.0, 1.06),
        # nothing needs the gradient of the first layer's input: of two layers, a tenth
        ("llama", "lora", 1.0, 1.1),
        ("llama", "reference", 0.995, 1.005),
    ],
)
def test_predicted_flops_are_those_of_a_real_step(family, kind, low, high):
    model = real_model(family, recipe_of(**({"lora": {"rank": 4}} if kind == "lora" else {})))
    if kind == "checkpointed":
        model.checkpoint_activations()
    counts, work = script.count(model), script.work_of(SHAPE)
    if kind == "reference":
        predicted = script.reference_flops(counts, work)
    else:
        predicted = script.step_flops(counts, work, checkpointing=kind == "checkpointed")
    assert low <= predicted.total / counted_flops(model, train=kind != "reference") <= high
