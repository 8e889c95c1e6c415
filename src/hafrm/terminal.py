"""Progress of something long on standard error: a line that changes on a terminal, lines in a log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("hafrm")

PACE_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""


@contextmanager
def show_count(what: str) -> Iterator[Callable[[int, int], None]]:
    """A counter, given (how many more, tokens run for them); silent where it is no terminal."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description} {task.completed}"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda more, _: bar.update(task, advance=more)


@contextmanager
def show_pace() -> Iterator[Callable[[object], None]]:
    """What is given, as text: where it is no terminal, at most every PACE_SECONDS."""
    from rich.console import Console  # noqa: PLC0415

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("reading inputs, loading the model") as line:
            yield lambda pace: line.update(str(pace))
        return
    last = time.monotonic()

    def tell(pace: object) -> None:
        nonlocal last
        if time.monotonic() - last >= PACE_SECONDS:
            last = time.monotonic()
            log.info("%s", pace)

    yield tell
