"""The one scalar that makes margins probabilities, and how much of the miscalibration it explains.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599) for comparisons: p = sigmoid(margin / T). It is
fitted on half of the prompts and judged on the others, so that the gain is one that a user would see.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from hafrm.evaluation.metrics import Result, calibration

_HALVINGS = 80
"""Of the bracket around the root: to the last bit of a double."""


@dataclass(frozen=True, slots=True)
class Temperature(Result):
    """The fitted temperature, and log-loss and ECE on the prompts that it was not fitted on."""

    value: float
    """Below 1: the margins are too small for their accuracy; above 1: too large. Infinite where margins
    are no better than chance, NaN where no temperature is best (see `fit_temperature`)."""
    log_loss: tuple[float, float]
    """As the model is, and with the temperature; ln 2 = 0.693 is a coin's."""
    ece: tuple[float, float]
    """As the model is, and with the temperature."""
    num_fitted: int
    num_judged: int
    note: str
    """Why there is no finite temperature; "" where there is one."""


def temperature(
    margins: Float[np.ndarray, " comparisons"],
    prompts: Shaped[np.ndarray, " comparisons"],
    *,
    seed: int = 0,
) -> Temperature:
    """Fit on a random half of the prompts, judge on the other; NaN where there is but one prompt."""
    _, cluster = np.unique(prompts, return_inverse=True)
    num_prompts = int(cluster.max()) + 1 if len(cluster) else 0
    fitted = np.random.default_rng(seed).permutation(num_prompts) < num_prompts // 2
    judged = margins[~fitted[cluster]].astype(np.float64)
    value = fit_temperature(margins[fitted[cluster]])
    before = calibration(judged)
    after = calibration(judged / value if not math.isnan(value) else np.empty(0))
    return Temperature(
        value=value,
        log_loss=(before.log_loss, after.log_loss),
        ece=(before.ece, after.ece),
        num_fitted=len(margins) - len(judged),
        num_judged=len(judged),
        note=_note(value),
    )


def _note(value: float) -> str:
    if math.isinf(value):
        return "no better than chance"
    return "cannot be fitted" if math.isnan(value) else ""


def fit_temperature(margins: Float[np.ndarray, " comparisons"]) -> float:
    """The T > 0 that minimises the mean of -log sigmoid(margin / T).

    In s = 1/T the loss is convex, so its slope, mean(-margin * sigmoid(-s * margin)), has one root.
    Infinity where the mean margin is not above zero (a coin does better than any T); NaN where nothing is
    wrong, because ever smaller T are ever better, and where there are no margins but zeros.
    """
    margins = margins.astype(np.float64)
    if not np.any(margins):
        return math.nan
    if margins.mean() <= 0:
        return math.inf
    if margins.min() >= 0:
        return math.nan

    def slope(s: float) -> float:
        return float(np.mean(-margins * np.exp(-np.logaddexp(0.0, s * margins))))

    low, high = 0.0, 1.0 / float(np.abs(margins).max())
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)
