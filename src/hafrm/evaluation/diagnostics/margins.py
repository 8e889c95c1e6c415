"""How large margins are where the scorer is right, and where it is wrong."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hafrm.evaluation.metrics import Result

NUM_BINS = 20


@dataclass(frozen=True, slots=True)
class MarginHistogram(Result):
    """Comparisons by |margin|: a scorer that knows what it does not know is wrong on the left."""

    edges: tuple[float, ...]
    """One more than bins, equal steps from 0 to the largest |margin|; the last bin has its upper edge."""
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    """Equal scores among them, in the first bin."""


def margin_histogram(
    margins: Float[np.ndarray, " comparisons"], *, num_bins: int = NUM_BINS
) -> MarginHistogram:
    """Counts of right and wrong comparisons over shared bins of |margin|."""
    sizes = np.abs(margins.astype(np.float64))
    top = float(sizes.max()) if len(sizes) and sizes.max() > 0 else 1.0
    edges = np.linspace(0.0, top, num_bins + 1)
    right, wrong = (np.histogram(sizes[rows], edges)[0] for rows in (margins > 0, margins <= 0))
    return MarginHistogram(tuple(edges.tolist()), tuple(right.tolist()), tuple(wrong.tolist()))
