"""Several processes, one step: DDP and FSDP2 on torch's own engine, and one process as a special case.

Any launcher starts them: only RANK, WORLD_SIZE and LOCAL_RANK are read.
"""

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hafrm.engine.layout import Branches, Team
from hafrm.engine.model import HybridModel, decoder_layers, num_kv_heads
from hafrm.errors import ConfigError, HafrmError
from hafrm.progress import OnProgress, no_progress, show_progress
from hafrm.scoring.forward import Scores, check_finite, free_memory, run_forward

Mode = Literal["auto", "ddp", "fsdp", "hsdp", "ulysses"]
T = TypeVar("T")

DEVICES_TIMEOUT = timedelta(minutes=30)  # for an exchange within a step
HOSTS_TIMEOUT = timedelta(hours=12)  # for what one rank does while the others wait
# A gloo group for messages between hosts: a launcher may have created the default group with nccl only.
_hosts: dist.ProcessGroup | None = None
_rank = 0  # here, because the main rank stays the main one after the group has ended
_has_ended = False


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run."""

    rank: int
    size: int
    device: torch.device


def start() -> Ranks:
    """Join the process group that the launcher announced, if any; after `stop`, ConfigError, because torch
    cannot set up a launcher's group twice."""
    global _hosts, _rank  # noqa: PLW0603 - torch keeps a process's one group globally too
    size = int(os.environ.get("WORLD_SIZE", "1"))
    # a RANK alone, left by some launcher, must not keep a single process from writing its files
    _rank = rank = int(os.environ.get("RANK", "0")) if size > 1 else 0
    device = torch.device("cpu")
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        # Lengths differ in every step, which fragments memory. Read at the first allocation on a GPU.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if size > 1 and _has_ended:
        raise ConfigError("several processes train one run only: launch them again for the next")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=DEVICES_TIMEOUT)
    if size > 1 and _hosts is None:
        _hosts = dist.new_group(backend="gloo", timeout=HOSTS_TIMEOUT)
    return Ranks(rank, size, device)


def stop() -> None:
    """End the process group, if there is one; on nccl the first rank to call waits for the last."""
    global _hosts, _has_ended  # noqa: PLW0603
    _hosts = None
    if dist.is_initialized():
        _has_ended = True
        dist.destroy_process_group()


def num_ranks() -> int:
    """Processes that share a step."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return _rank == 0


def per_node(default: int) -> int:
    """How many ranks share this node, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))


def shards(mode: Mode, num_ranks: int, device: str) -> bool:
    """Whether the ranks divide the model: `auto` is FSDP2 on several GPUs, DDP on several CPUs."""
    asked = mode in ("fsdp", "hsdp", "ulysses")
    return num_ranks > 1 and (asked or (mode == "auto" and device == "cuda"))


def team_size(mode: Mode, num_ranks: int, kv_heads: int) -> int:
    """How many ranks run a sequence together: for ulysses the greatest common divisor of the ranks per node
    and the KV heads, else 1."""
    return math.gcd(min(num_ranks, per_node(8)), kv_heads) if mode == "ulysses" else 1


def wrap(model: HybridModel, ranks: Ranks) -> nn.Module:
    """The model as every rank must call it: unchanged for one rank or after `shard`, else in DDP."""
    if ranks.size == 1 or isinstance(model, FSDPModule):
        return model
    # Towers for images or sound get no gradient from text, which DDP must be told to expect.
    config = model.backbone.config
    has_towers = config.get_text_config() is not config
    return DistributedDataParallel(
        model, gradient_as_bucket_view=True, find_unused_parameters=has_towers
    )


def shard(
    model: HybridModel,
    ranks: Ranks,
    mode: Mode = "fsdp",
    precision: torch.dtype | None = None,
    *,
    offload: bool = False,
) -> None:
    """Shard the model with FSDP2, in place; parameters may be on the meta device.

    `hsdp` shards it among the ranks of a node only, and each node has all of it; `ulysses` also splits each
    sequence among ranks of a node. With `offload` the shards stay on the host.
    """
    options: dict[str, Any] = {"offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}
    near = per_node(ranks.size)
    if mode == "hsdp" and ranks.size > near:
        shape, names = (ranks.size // near, near), ("replicate", "shard")
        options["mesh"] = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    heads = num_kv_heads(model.backbone.config)
    if (size := team_size(mode, ranks.size, heads)) > 1:
        model.team = Team(dist.new_subgroups(size)[0], ranks.rank % size, size)
    elif mode == "ulysses":
        raise ConfigError(
            f"training.parallel is ulysses, but the model's {heads} heads of keys cannot be divided among "
            f"{min(near, ranks.size)} ranks of a node: launch another number of them, or set it to fsdp"
        )
    # Inputs stay as they are: a cast copies the layout for every layer, without its cached masks.
    policy = MixedPrecisionPolicy(
        param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in decoder_layers(model.backbone):
        fully_shard(layer, mp_policy=policy, **options)
    if model.reward_head is not None:  # a separate unit, which stays in float32
        fully_shard(model.reward_head, **options)
    # By default FSDP2 leaves the root gathered after a forward, and an export would use the copies.
    fully_shard(model, mp_policy=policy, reshard_after_forward=True, **options)


def unwrap(model: nn.Module) -> Any:
    """The module that DDP wraps, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def reshard(model: nn.Module) -> None:
    """Drop what FSDP2 has gathered, so that parameters are their float32 shards again."""
    # A forward without a backward leaves copies of the root's parameters, which no write reaches.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def release(model: HybridModel) -> None:
    """Free the memory of the weights even if the model is still referenced; it is empty afterwards."""
    for parameter in model.parameters():
        parameter.grad = None
        if isinstance(parameter, DTensor):  # FSDP2 holds its own reference to the shards
            parameter.to_local().untyped_storage().resize_(0)
    for module in model.modules():
        module._parameters = dict.fromkeys(module._parameters)
    free_memory()


@contextlib.contextmanager
def synchronise(model: nn.Module, *, last: bool, scatter: bool = False) -> Iterator[None]:
    """Exchange gradients only in the last micro-batch of a step; shards with `scatter` in every one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or scatter)
    ddp = model if isinstance(model, DistributedDataParallel) else None
    with contextlib.nullcontext() if last or ddp is None else ddp.no_sync():
        yield


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradients to a 2-norm of `max_norm` (0: no clipping); returns the norm before clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(grads, foreach=True))
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def add_up(values: Tensor) -> Tensor:
    """Sum over ranks, in place; for a tensor on the CPU, without waiting for any device."""
    if num_ranks() > 1:
        dist.all_reduce(values, group=_group_of(values))
    return values


def smallest(value: int) -> int:
    """The smallest of all ranks' values, so that all continue with the same."""
    least = torch.tensor(value)
    if num_ranks() > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN, group=_hosts)
    return int(least)


def wait() -> None:
    """Wait for all ranks."""
    if num_ranks() > 1:
        dist.barrier(group=_hosts)


def from_main(compute: Callable[[], T]) -> T:
    """On every rank, what `compute` returns (or raises) on the main rank. For everything that depends on
    files, since caches differ and shared folders lag."""
    if num_ranks() == 1:
        return compute()
    answer: list[Any] = [_answer_of(compute) if is_main() else None]
    dist.broadcast_object_list(answer, group=_hosts)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return cast("T", answer[0])


def on_all(compute: Callable[[], None]) -> None:
    """Run `compute` on every rank and wait for all; what it raises on one, all raise."""
    for answer in from_all(_answer_of(compute)):
        if isinstance(answer, Exception):
            raise answer


def _answer_of(compute: Callable[[], T]) -> T | Exception:
    """What `compute` returns, or the error that it raises."""
    try:
        return compute()
    except (HafrmError, OSError) as error:
        return error


def from_all(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    values: list[Any] = [value]
    if num_ranks() > 1:
        values *= num_ranks()
        dist.all_gather_object(values, value, group=_hosts)
    return values


def progress_of_main(what: str, *, done: int = 0) -> AbstractContextManager[OnProgress]:
    """`show_progress` on the main rank, nothing on the others."""
    return show_progress(what, done=done) if is_main() else contextlib.nullcontext(no_progress)


def score_on_all_ranks(model: HybridModel, groups: Sequence[Branches], **options: Any) -> Scores:
    """`run_forward` divided among the ranks: every rank calls this and gets all scores, bit for bit as in
    one process."""
    rank, team = dist.get_rank() if num_ranks() > 1 else 0, model.team
    place = rank // team.size, num_ranks() // team.size
    scores = run_forward(model, groups, part=place, **options)
    for values in (scores.rewards, scores.logps):
        if values is not None:
            values *= team.rank == 0  # noqa: PLW2901 - the others of a team have the same
            add_up(torch.from_numpy(values))
    check_finite(scores)  # here, so that either all ranks stop or none
    return scores


def whole(tensor: Tensor) -> Tensor:
    """The full tensor that a shard is part of, gathered on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_first_copy(shard: DTensor) -> bool:
    """Whether this rank is in the first of the groups that each hold all shards."""
    place = shard.device_mesh.get_coordinate()
    return shard.device_mesh.ndim == 1 or (place is not None and place[0] == 0)


def hand_out(value: Tensor | None, target: Tensor) -> Tensor:
    """The main rank's `value` on every rank: on the device, in the dtype and in the shards of `target`."""
    if num_ranks() == 1:
        assert value is not None
        return value.to(target.device, target.dtype)
    whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    if value is not None:
        whole.copy_(value)
    if isinstance(target, DTensor):
        return distribute_tensor(whole, target.device_mesh, target.placements)
    dist.broadcast(whole, 0, group=_group_of(whole))
    return whole


def _group_of(tensor: Tensor) -> dist.ProcessGroup | None:
    return _hosts if tensor.device.type == "cpu" else None


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that a run ends its step and saves; a second one kills."""

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Ray Train runs us in a thread, where Python delivers no signals
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[number])
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return  # a launcher passes the signal to all ranks: one line for each node
        said = (
            "will stop and save after this step, and its validation if one is due; again: stops now"
        )
        # not by a logger or print, which the signal may have interrupted; a pipe's reader may be gone
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.received}: {said}\n".encode())

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank got the signal, so that all stop after the same step; waits for no device."""
        received = bool(self.received)
        return received if ranks.size == 1 else smallest(-received) < 0
