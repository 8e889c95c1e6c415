"""Several processes of one bulk job on one machine: shards dealt out, progress and errors collected.

Each loads the model for itself, on a GPU of its own where there are several; on a CPU they share the
cores. The first error ends all of them, and what they had finished stays.
"""

import multiprocessing
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from hafrm.errors import CheckpointError, HafrmError
from hafrm.scoring.inputs import Shard
from hafrm.scoring.worker import Tell, Work, score_shards


def score_in_processes(work: Work, shards: Sequence[Shard], num: int, tell: Tell) -> None:
    """Score the shards with `num` processes, or in this one for `num` 1.

    Raises what `score_shards` raises, and CheckpointError for a process that was killed.
    """
    num = min(num, len(shards))
    if num <= 1:
        score_shards(work, shards, work.device or _device(0), tell)
        return
    # spawn: a forked child inherits locks that threads of torch or tokenizers hold
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // num)
    children: dict[Connection, SpawnProcess] = {}
    try:
        for rank in range(num):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(
                target=_child, args=(work, shards[rank::num], rank, threads, sender), daemon=True
            )
            child.start()
            sender.close()  # so that the child's end is the only one, and its death is heard
            children[receiver] = child
        _collect(children, tell)
    finally:
        for child in children.values():
            child.terminate()
            child.join()


def _collect(children: dict[Connection, SpawnProcess], tell: Tell) -> None:
    running = dict(children)
    while running:
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            try:
                message = ready.recv()
            except EOFError:
                child = running.pop(ready)
                child.join()
                if child.exitcode:
                    raise CheckpointError(
                        f"process {child.pid} of the job died (exit code {child.exitcode}; memory may "
                        "have run out): the same command goes on behind the last finished shards"
                    ) from None
                continue
            if isinstance(message, HafrmError):
                raise message
            tell(*message)


def _child(
    work: Work, shards: Sequence[Shard], rank: int, threads: int, sender: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its children
    torch.set_num_threads(threads)
    device = work.device or _device(rank)
    try:
        score_shards(work, shards, device, lambda rows, tokens: sender.send((rows, tokens)))
    except HafrmError as error:
        sender.send(error)
    except BrokenPipeError:  # the parent was killed: nobody waits for this
        sys.exit(1)


def _device(rank: int) -> str | None:
    """The GPU of a process; None lets the model choose."""
    num = torch.cuda.device_count()
    return f"cuda:{rank % num}" if num else None
