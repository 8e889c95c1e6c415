"""One thread that runs a model, and the requests that wait for it: token budgets, fair turns, a bound.

Every batch takes a part of each waiting request in turn, so that a large one does not hold up small ones.
What fails in company is run again apart, so that one request's fault is not another's.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hafrm.errors import ServerError
from hafrm.preferences import TokenizedGroup
from hafrm.scoring.outputs import OutputScores
from hafrm.serving.protocols import OtherProtocolError, RequestError

ScoreGroups = Callable[[Sequence[TokenizedGroup], Sequence[str]], list[OutputScores]]
_SLICES = 8  # of a batch: as much as a request gets at a time while others wait


@dataclass(eq=False)
class _Job:
    groups: Sequence[TokenizedGroup]
    names: tuple[str, ...]
    future: "asyncio.Future[list[OutputScores]]"
    loop: asyncio.AbstractEventLoop
    next: int = 0  # groups before it have been taken
    results: dict[int, OutputScores] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:  # taken whole, failed, or its client is gone
        return self.future.done() or self.next == len(self.groups)

    def settle(self, error: Exception | None) -> None:
        def set_result() -> None:
            if self.future.done():
                return
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result([self.results[i] for i in range(len(self.groups))])

        self.loop.call_soon_threadsafe(set_result)


class ScoreQueue:
    """Requests in, outputs out; `score` runs in the queue's own thread only."""

    def __init__(self, score: ScoreGroups, *, batch_tokens: int, max_waiting: int) -> None:
        self.score, self.batch_tokens, self.max_waiting = score, batch_tokens, max_waiting
        self.waiting = 0  # tokens
        self.speed = 1000.0  # tokens a second, a running mean
        self._jobs: list[_Job] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    async def submit(
        self, groups: Sequence[TokenizedGroup], names: tuple[str, ...]
    ) -> list[OutputScores]:
        """The outputs of each group, once the model has run them; cancelled, they are not run.

        Raises RequestError for a full queue or a failed item, and ServerError from a server behind `score`.
        """
        size = sum(group.num_tokens for group in groups)
        loop = asyncio.get_running_loop()
        job = _Job(groups, names, loop.create_future(), loop)
        with self._changed:
            if self.waiting and self.waiting + size > self.max_waiting:
                what = f"{self.waiting:,} tokens wait to be scored"
                raise RequestError(429, what, retry_after=1 + int(self.waiting / self.speed))
            self.waiting += size
            self._jobs.append(job)
            self._changed.notify()
        try:
            return await job.future if groups else []
        finally:
            with self._changed:
                self.waiting -= size

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (batch := self._take()):
                    if self._is_closing:
                        return
                    self._changed.wait()
            start = time.monotonic()
            self._score(batch)
            tokens = sum(job.groups[i].num_tokens for job, i in batch)
            self.speed += 0.2 * (tokens / max(1e-6, time.monotonic() - start) - self.speed)

    def _take(self) -> list[tuple[_Job, int]]:
        """Groups for one batch, all with the same outputs; requests that were left out are next."""
        batch: list[tuple[_Job, int]] = []
        room = self.batch_tokens
        waiting = [job for job in self._jobs if not job.is_over]
        turn = [job for job in waiting if job.names == waiting[0].names]
        while turn and room > 0:
            for job in turn:
                share = min(room, self.batch_tokens // _SLICES)
                while share > 0 and not job.is_over:
                    tokens = job.groups[job.next].num_tokens
                    share, room = share - tokens, room - tokens
                    batch.append((job, job.next))
                    job.next += 1
            turn = [job for job in turn if not job.is_over]
        begun = {id(job) for job, _ in batch}
        self._jobs = sorted(
            (job for job in waiting if not job.is_over), key=lambda job: id(job) in begun
        )
        return batch

    def _score(self, batch: list[tuple[_Job, int]]) -> None:
        batch = [(job, i) for job, i in batch if not job.future.done()]
        if not batch:
            return
        try:
            results = self.score([job.groups[i] for job, i in batch], batch[0][0].names)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to a request
            if isinstance(error, ServerError) and not isinstance(error, OtherProtocolError):
                for job, _ in batch:  # the server behind is down: for all of them
                    job.settle(error)
            elif len(batch) == 1:
                job, i = batch[0]
                job.settle(RequestError(500, str(error), i))
            else:
                middle = len(batch) // 2
                self._score(batch[:middle])
                self._score(batch[middle:])
        else:
            for (job, i), result in zip(batch, results, strict=True):
                job.results[i] = result
                if len(job.results) == len(job.groups):
                    job.settle(None)
