"""The cells of a study on the processes of one machine, each of which runs one cell at a time.

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

import torch

from hafrm.errors import CheckpointError, HafrmError
from hafrm.evaluation.study.cell import CellResult, CellRunner, Setting
from hafrm.evaluation.study.plan import Cell

Done = Callable[[Cell, CellResult], None]


class Crew:
    """Processes that run cells; a `with` block ends them, and with them whatever they were at."""

    def __init__(self, setting: Setting, num: int) -> None:
        self._setting, self._num = setting, num
        self._here: CellRunner | None = None
        self._crew: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._crew.items():
            process.terminate()
            process.join()
            connection.close()

    def run(self, cells: Sequence[Cell], done: Done) -> None:
        """Run all cells; `done` hears of each. The first error ends the others.

        Raises what `CellRunner.run` raises, and CheckpointError for a process that was killed.
        """
        if self._num <= 1:
            self._here = self._here or CellRunner(self._setting)
            for cell in cells:
                done(cell, self._here.run(cell))
            return
        if not self._crew:
            self._start()
        left = list(reversed(cells))
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

    def _start(self) -> None:
        # spawn: a forked child inherits locks that threads of torch or tokenizers hold
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // self._num)
        for rank in range(self._num):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(self._setting, rank, threads, theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that the child's end is the only one, and its death is heard
            self._crew[ours] = process

    def _receive(self, connection: Connection) -> CellResult:
        try:
            message = connection.recv()
        except EOFError:
            process = self._crew[connection]
            process.join()
            raise CheckpointError(
                f"process {process.pid} of the comparison died (exit code {process.exitcode}; memory "
                "may have run out): the same command goes on where it was"
            ) from None
        if isinstance(message, HafrmError):
            raise message
        assert isinstance(message, CellResult)
        return message


def _work(setting: Setting, rank: int, threads: int, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its children
    torch.set_num_threads(threads)
    logging.getLogger("hafrm").setLevel(logging.WARNING)
    os.environ["LOCAL_RANK"] = str(rank % max(1, torch.cuda.device_count()))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    runner: CellRunner | None = None
    try:
        while True:
            cell = connection.recv()
            runner = runner or CellRunner(setting)
            connection.send(runner.run(cell))
    except HafrmError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError):  # the parent is gone: nobody waits for this
        sys.exit(1)


def _die_with_parent() -> None:
    """End at once when the parent was killed: what is left unfinished must be free to be run again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
