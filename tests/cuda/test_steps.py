"""Single steps on a GPU: what only saves memory or time there changes no gradient, and nothing waits."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel
from hafrm.errors import NumericsError
from hafrm.run_folder import RunFolder
from hafrm.training import parallel
from hafrm.training.checkpoint import save_checkpoint
from hafrm.training.methods import get_method
from hafrm.training.step import NonFiniteCheck, StepResult, build_optimizer, take_step
from hafrm.training.step_batches import MicroBatch
from support.models import tiny_hybrid, token_groups
from support.step_pairs import SHAPES, micro_batches, pairs

pytestmark = pytest.mark.cuda

PRECISIONS = pytest.mark.parametrize(
    ("precision", "tolerance"), [(None, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
METHOD = get_method("grm-sft")
"""It trains both heads, and needs no reference."""


def run(
    model: torch.nn.Module,
    batches: list[MicroBatch],
    precision: torch.dtype | None,
    optimizer: torch.optim.Optimizer,
    nonfinite: NonFiniteCheck | None = None,
) -> StepResult:
    """One optimiser step, unclipped."""
    return take_step(
        model,
        optimizer,
        batches,
        METHOD,
        num_comparisons=len(SHAPES),
        max_grad_norm=0.0,
        autocast=precision,
        nonfinite=nonfinite or NonFiniteCheck(batches[0].margins.device),
    )


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([parallel.whole(tensor.detach()).flatten().cpu() for tensor in tensors])


def gradient(
    model: torch.nn.Module, precision: torch.dtype | None, max_tokens: int = 100
) -> Tensor:
    """Of one step: AdamW's first moment is a tenth of it."""
    optimizer = adamw(model)
    run(model, micro_batches(pairs(), max_tokens), precision, optimizer)
    return 10 * flat(optimizer.state[p]["exp_avg"] for p in model.parameters())


@PRECISIONS
@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "gemma2", "gpt2"])
def test_a_checkpointed_step_equals_the_plain_one(family, precision, tolerance, device):
    """On a GPU backward recomputes the layers in a thread of its own."""
    plain, checkpointed = (tiny_hybrid(family).to(device) for _ in range(2))
    checkpointed.checkpoint_activations()
    expected = gradient(plain, precision)
    assert (gradient(checkpointed, precision) - expected).norm() < tolerance * expected.norm()


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_in_bfloat16_never_waits_for_the_device(device):
    """The first step may: it loads kernels. In float32, padded groups look for a row's real tokens."""
    model, guard = tiny_hybrid().to(device), NonFiniteCheck(device)
    optimizer = adamw(model)
    batches = micro_batches(pairs(), max_tokens=100)
    if device.type == "cuda":
        batches = [batch.moved(torch.Tensor.pin_memory) for batch in batches]
    run(model, batches, torch.bfloat16, optimizer, guard)
    with waiting_is_an_error(device):
        run(model, batches, torch.bfloat16, optimizer, guard)
    guard.check()


def test_a_loss_that_is_not_finite_reaches_no_weight_or_moment(device):
    model, guard = tiny_hybrid().to(device), NonFiniteCheck(device)
    optimizer = adamw(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    good, bad = (micro_batches(pairs(margin), 100) for margin in (0.0, float("nan")))
    run(model, good, None, optimizer, guard)
    before = flat(model.parameters())

    def two_bad_steps() -> None:
        for _ in range(2):
            run(model, bad, None, optimizer, guard)
        guard.check()  # on a CPU the first step has raised

    with pytest.raises(NumericsError, match="not finite"):
        two_bad_steps()
    assert torch.equal(flat(model.parameters()), before)


@contextlib.contextmanager
def one_rank(device: torch.device, folder: Path) -> Iterator[None]:
    """A process group of this process alone, as torchrun would start it."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(model: HybridModel, precision: Any) -> torch.nn.Module:
    """The model under FSDP2, which a run leaves out for a single process."""
    parallel.shard(model, parallel.Ranks(0, 1, model.device), precision=precision)
    return model


@PRECISIONS
def test_fsdp_on_one_rank_equals_no_fsdp(precision, tolerance, device, tmp_path):
    expected = gradient(tiny_hybrid().to(device), precision)
    with one_rank(device, tmp_path):
        model = sharded(tiny_hybrid().to(device), precision)
        difference = gradient(model, precision) - expected
    assert difference.norm() < tolerance * expected.norm()


def test_a_checkpoint_after_an_evaluation_under_fsdp_holds_all_weights_and_moments_in_float32(
    device, tmp_path
):
    """A forward without a backward leaves gathered bfloat16 copies in the shards' place."""
    folder = RunFolder.create(tmp_path / "run", "")
    layout = lay_out(token_groups(SHAPES)).to(device)
    with one_rank(device, tmp_path):
        model = sharded(tiny_hybrid().to(device), torch.bfloat16)
        optimizer = adamw(model)
        run(model, micro_batches(pairs(), 100), torch.bfloat16, optimizer)
        names = [name for name, _ in model.named_parameters()]
        with torch.no_grad():
            model(layout)
        saved = save_checkpoint(folder, 1, model, optimizer, {})
    stored = load_file(saved / "model-00000.safetensors")  # of the only rank
    moments = load_file(saved / "optimizer-00000.safetensors")
    assert stored.keys() == set(names)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert moments.keys() >= {
        f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names
    }


@pytest.mark.parametrize(
    ("family", "checkpointing"), [("llama", "checkpointed"), ("mistral", "kept")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_layers_equal_plain_ones(family, checkpointing, precision, device):
    """In a process without the shape checks, which dynamo cannot trace."""
    worker = Path(__file__).with_name("compile_on_device.py")
    path = os.pathsep.join([str(worker.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(worker), device.type, family, precision, checkpointing],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
