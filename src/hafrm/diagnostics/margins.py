"""How far margins are from probabilities: the temperature that fits best, p = sigmoid(margin / T).

Temperature scaling (Guo et al. 2017, arXiv 1706.04599) for comparisons, fitted on half of the prompts and
tested on the others, so that the gain is one that a user would see.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from hafrm.evaluation.comparisons import Margins, PromptKeys
from hafrm.evaluation.metrics import calibration
from hafrm.statistics import SEED, Real


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

    # in s = 1/T the loss is convex, so its slope has one root
    def slope(s: float) -> float:
        return float(np.mean(-margins * expit(-s * margins)))

    # double the bracket until the slope changes its sign: a wrong margin makes the loss rise in the end
    high = 1.0 / float(np.abs(margins).max())
    while slope(high) < 0:
        high *= 2
    return 1 / float(brentq(slope, 0.0, high, xtol=1e-15 * high, rtol=1e-15))
