"""The micro-batches of every step, built one step ahead of the model in a worker thread.

Planning, laying out and pinning are host work; with one step of lead the device never waits for them.
The token budget lives here, because running out of memory lowers it: packing changes, the step does not.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from hafrm.preferences import TokenizedGroup
from hafrm.training.batches import (
    ComparisonOrder,
    MicroBatch,
    References,
    build,
    num_tokens_of,
    plan_step,
)
from hafrm.training.parallel import Ranks


class Feed:
    """This rank's micro-batches, step by step; use as a context manager."""

    def __init__(
        self,
        groups: Sequence[TokenizedGroup],
        order: ComparisonOrder,
        references: References | None,
        *,
        batch_size: int,
        max_tokens: int,
        ranks: Ranks,
    ) -> None:
        self.max_tokens = max_tokens
        self._groups, self._order, self._references = groups, order, references
        self._batch_size, self._ranks = batch_size, ranks
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hafrm-feed")
        self._ahead: tuple[int, int, Future[list[MicroBatch]]] | None = None

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `step`, while those of the next one are being built."""
        if self._ahead is not None and self._ahead[:2] == (step, self.max_tokens):
            batches = self._ahead[2].result()
        else:
            batches = self._build(step, self.max_tokens)
        upcoming = self._worker.submit(self._build, step + 1, self.max_tokens)
        self._ahead = (step + 1, self.max_tokens, upcoming)
        return batches

    def halve(self, step: int) -> bool:
        """Halve the token budget; False where every micro-batch of `step` is a single group already."""
        picks = self._order.window(step * self._batch_size, self._batch_size)
        largest = max(num_tokens_of(self._groups, picks))
        if self.max_tokens <= largest:
            return False
        self.max_tokens = max(self.max_tokens // 2, 1)
        return True

    def _build(self, step: int, max_tokens: int) -> list[MicroBatch]:
        picks = self._order.window(step * self._batch_size, self._batch_size)
        plan = plan_step(self._groups, picks, max_tokens, self._ranks.size)
        batches = [build(parts, self._references) for parts in plan[self._ranks.rank]]
        return batches if self._ranks.device.type == "cpu" else [b.pinned() for b in batches]
