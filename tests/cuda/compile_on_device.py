"""Compiled layers against plain ones on a device, in a process without the shape checks that dynamo cannot
trace: python compile_on_device.py DEVICE FAMILY PRECISION CHECKPOINTING."""

import sys

import torch

from hafrm.engine.layout import lay_out
from support.models import SHAPES, tiny_hybrid, token_groups

LONGER = (*SHAPES, (40, (8, 90)), (150, (5, 5)))


def run(model, shapes, device, dtype):
    """Log-probs, and the gradient of the sum of everything."""
    model.zero_grad()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        outputs = model(lay_out(token_groups(shapes)).to(device))
    (outputs.rewards.sum() + 0.1 * outputs.logps.sum()).backward()
    return outputs.logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def main(place: str, family: str, precision: str, checkpointing: str) -> None:
    """Norms of differences relative to those of the plain results; one compilation for both lengths."""
    device = torch.device(place)
    dtype, tolerance = (torch.bfloat16, 5e-2) if precision == "bf16" else (None, 1e-4)
    plain, compiled = (tiny_hybrid(family).to(device) for _ in range(2))
    if checkpointing == "checkpointed":
        compiled.checkpoint_activations()
    compiled.compile_layers()
    for shapes in (SHAPES, LONGER):
        expected = run(plain, shapes, device, dtype)
        with torch._dynamo.config.patch(error_on_recompile=shapes is LONGER):
            ours = run(compiled, shapes, device, dtype)
        for value, reference in zip(ours, expected, strict=True):
            assert (value - reference).norm() < tolerance * reference.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "nothing was compiled"


if __name__ == "__main__":
    main(*sys.argv[1:])
