"""How far margins are from probabilities: a fitted temperature, and histograms of right and wrong margins.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599) for comparisons: p = sigmoid(margin / T). It is
fitted on half of the prompts and tested on the others, so that the gain is one that a user would see.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from hafrm.evaluation.comparisons import Margins, PromptKeys
from hafrm.evaluation.metrics import calibration
from hafrm.results import Real
from hafrm.statistics import SEED

NUM_MARGIN_BINS = 20


@dataclass(frozen=True, slots=True)
class Temperature:
    """The fitted temperature, and log-loss and ECE on the prompts that it was not fitted on."""

    value: Real
    """Above 1: margins too large for their accuracy; infinite: no better than chance; NaN: no best one."""
    log_loss: tuple[Real, Real]
    """As the model is, and with the temperature; ln 2 = 0.693 is a coin's."""
    ece: tuple[Real, Real]
    """As the model is, and with the temperature."""
    note: str
    """Why there is no finite temperature; "" if there is one."""


@dataclass(frozen=True, slots=True)
class MarginHistogram:
    """Comparisons by |margin|: a scorer whose margins say how sure it may be is wrong on the left."""

    edges: tuple[float, ...]
    """One more than bins, equal steps from 0 to the largest |margin|; the last bin has its upper edge."""
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    """Equal scores among them, in the first bin."""


def temperature(margins: Margins, prompts: PromptKeys) -> Temperature:
    """Fit on a random half of the prompts, test on the other; NaN if there is only one prompt."""
    names, cluster = np.unique(prompts, return_inverse=True)
    is_fitted = np.random.default_rng(SEED).permutation(len(names)) < len(names) // 2
    # split by prompt: comparisons of one prompt on both sides would leak
    tested = margins[~is_fitted[cluster]].astype(np.float64)
    value = fit_temperature(margins[is_fitted[cluster]])
    before = calibration(tested)
    # an infinite temperature makes every probability one half
    after = calibration(np.empty(0) if math.isnan(value) else tested / value)
    note = "cannot be fitted" if math.isnan(value) else ""
    note = "no better than chance" if math.isinf(value) else note
    losses, errors = (before.log_loss, after.log_loss), (before.ece, after.ece)
    return Temperature(value, losses, errors, note)


def fit_temperature(margins: Margins) -> float:
    """The T > 0 that minimises the mean of -log sigmoid(margin / T).

    In s = 1/T the loss is convex, so its slope, mean(-margin * sigmoid(-s * margin)), has one root.
    Infinity if the mean margin is not above zero (a coin does better than any T). NaN if nothing is wrong,
    because then a smaller T is always better, and if all margins are zero.
    """
    margins = margins.astype(np.float64)
    if not np.any(margins):
        return math.nan
    if margins.mean() <= 0:
        return math.inf
    if margins.min() >= 0:
        return math.nan

    def slope(s: float) -> float:
        return float(np.mean(-margins * expit(-s * margins)))

    # double the bracket until the slope changes its sign: a wrong margin makes the loss rise in the end
    high = 1.0 / float(np.abs(margins).max())
    while slope(high) < 0:
        high *= 2
    return 1 / float(brentq(slope, 0.0, high, xtol=1e-15 * high, rtol=1e-15))


def margin_histogram(margins: Margins, *, num_bins: int = NUM_MARGIN_BINS) -> MarginHistogram:
    """Counts of right and wrong comparisons over shared bins of |margin|."""
    sizes = np.abs(margins.astype(np.float64))
    # all scores equal: any scale will do
    top = float(sizes.max()) if len(sizes) and sizes.max() > 0 else 1.0
    edges = np.linspace(0.0, top, num_bins + 1)
    right, wrong = (np.histogram(sizes[rows], edges)[0] for rows in (margins > 0, margins <= 0))
    return MarginHistogram(tuple(edges.tolist()), tuple(right.tolist()), tuple(wrong.tolist()))
