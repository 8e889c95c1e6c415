"""Several processes, one step: DDP and FSDP2 on torch's own engine, and one process as a special case.

Started by torchrun, accelerate launch, Slurm or Ray Train alike: only RANK, WORLD_SIZE and LOCAL_RANK
are read. Everything that differs between one process and many is in this file.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hafrm.engine.model import HybridModel, decoder_layers

Mode = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> Ranks:
    """Join the process group that the launcher announced, or stand alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # gloo beside nccl: what hosts tell each other must not wait for the devices.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, size, device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def num_ranks() -> int:
    """Processes that share a step."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wrap(model: HybridModel, mode: Mode, precision: torch.dtype | None) -> nn.Module:
    """The model as every rank must call it. `auto` is FSDP2 on several GPUs, DDP on several CPUs.

    FSDP2 shards layer by layer; the reward head is a unit of its own and stays in float32.
    """
    if num_ranks() == 1:
        return model
    if mode == "ddp" or (mode == "auto" and model.device.type == "cpu"):
        return DistributedDataParallel(model)
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for layer in decoder_layers(model.backbone):
        fully_shard(layer, mp_policy=policy)
    if model.reward_head is not None:
        fully_shard(model.reward_head)
    fully_shard(model, mp_policy=policy)
    return model


def inside(model: nn.Module) -> nn.Module:
    """The module that DDP wraps, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def unwrap(model: nn.Module) -> HybridModel:
    """The HybridModel inside."""
    inner = inside(model)
    assert isinstance(inner, HybridModel)
    return inner


@contextlib.contextmanager
def synchronise(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Exchange gradients in the last micro-batch of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to at most `max_norm` (0: leave them) and return their 2-norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(grads, foreach=True)
    norm = whole(norm)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def all_finite(flags: Tensor) -> Tensor:
    """Whether all flags hold on all ranks, so that all stop together."""
    held = flags.all().float()
    if num_ranks() > 1:
        dist.all_reduce(held, dist.ReduceOp.MIN)
    return held > 0


def add_up(values: Tensor) -> Tensor:
    """Sum over ranks."""
    if num_ranks() > 1:
        dist.all_reduce(values)
    return values


def smallest(value: int, device: torch.device) -> int:
    """The smallest of all ranks' values, so that all go on with the same."""
    found = torch.tensor(value, device=device)
    if num_ranks() > 1:
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def wait() -> None:
    """Let all ranks arrive."""
    if num_ranks() > 1:
        dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, gathered on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value` on the device, and in the shards, of `target`."""
    if isinstance(target, DTensor):
        value = value.to(target.device)
        return distribute_tensor(value, target.device_mesh, target.placements)
    return value.to(target.device)
