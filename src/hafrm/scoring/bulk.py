"""Score a file: rows with a prompt and response(s) in, the same rows with scores out, order kept.

Rows are read, encoded and scored in chunks, so memory is bounded; the output appears whole or not at
all. A row that cannot be scored keeps its place, with null for its score and the reason in `error`.
"""

import gzip
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafrm.data.groups import Group
from hafrm.data.rows import ParsedRow, parse_row
from hafrm.data.sources import iter_rows, parse_source
from hafrm.data.values import Refusal
from hafrm.errors import DataError
from hafrm.runs import atomic_write
from hafrm.scoring.forward import first_responses
from hafrm.scoring.scorer import RewardModel

CHUNK = 4096
"""Rows held at a time."""
SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class BulkResult:
    """What became of a file."""

    num_rows: int
    num_responses: int
    num_bad: int


def score_file(
    model: RewardModel,
    source: str | Path,
    out: Path,
    done: Callable[[int], None] | None = None,
) -> BulkResult:
    """Write every row of `source` with its scores to `out` (.jsonl or .jsonl.gz).

    A row with `response` gets `reward`; `responses` or `completions` get `rewards`, in their order; a
    pair gets `chosen_reward` and `rejected_reward`. `done(n)` hears of finished rows.

    Raises DataError for an unknown output suffix or a source that cannot be read.
    """
    if not out.name.endswith(SUFFIXES):
        raise DataError(f"cannot write {out}: the output must end in one of {', '.join(SUFFIXES)}")
    lines: list[str] = []
    responses = bad = 0
    rows = iter_rows(parse_source(source))
    while chunk := list(itertools.islice(rows, CHUNK)):
        scored = _score_rows(model, [row for _, row in chunk])
        for row in scored:
            bad += "error" in row
            responses += _num_scores(row)
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if done is not None:
            done(len(chunk))
    data = "".join(lines).encode("utf-8", "surrogatepass")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, gzip.compress(data, mtime=0) if out.suffix == ".gz" else data)
    return BulkResult(num_rows=len(lines), num_responses=responses, num_bad=bad)


def _score_rows(model: RewardModel, rows: Sequence[object]) -> Iterator[dict[str, Any]]:
    parsed = [
        row if isinstance(row, Refusal) else parse_row(row, need_comparisons=False) for row in rows
    ]
    groups = [
        Group(id=str(i), prompt=p.prompt, responses=tuple(dict.fromkeys(p.responses)))
        for i, p in enumerate(parsed)
        if isinstance(p, ParsedRow)
    ]
    encoded, _ = model.encoder.encode(groups)
    scores = model.score_encoded(encoded)
    first = first_responses(encoded)
    place = {int(group.id): k for k, group in enumerate(groups)}
    for i, (row, known) in enumerate(zip(rows, parsed, strict=True)):
        kept = dict(row) if isinstance(row, dict) else {}
        if isinstance(known, Refusal):
            yield {**kept, "reward": None, "error": f"{known.reason}: {known.detail}"}
            continue
        start = first[place[i]]
        order = {text: start + k for k, text in enumerate(groups[place[i]].responses)}
        rewards = [float(scores[order[text]]) for text in known.responses]
        yield {**kept, **_columns(kept, rewards)}


def _columns(row: dict[str, Any], rewards: list[float]) -> dict[str, Any]:
    if "chosen" in row:
        return {"chosen_reward": rewards[0], "rejected_reward": rewards[1]}
    return {"reward": rewards[0]} if "response" in row else {"rewards": rewards}


def _num_scores(row: dict[str, Any]) -> int:
    single = sum(
        row.get(name) is not None for name in ("reward", "chosen_reward", "rejected_reward")
    )
    return single + len(row.get("rewards", ()))
