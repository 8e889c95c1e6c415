"""Compiled layers against plain ones, in a process without the shape checks that dynamo cannot trace."""

import sys
import threading

import torch

from hafrm.engine.layout import lay_out
from support.models import SHAPES, tiny_hybrid, token_groups

OTHERS = (((9, (5, 7)),) * 3, ((2, (30, 4, 4)), (17, (3,))), ((40, (8, 9)), (5, (5, 5))))
"""Rows of other lengths, one of them shorter and one longer than the first."""


def run(model, shapes):
    """Outputs, and the gradients of the sum of everything."""
    model.zero_grad()
    outputs = model(lay_out(token_groups(shapes)))
    thread = threading.Thread(target=(outputs.rewards.sum() + 0.1 * outputs.logps.sum()).backward)
    thread.start()  # as on CUDA
    thread.join()
    return outputs, [p.grad.clone() for p in model.parameters()]


def main(family: str, checkpointing: str) -> None:
    """Float32; fused sums run in another order: 1e-4 of gradients of order 1."""
    plain, compiled = tiny_hybrid(family), tiny_hybrid(family)
    if checkpointing == "checkpointed":
        compiled.checkpoint_activations()
    compiled.compile_layers()
    run(compiled, SHAPES)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shapes in (SHAPES, *OTHERS):
            expected, grads = run(plain, shapes)
            found, compiled_grads = run(compiled, shapes)
            torch.testing.assert_close(found.rewards, expected.rewards, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.logps, expected.logps, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(compiled_grads, grads, atol=1e-4, rtol=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 2, "nothing was compiled"


if __name__ == "__main__":
    main(*sys.argv[1:])
