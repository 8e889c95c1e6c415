"""Tables of what `hafrm rlhf-compare` finds: how policies stand, who beats whom."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from hafrm.alignment.rlhf.compare import RlhfComparison


def rlhf_tables(found: RlhfComparison) -> Iterator[RenderableType]:
    """Every contender's score beside the start policy's, then wins."""
    seeds = f"{len(found.seeds)} seed" + "s" * (len(found.seeds) > 1)
    table = Table(title=f"test answers, scored by {found.scored_by}, {seeds}", title_justify="left")
    for name in ("policy", "score [95 %]", "gain over start [95 %]", "KL", "characters", "stopped"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for each in found.standings:
        table.add_row(
            each.name,
            "" if each.score is None else str(each.score),
            "" if each.gain is None else str(each.gain),
            f"{each.kl:.2f}",
            f"{each.length:.0f}",
            str(each.stopped),
        )
    yield table
    yield _wins(found)


def _wins(found: RlhfComparison) -> Table:
    judge = found.wins[0].judge
    table = Table(title=f"answer against answer, judged by {judge}", title_justify="left")
    for name in ("first", "second", "first wins", "tie", "second wins", "difference [95 %]"):
        table.add_column(name, justify="left" if name in ("first", "second") else "right")
    for each in found.wins:
        percent = [f"{100 * share.value:.1f} %" for share in (each.win, each.tie, each.lose)]
        table.add_row(each.first, each.second, *percent, str(each.difference))
    return table
