"""How rich last-token hidden states are, and how far training moved them from where they began.

The paper's second claim is that the policy loss keeps a reward model's representation from collapsing onto
the one direction that its reward is read along. All figures are of the covariance of the states, so they
do not depend on their scale; states go in as [responses, hidden] arrays.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hafrm.errors import NumericsError
from hafrm.evaluation.metrics import Result

MAX_SPECTRUM = 64
"""Directions that are written out."""

States = Float[np.ndarray, "responses hidden"]


@dataclass(frozen=True, slots=True)
class Representation(Result):
    """One model's states."""

    effective_rank: float
    """exp of the entropy of the spectrum: as many equal directions would be as spread out."""
    top_share: float
    """Of the variance, along its first direction."""
    mean_cosine: float
    """Between two different responses' states: near 1, all states point the same way."""
    spectrum: tuple[float, ...]
    """Shares of the variance along its principal directions, largest first, at most MAX_SPECTRUM."""


@dataclass(frozen=True, slots=True)
class Distance(Result):
    """Between two models' states of the same responses."""

    cka: float
    """Linear CKA, 1 for equal up to rotation and scale."""
    cosine: float
    """Mean cosine of the two states of a response; NaN for hidden sizes that differ."""


def representation(states: States) -> Representation:
    """What one model's states are like; raises NumericsError for states that are not finite."""
    states = _checked(states)
    shares = spectrum(states)
    return Representation(
        effective_rank=effective_rank(shares),
        top_share=float(shares[0]) if len(shares) else float("nan"),
        mean_cosine=mean_cosine(states),
        spectrum=tuple(shares[:MAX_SPECTRUM].tolist()),
    )


def distance(
    first: Float[np.ndarray, "responses first_hidden"],
    second: Float[np.ndarray, "responses second_hidden"],
) -> Distance:
    """How far apart two models see the same responses."""
    first, second = _checked(first), _checked(second)
    same_size = first.shape[1] == second.shape[1]
    return Distance(
        cka=linear_cka(first, second),
        cosine=paired_cosine(first, second) if same_size else float("nan"),
    )


def spectrum(states: States) -> Float[np.ndarray, " directions"]:
    """Eigenvalues of the covariance as shares of their sum, largest first; nothing for a constant."""
    centred = states.astype(np.float64) - states.mean(axis=0, dtype=np.float64)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    total = values.sum()
    # Equal states leave rounding behind their mean, which is no variance.
    if total <= (1e-12 * np.abs(states).max(initial=0.0)) ** 2 * states.size:
        return np.empty(0)
    return np.asarray(values / total, np.float64)


def effective_rank(shares: Float[np.ndarray, " directions"]) -> float:
    """exp(-sum p log p) of the shares; 1 for one direction, NaN for none.

    Roy and Vetterli (2007) take singular values for p; these are their squares, so the rank is lower.
    """
    kept = shares[shares > 0]
    return float(np.exp(-np.sum(kept * np.log(kept)))) if len(kept) else float("nan")


def mean_cosine(states: States) -> float:
    """Mean cosine over all pairs of different responses (anisotropy, arXiv 1909.00512)."""
    num = len(states)
    if num < 2:
        return float("nan")
    # |sum of unit vectors|^2 is the sum over all pairs, of which num are of a state with itself.
    total = np.sum(_unit(states).sum(axis=0) ** 2)
    return float((total - num) / (num * (num - 1)))


def paired_cosine(first: States, second: States) -> float:
    """Mean over responses of the cosine between their two states."""
    return float(np.mean(np.sum(_unit(first) * _unit(second), axis=1)))


def linear_cka(
    first: Float[np.ndarray, "responses first_hidden"],
    second: Float[np.ndarray, "responses second_hidden"],
) -> float:
    """Linear centred kernel alignment, |Y'X|^2 / (|X'X| |Y'Y|) of centred states (arXiv 1905.00414).

    NaN where one of the two is constant. With fewer responses than directions it is biased upwards.
    """
    x, y = (s.astype(np.float64) - s.mean(axis=0, dtype=np.float64) for s in (first, second))
    cross, own, other = (np.linalg.norm(a.T @ b) for a, b in ((y, x), (x, x), (y, y)))
    return float(cross**2 / (own * other)) if own * other > 0 else float("nan")


def _unit(states: States) -> States:
    exact = states.astype(np.float64)
    return np.asarray(exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-300))


def _checked(states: States) -> States:
    if not np.isfinite(states).all():
        raise NumericsError(
            "the model gives hidden states that are not finite; check its weights, or run it in float32"
        )
    return states
