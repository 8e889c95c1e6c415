"""How far a bulk job is, how fast it goes, and when it will be done. Counts only; shows nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Pace:
    """Rows and tokens that have been run since the start, out of all rows that were to be."""

    num_rows: int
    """Rows to score; those of shards that were finished before are not among them."""
    clock: Callable[[], float] = time.monotonic
    rows: int = 0
    tokens: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def add(self, rows: int, tokens: int) -> None:
        """Count what has been run."""
        self.rows += rows
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        """Since the start; the loading of the model counts."""
        return self.clock() - self.started

    @property
    def seconds_left(self) -> float | None:
        """Until all rows are done at the pace so far; None before the first."""
        return self.seconds * (self.num_rows - self.rows) / self.rows if self.rows else None

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} left"
        return (
            f"{self.rows:,} of {self.num_rows:,} rows, {self.rows / seconds:,.1f} rows/s, "
            f"{self.tokens / seconds:,.0f} tokens/s{left}"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
