"""Tasks on several processes of one machine, one at a time each: the cells of a comparison, say.

A process has a GPU of its own where there are several; on a CPU the processes share its cores: two
small models with one core each train faster than one with two.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Generic, TypeVar

import torch

from hafrm.errors import CheckpointError, HafrmError

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_processes() -> int:
    """One for each GPU; one where there is none."""
    return max(1, torch.cuda.device_count())


class Crew(Generic[Task, Result]):
    """Processes that do tasks; a `with` block ends them, and with them whatever they were at.

    `enlist` makes, in each process, what does its tasks; it, tasks and results are pickled. With `num` 1
    all is done in this process.
    """

    def __init__(self, enlist: Callable[[], Callable[[Task], Result]], num: int) -> None:
        self._enlist, self._num = enlist, num
        self._here: Callable[[Task], Result] | None = None
        self._crew: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> "Crew[Task, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._crew.items():
            process.terminate()
            process.join()
            connection.close()

    def run(self, tasks: Sequence[Task], done: Callable[[Task, Result], None]) -> None:
        """Do all tasks; `done` hears of each. The first error ends the others.

        Raises what a task raises, and CheckpointError for a process that was killed.
        """
        if self._num <= 1:
            self._here = self._here or self._enlist()
            for task in tasks:
                done(task, self._here(task))
            return
        self._start(min(self._num, len(tasks)))
        left = list(reversed(tasks))
        busy = {}
        for connection in self._crew:
            if left:
                busy[connection] = left.pop()
                connection.send(busy[connection])
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                done(busy.pop(ready), self._receive(ready))
                if left:
                    busy[ready] = left.pop()
                    ready.send(busy[ready])

    def _start(self, num: int) -> None:
        """Have `num` processes at least; those that there is no task for are never started."""
        # spawn: a forked child inherits locks that threads of torch or tokenizers hold
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // self._num)
        for rank in range(len(self._crew), num):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(self._enlist, rank, threads, theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that the child's end is the only one, and its death is heard
            self._crew[ours] = process

    def _receive(self, connection: Connection) -> Result:
        try:
            result, error = connection.recv()
        except EOFError:
            process = self._crew[connection]
            process.join()
            raise CheckpointError(
                f"process {process.pid} died (exit code {process.exitcode}; memory may have run out): "
                "the same command goes on where it was"
            ) from None
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


def _work(
    enlist: Callable[[], Callable[[Task], Result]], rank: int, threads: int, connection: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its children
    torch.set_num_threads(threads)
    logging.getLogger("hafrm").setLevel(logging.WARNING)
    _take_gpu(rank)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    act: Callable[[Task], Result] | None = None
    try:
        while True:
            task = connection.recv()
            act = act or enlist()
            connection.send((act(task), None))
    except HafrmError as error:
        connection.send((None, error))
    except (EOFError, BrokenPipeError):  # the parent is gone: nobody waits for this
        sys.exit(1)


def _take_gpu(rank: int) -> None:
    """See one of several GPUs alone, which every library that a task uses then takes."""
    num = torch.cuda.device_count()
    if num > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num)))
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[rank % num]


def _die_with_parent() -> None:
    """End at once when the parent was killed: what is left unfinished must be free to be run again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
