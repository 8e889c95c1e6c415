"""How rich last-token hidden states are, and how far training moved them from the base model's.

The paper's second claim is that the policy loss keeps a reward model's representation from collapsing onto
the direction of its reward. No figure depends on the states' scale.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hafrm.errors import NumericsError
from hafrm.statistics import Real

StateMatrix = Float[np.ndarray, "responses hidden"]


@dataclass(frozen=True, slots=True)
class Representation:
    """One model's states, and how alike the base model's are."""

    model: str
    effective_rank: Real
    """exp of the entropy of the spectrum: as many equal directions would be as spread out."""
    top_fraction: Real  # of the variance, along its first direction
    mean_cosine: Real
    """Between two different responses' states: near 1, all states point the same way."""
    cka_to_base: Real = math.nan
    """Linear CKA, 1 for equal up to rotation and scale; NaN without a base model."""


def describe_states(
    model: str, states: StateMatrix, base: Float[np.ndarray, "responses base_hidden"] | None = None
) -> Representation:
    """What a model's states are like; raises NumericsError for states that are not finite."""
    for array in (states, base):
        if array is not None and not np.isfinite(array).all():
            raise NumericsError(
                f"{model} gives hidden states that are not finite; check its weights, or run it in float32"
            )
    fractions = spectrum(states)
    p = fractions[fractions > 0]
    # Roy and Vetterli (2007) take singular values for p; these are their squares, so the rank is lower
    rank = float(np.exp(-np.sum(p * np.log(p)))) if len(p) else math.nan
    top = float(fractions[0]) if len(fractions) else math.nan
    cka = math.nan if base is None else linear_cka(states, base)
    return Representation(model, rank, top, mean_cosine(states), cka)


def spectrum(states: StateMatrix) -> Float[np.ndarray, " directions"]:
    """Eigenvalues of the covariance as fractions of their sum, largest first; empty for a constant."""
    centred = states.astype(np.float64) - states.mean(axis=0, dtype=np.float64)
    # squared singular values are the covariance's eigenvalues, up to a factor
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    total = values.sum()
    # rounding around the mean of equal states is no variance
    if total <= (1e-12 * np.abs(states).max(initial=0.0)) ** 2 * states.size:
        return np.empty(0)
    return np.asarray(values / total, np.float64)


def mean_cosine(states: StateMatrix) -> float:
    """Mean cosine over all pairs of different responses (anisotropy, arXiv 1909.00512)."""
    num, exact = len(states), states.astype(np.float64)
    if num < 2:
        return math.nan
    # a state of zeros stays zero
    unit = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-300)
    # |sum of unit vectors|^2 is the sum over all pairs, of which num are of a state with itself
    total = np.sum(unit.sum(axis=0) ** 2)
    return float((total - num) / (num * (num - 1)))


def linear_cka(
    first: Float[np.ndarray, "responses first_hidden"],
    second: Float[np.ndarray, "responses second_hidden"],
) -> float:
    """Linear centred kernel alignment, |Y'X|^2 / (|X'X| |Y'Y|) of centred states (arXiv 1905.00414).

    NaN if one of the two is constant. With fewer responses than directions it is biased upwards.
    """
    # both Gram matrices are [hidden, hidden], not [responses, responses]
    x, y = (s.astype(np.float64) - s.mean(axis=0, dtype=np.float64) for s in (first, second))
    cross, own, other = (np.linalg.norm(a.T @ b) for a, b in ((y, x), (x, x), (y, y)))
    return float(cross**2 / (own * other)) if own * other > 0 else math.nan
