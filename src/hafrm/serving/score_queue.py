"""Requests that wait for a model: token budgets, fair turns, an upper bound; the model has its own thread.

Every batch takes a part of each waiting request in turn, so that a large one does not hold up small ones.
A batch that fails is run again in parts, so that one request's fault does not affect others.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from hafrm.errors import ServerError
from hafrm.preferences import TokenizedGroup
from hafrm.scoring.outputs import OutputScores
from hafrm.serving.protocols import OtherProtocolError, RequestError

_SLICES = 8  # per batch: a request gets one slice at a time while others wait


class _Item(NamedTuple):
    group: TokenizedGroup
    names: tuple[str, ...]
    future: "asyncio.Future[OutputScores | Exception]"


class ScoreQueue:
    """Groups in, outputs out, in one event loop; `score` runs only in the model's thread."""

    def __init__(
        self,
        score: Callable[[Sequence[TokenizedGroup], Sequence[str]], list[OutputScores]],
        *,
        batch_tokens: int,
        max_waiting: int,
    ) -> None:
        self.score, self.batch_tokens, self.max_waiting = score, batch_tokens, max_waiting
        self.waiting = 0  # tokens
        self._requests: deque[deque[_Item]] = deque()
        self._model = ThreadPoolExecutor(1, "model")
        self._changed = asyncio.Event()
        self._worker = asyncio.create_task(self._run())

    async def submit(
        self, groups: Sequence[TokenizedGroup], names: tuple[str, ...]
    ) -> list[OutputScores]:
        """The outputs of each group, once the model has run them; if this is cancelled, they are not run.

        Raises RequestError for a full queue or a failed item, and ServerError from a server behind `score`.
        """
        size, loop = sum(group.num_tokens for group in groups), asyncio.get_running_loop()
        if self.waiting and self.waiting + size > self.max_waiting:
            raise RequestError(429, f"{self.waiting:,} tokens wait to be scored")
        items = [_Item(group, names, loop.create_future()) for group in groups]
        self.waiting += size
        self._requests.append(deque(items))
        self._changed.set()
        try:
            results = await asyncio.gather(*(item.future for item in items))
        finally:
            self.waiting -= size
        for i, result in enumerate(results):
            if isinstance(result, Exception):
                raise result if _is_down(result) else RequestError(500, str(result), i)
        return [result for result in results if not isinstance(result, Exception)]

    def close(self) -> None:
        """End the thread; uvicorn shuts down once every request is answered."""
        self._worker.cancel()
        self._model.shutdown()

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            while batch := self._take():
                groups, names = [item.group for item in batch], batch[0].names
                run = asyncio.get_running_loop().run_in_executor
                results = await run(self._model, self._score_apart, groups, names)
                for item, result in zip(batch, results, strict=True):
                    if not item.future.done():
                        item.future.set_result(result)
            self._changed.clear()

    def _take(self) -> list[_Item]:
        """Items for one batch, all with the same outputs; requests that were left out come next."""
        batch: list[_Item] = []
        room, others = self.batch_tokens, deque[deque[_Item]]()
        while self._requests and room > 0:
            request, share = self._requests.popleft(), self.batch_tokens // _SLICES
            if batch and request and request[0].names != batch[0].names:
                others.append(request)
                continue
            while request and share > 0:
                item = request.popleft()
                if not item.future.done():  # its client is still there
                    share, room = share - item.group.num_tokens, room - item.group.num_tokens
                    batch.append(item)
            self._requests.extend([request] if request else [])
        self._requests.extendleft(reversed(others))
        return batch

    def _score_apart(
        self, groups: Sequence[TokenizedGroup], names: tuple[str, ...]
    ) -> Sequence[OutputScores | Exception]:
        """The outputs of each group, or its own error."""
        try:
            return self.score(groups, names)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to a request
            if len(groups) == 1 or _is_down(error):
                return [error] * len(groups)
        middle = len(groups) // 2
        parts = groups[:middle], groups[middle:]
        return [result for part in parts for result in self._score_apart(part, names)]


def _is_down(error: Exception) -> bool:
    """Whether the upstream server fails for all requests."""
    return isinstance(error, ServerError) and not isinstance(error, OtherProtocolError)
