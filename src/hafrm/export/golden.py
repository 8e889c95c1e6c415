"""The golden file: conversations with the reward that every consumer of an export must get.

One JSON object per line: `messages` or `text`, `reward`, and optionally `input_ids`. Nothing here loads
torch or transformers, so a machine without them can verify a server.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafrm.errors import DataError

GOLDEN = "golden_scores.jsonl"
"""The file's name in an exported directory."""


@dataclass(frozen=True)
class GoldenLine:
    """One conversation and its reward."""

    reward: float
    messages: tuple[dict[str, str], ...] | None
    text: str | None
    """The conversation, rendered with the exported template."""
    input_ids: tuple[int, ...] | None


def read_golden(path: Path) -> list[GoldenLine]:
    """The lines of a golden file, or of the one in a directory.

    Raises DataError for a file that is missing, empty or damaged.
    """
    file = path / GOLDEN if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read golden scores from {file}: {error}") from error
    lines = [
        _parse(line, f"{file}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not lines:
        raise DataError(f"{file} holds no golden scores; `hafrm export` writes some")
    return lines


def _parse(line: str, where: str) -> GoldenLine:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: not a JSON object")
    reward, ids = row.get("reward"), row.get("input_ids")
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise DataError(f"{where}: `reward` must be a finite number, got {reward!r}")
    messages, text = row.get("messages"), row.get("text")
    if not (_conversation(messages) or isinstance(text, str)):
        raise DataError(f"{where}: needs `messages` (role and content each) or `text`")
    return GoldenLine(
        reward=float(reward),
        messages=_conversation(messages),
        text=text if isinstance(text, str) else None,
        input_ids=tuple(ids) if isinstance(ids, list) else None,
    )


def _conversation(messages: Any) -> tuple[dict[str, str], ...] | None:
    """The messages, or None if they are no conversation."""
    if not isinstance(messages, list) or not messages:
        return None
    is_valid = all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages)
    return tuple(messages) if is_valid else None
