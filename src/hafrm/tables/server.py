"""What `hafrm verify` shows of a server, as lines. Loads neither torch nor transformers."""

from collections.abc import Iterator

from rich.console import RenderableType

from hafrm.scoring.servers.replay import ServerReplay


def server_lines(found: ServerReplay) -> Iterator[RenderableType]:
    """Protocol, differences, and where they are largest."""
    model = "" if found.model is None else f", model {found.model}"
    yield f"{found.url} speaks {found.protocol}{model}"
    yield (
        f"{found.num} golden scores: largest difference {found.difference:.2g}, alone or in a batch "
        f"{found.batch_difference:.2g}"
    )
    yield f"relative to max(1, |reward|); tolerated: {found.tolerance:g}"
    if not found.ok:
        yield f"furthest off: {found.got:.5g} instead of {found.expected:.5g} for ...{found.worst!r}"
    if found.suspicion:
        yield f"it looks as if {found.suspicion}"
    yield (
        "the server gives the exported scores"
        if found.ok
        else "the server does NOT give the exported scores"
    )
