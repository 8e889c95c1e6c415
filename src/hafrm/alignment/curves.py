"""What picking the best of n gives, for every n at once, from one set of samples; arrays in, arrays out.

Of N samples every subset of n is as good a draw as any other, so the mean over all subsets is the
estimate of best-of-n with the least variance, and it is unbiased; no subset is ever drawn. Published as
the best-of-n estimator of WebGPT (arXiv 2112.09332, appendix I) and used by Gao et al. (arXiv 2210.10760).
"""

import math

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray


def expected_picks(
    scores: Float[np.ndarray, " candidates"], values: Float[np.ndarray, " candidates"]
) -> Float[np.ndarray, " candidates"]:
    """Expected value of the highest scored of n random candidates, for n = 1, 2, ..., all of them.

    Of equal scores the earlier candidate is taken, as `argmax` does, so the last entry is the value of
    the pick among all. `values` may be the scores themselves (proxy) or another judge's (gold).
    """
    order = np.lexsort((-np.arange(len(scores)), scores))
    return _weights(len(scores)) @ np.asarray(values, np.float64)[order]


def _weights(num: int) -> Float[np.ndarray, "num num"]:
    """Row n - 1: the chance that the candidate with i lower ones is the best of n drawn without return.

    The other n - 1 must come from the i lower ones: C(i, n - 1) / C(num, n), by its ratio to the row above.
    """
    lower = np.arange(num, dtype=np.float64)
    rows = [np.full(num, 1.0 / num)]
    for n in range(1, num):
        factor = np.maximum(lower - n + 1, 0.0) * (n + 1) / (n * (num - n))
        rows.append(rows[-1] * factor)
    return np.stack(rows)


def filled_up(values: Float[np.ndarray, " candidates"], num: int) -> Float[np.ndarray, " num"]:
    """The curve of a prompt that has fewer than `num` candidates, its last value repeated: for larger n
    the best of all that there are."""
    return np.concatenate([values, np.full(num - len(values), values[-1])])


def kl_of_best(n: int) -> float:
    """KL(best of n || policy) in nat: log n - (n - 1) / n.

    Exact for independent samples that never repeat nor tie, an upper bound otherwise (Beirami et al.,
    arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def fit_gold(
    kl: Float[np.ndarray, " points"], gain: Float[np.ndarray, " points"]
) -> tuple[float, float]:
    """(alpha, beta) of gain = d (alpha - beta d) with d = sqrt(KL), by least squares; NaN for fewer than
    three points.

    The form that Gao et al. (arXiv 2210.10760, Eq. 1) found for best-of-n: `gain` is the gold reward
    above that of n = 1, and beta above 0 bends the curve down again, at d = alpha / (2 beta).
    """
    if len(kl) < 3:
        return math.nan, math.nan
    d = np.sqrt(np.asarray(kl, np.float64))
    design: NDArray[np.float64] = np.stack([d, -(d**2)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(design, np.asarray(gain, np.float64), rcond=None)
    return float(alpha), float(beta)
