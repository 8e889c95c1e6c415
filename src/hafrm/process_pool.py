"""`ProcessPool`: tasks on several processes of one machine, such as the runs of a comparison.

If there are several GPUs, each process has its own; on a CPU the processes share its cores.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from typing import Any, Generic, TypeVar

import torch

from hafrm.errors import CheckpointError

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_num_processes() -> int:
    """One for each GPU; one if there is none."""
    return max(1, torch.cuda.device_count())


class ProcessPool(Generic[Task, Result]):
    """Processes that run tasks; leaving the `with` block ends them, whatever they are doing.

    `make_worker` runs once in each process and returns the function that runs a task; all must be
    picklable. With `num_processes` 1 everything runs in this process.
    """

    def __init__(
        self, make_worker: Callable[[], Callable[[Task], Result]], num_processes: int
    ) -> None:
        self._make_worker = make_worker
        self._here: Callable[[Task], Result] | None = None  # the function of this process
        self._executor: ProcessPoolExecutor | None = None
        if num_processes <= 1:
            return
        # spawn: a forked child inherits locks that threads of torch or tokenizers hold
        context = multiprocessing.get_context("spawn")
        ranks: Queue[int] = context.Queue()
        for rank in range(num_processes):
            ranks.put(rank)
        # workers hold the other end: they end when this one closes, even if this process is killed
        lifeline, self._lifeline = context.Pipe(duplex=False)
        threads = max(1, torch.get_num_threads() // num_processes)
        arguments = (make_worker, ranks, threads, lifeline)
        self._executor = ProcessPoolExecutor(num_processes, context, _start_worker, arguments)

    def __enter__(self) -> "ProcessPool[Task, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._lifeline.close()
            self._executor.shutdown(cancel_futures=True)

    def run(
        self, tasks: Sequence[Task], on_done: Callable[[int, Task, Result], None]
    ) -> dict[Task, Result]:
        """The results, in the order of the tasks; `on_done(number so far, task, result)` is called in this
        process as each one ends.

        Raises the first error of a task, and CheckpointError for a process that was killed.
        """
        results: dict[Task, Result] = {}

        def note(task: Task, result: Result) -> None:
            results[task] = result
            on_done(len(results), task, result)

        if self._executor is None:
            self._here = self._here or self._make_worker()
            for task in tasks:
                note(task, self._here(task))
            return results
        futures = {self._executor.submit(_run_task, task): task for task in tasks}
        for future in as_completed(futures):
            try:
                note(futures[future], future.result())
            except BrokenProcessPool:
                raise CheckpointError(
                    "a worker process died (memory may have run out): run the same command again to "
                    "resume, with fewer --processes if memory is short"
                ) from None
        return {task: results[task] for task in tasks}


# of a worker process: what makes its function, then that function
_worker: list[Callable[..., Any]] = []


def _start_worker(
    make_worker: Callable[[], Callable[[Any], Any]],
    ranks: "Queue[int]",
    threads: int,
    lifeline: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends its workers
    torch.set_num_threads(threads)
    logging.getLogger("hafrm").setLevel(logging.WARNING)
    _take_gpu(ranks.get())
    threading.Thread(target=_die_with_pool, args=(lifeline,), daemon=True).start()
    _worker.append(make_worker)


def _run_task(task: Any) -> Any:
    # made at the first task, not in the initializer: an error there would only break the pool
    if len(_worker) == 1:
        _worker.append(_worker[0]())
    return _worker[1](task)


def _take_gpu(rank: int) -> None:
    # every library that a task uses sees only this GPU
    num = torch.cuda.device_count()
    if num > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank % num]


def _die_with_pool(lifeline: Connection) -> None:
    # when the pool ends or its parent is killed, so that its work can run again
    with contextlib.suppress(EOFError):
        lifeline.recv()
    os.kill(os.getpid(), signal.SIGKILL)
