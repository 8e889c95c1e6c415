"""Compiled layers give the same numbers, and rows of other lengths compile nothing anew."""

import pytest
import torch

from hafrm.engine.layout import lay_out
from models_for_tests import SHAPES, tiny_hybrid, token_groups

OTHERS = (((9, (5, 7)),) * 3, ((2, (30, 4, 4)), (17, (3,))), ((40, (8, 9)), (5, (5, 5))))


def run(model, shapes):
    model.zero_grad()
    outputs = model(lay_out(token_groups(shapes)))
    (outputs.rewards.sum() + 0.1 * outputs.logps.sum()).backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiled_layers_equal_plain_ones_and_are_compiled_once_for_all_lengths(family):
    """Float32; fused sums run in another order: 1e-4 of gradients of order 1."""
    torch._dynamo.reset()
    plain, compiled = tiny_hybrid(family), tiny_hybrid(family)
    compiled.compile_layers()
    run(compiled, SHAPES)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shapes in (SHAPES, *OTHERS):
            expected, grads = run(plain, shapes)
            found, compiled_grads = run(compiled, shapes)
            torch.testing.assert_close(found.rewards, expected.rewards, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.logps, expected.logps, atol=1e-4, rtol=1e-5)
            for (name, grad), other in zip(
                sorted(grads.items()), sorted(compiled_grads), strict=True
            ):
                assert other.replace("_orig_mod.", "") == name
                torch.testing.assert_close(compiled_grads[other], grad, atol=1e-4, rtol=1e-4)
