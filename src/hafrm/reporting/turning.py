"""Where more optimisation does harm: the place from which on the gold reward surely falls.

Noise makes curves go down too, so a fall counts only where what comes last lies wholly below the peak.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from hafrm.reporting.folders import Folder, Json
from hafrm.reporting.numbers import Number, finite
from hafrm.reporting.sections.rlhf import HELD_OUT, TRAINED, records

NUM_PIECES = 5
"""Parts of a run over which noisy batches are averaged."""


class _Point(NamedTuple):
    step: int
    gold: Number
    reward: float


def peak_before_fall(golds: Sequence[Number]) -> int | None:
    """The place of the highest value, where the interval of the last lies below its own."""
    if len(golds) < 3:
        return None
    peak = max(range(len(golds)), key=lambda i: golds[i].value)
    return peak if golds[peak].low > golds[-1].high else None


def turning_point(run: Folder) -> int | None:
    """The step of an RLHF run from which on gold fell while the reward did not; None without one.

    Of held-out prompts by their intervals, else of batches by the means of NUM_PIECES parts of the run
    and twice their standard errors.
    """
    known = [
        [r for r in records(run, phase) if None not in (r.get("gold"), r.get("reward"))]
        for phase in (HELD_OUT, TRAINED)
    ]
    points = [_held_out(record) for record in known[0]] or _pieces(known[1])
    peak = peak_before_fall([point.gold for point in points])
    if peak is None or points[-1].reward < points[peak].reward:
        return None
    return points[peak].step


def _held_out(record: Json) -> _Point:
    value, low, high = (finite(record.get(f"gold{end}")) for end in ("", "_low", "_high"))
    return _Point(int(record["step"]), Number(value, low, high), finite(record["reward"]))


def _pieces(batches: Sequence[Json]) -> list[_Point]:
    """The means of as many stretches of the run; none where a stretch would have one batch only."""
    ends = [i * len(batches) // NUM_PIECES for i in range(NUM_PIECES + 1)]
    pieces = [batches[a:b] for a, b in itertools.pairwise(ends)]
    if min(map(len, pieces)) < 2:
        return []
    return [
        _Point(
            int(piece[len(piece) // 2]["step"]),
            _mean([finite(record["gold"]) for record in piece]),
            _mean([finite(record["reward"]) for record in piece]).value,
        )
        for piece in pieces
    ]


def _mean(values: Sequence[float]) -> Number:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    half = 2 * math.sqrt(variance / len(values))
    return Number(mean, mean - half, mean + half, len(values))
