"""Groups back to JSON lines, one row for each comparison, in the shape that everybody reads."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hafrm.preferences import Comparison, Group


def write_groups(groups: Sequence[Group], file: Path) -> int:
    """Write `prompt` (messages), `chosen`, `rejected` and what else was known; returns the rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for group in groups for row in _rows(group)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _rows(group: Group) -> Iterator[dict[str, Any]]:
    prompt = [message._asdict() for message in group.prompt]
    for comparison in group.comparisons:
        yield {
            "prompt": prompt,
            "chosen": group.responses[comparison.chosen],
            "rejected": group.responses[comparison.rejected],
            **_known(comparison),
            **group.tags,
        }


def _known(comparison: Comparison) -> dict[str, Any]:
    """Only what differs from a plain preference."""
    known: dict[str, Any] = {}
    if comparison.tie:
        known["tie"] = True
    if comparison.margin:
        known["margin"] = comparison.margin
    if comparison.weight != 1.0:
        known["weight"] = comparison.weight
    if comparison.votes is not None:
        known["votes"] = comparison.votes._asdict()
    return known
