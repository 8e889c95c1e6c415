"""Processes forked from a server that has imported torch and hafrm: they start at once."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from support import parallel_worker

_forks = multiprocessing.get_context("forkserver")


def start(log: Path, target: Callable[..., None], *arguments: str, **variables: str) -> BaseProcess:
    """Run `target`, of a module in support, with these environment variables; it prints to `log`."""
    if forkserver._forkserver._forkserver_pid is None:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the server's own
        forkserver.set_forkserver_preload(["support.parallel_worker", "hafrm.cli.training_verbs"])
        forkserver.ensure_running()
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    variables = {"HAFRM_CACHE": os.environ["HAFRM_CACHE"], **variables}
    process = _forks.Process(target=_run, args=(log, target, arguments, variables))
    process.start()
    return process


def _run(log: Path, target: Callable[..., None], arguments: tuple, variables: dict) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    target(*arguments)


def on_ranks(check: str, logs: Path, *arguments: str, size: int = 2) -> None:
    """Run a function of parallel_worker in several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    target, files = (
        getattr(parallel_worker, check),
        [logs / f"{check}-{r}.log" for r in range(size)],
    )
    ranks = [
        start(file, target, *arguments, RANK=str(r), LOCAL_RANK=str(r), **shared)
        for r, file in enumerate(files)
    ]
    for rank in ranks:
        rank.join(timeout=120)
        rank.kill()
    printed = "\n".join(file.read_text()[-3000:] for file in files)
    assert [rank.exitcode for rank in ranks] == [0] * size, printed


def train_slowly(*arguments: str) -> None:
    """`hafrm train ARGUMENTS`, with steps that leave time to send a signal."""
    from hafrm.cli import main
    from hafrm.training import loop

    take_step = loop.take_step
    loop.take_step = lambda *args, **options: time.sleep(0.05) or take_step(*args, **options)
    sys.argv = ["hafrm", "train", *arguments]
    main()
