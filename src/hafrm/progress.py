"""Progress of long work: the one callback that reports it, and the line on a terminal that shows it."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("hafrm")

OnProgress = Callable[[int, int], None]
"""Called as on_progress(done, total), both counted from the start; a total of 0 means unknown."""

LOG_SECONDS = 30.0  # between two lines of progress in a log


def no_progress(done: int, total: int) -> None:
    """The callback that shows nothing."""


def over_passes(on_progress: OnProgress, total: int) -> OnProgress:
    """One callback for several passes, each counted from 0 to its own total: it adds them up to `total`."""
    finished = 0

    def add(done: int, total_of_pass: int) -> None:
        nonlocal finished
        on_progress(finished + done, total)
        finished += done if done == total_of_pass else 0

    return add


@contextmanager
def show_progress(what: str, *, done: int = 0) -> Iterator[OnProgress]:
    """A callback that shows "what: 120 of 400, 12.5/s, 0:22 left" on a terminal, or else in the log.

    `done` items were finished before the run was resumed; they do not count towards the rate.
    """
    from rich.console import Console  # noqa: PLC0415

    start = last = time.monotonic()
    before = done
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what) as status:
            yield lambda done, total: status.update(_line(what, before, done, total, start))
        return

    def log_line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_SECONDS:
            last = time.monotonic()
            log.info("%s", _line(what, before, done, total, start))

    yield log_line


def _line(what: str, before: int, done: int, total: int, start: float) -> str:
    rate = (done - before) / max(time.monotonic() - start, 1e-9)
    speed = f"{rate:,.1f}/s" if rate >= 1 or not rate else f"{1 / rate:,.1f} s each"
    if not total:
        return f"{what}: {done:,}, {speed}"
    minutes, seconds = divmod(round((total - done) / rate) if rate else 0, 60)
    hours, minutes = divmod(minutes, 60)
    left = f", {hours}:{minutes:02d}:{seconds:02d} left" if rate else ""
    return f"{what}: {done:,} of {total:,}, {speed}{left}"
