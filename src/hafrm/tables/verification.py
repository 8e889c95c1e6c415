"""Tables of what `hafrm verify` finds: the checklist of a directory, the replay on a server."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from hafrm.scoring.checklist.clause import ClauseResult, Verification

_MARKS = {"pass": "pass", "fail": "FAIL", "not applicable": "-"}


def checklist_tables(found: Verification) -> Iterator[RenderableType]:
    """Every clause with what was found, and under a failed one how to mend it."""
    table = Table(title=found.path, title_justify="left")
    for name in ("", "clause", "found"):
        table.add_column(name, no_wrap=name != "found")
    for result in found.clauses:
        style = "bold red" if result.outcome == "fail" else None
        table.add_row(_MARKS[result.outcome], result.name, _told(result), style=style)
    yield table
    failed, judged = len(found.failed), sum(r.outcome != "not applicable" for r in found.clauses)
    yield f"{judged - failed} of {judged} clauses hold" + ("" if found.ok else f", {failed} do not")


def _told(result: ClauseResult) -> str:
    return f"{result.found}\nmend: {result.mend}" if result.mend else result.found
