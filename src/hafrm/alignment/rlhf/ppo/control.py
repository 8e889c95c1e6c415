"""What a PPO run remembers between batches: the KL coefficient, and the scale of rewards so far.

Both are plain numbers that go through JSON unchanged, so that a resumed run goes on with the same ones.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KlControl:
    """The factor on the KL penalty, and how it follows what is measured.

    `target` None keeps it fixed. Else arXiv 1909.08593, Sec. 2.2: beta <- beta (1 + K e) with
    e = clip(KL / target - 1, -0.2, 0.2), where TRL takes K = responses / horizon.
    """

    coefficient: float
    target: float | None = None
    """KL per response, nat."""
    horizon: int = 10_000
    """Responses over which the coefficient may change by a fifth."""

    def after(self, kl: float, num_responses: int) -> "KlControl":
        """The control after a batch with this mean KL per response."""
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(
            self, coefficient=self.coefficient * (1.0 + error * num_responses / self.horizon)
        )


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of all rewards seen so far, updated batch by batch (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    def including(self, values: Float[Tensor, " responses"]) -> "Moments":
        """The moments with a batch added."""
        num = len(values)
        batch = values.double()
        mean = float(batch.mean())
        squares = float((batch - mean).square().sum())
        total = self.count + num
        delta = mean - self.mean
        return Moments(
            total,
            self.mean + delta * num / total,
            self.squares + squares + delta**2 * self.count * num / total,
        )

    @property
    def std(self) -> float:
        """The unbiased standard deviation; 1 before there are two rewards, or where all are equal."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def to_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "Moments":
        """What `to_dict` gave."""
        return cls(**values)


@dataclass(frozen=True, slots=True)
class ScoreRules:
    """How rewards become scores: scaled, centred, clipped; names and order as in TRL's PPO."""

    scale: bool = False
    """Divide by the running standard deviation (use_score_scaling)."""
    center: bool = False
    """Subtract the running mean first (use_score_norm, which TRL honours only with scaling)."""
    clip: float | None = None
    """Bound on the result (score_clip)."""

    def apply(
        self, rewards: Float[Tensor, " responses"], moments: Moments
    ) -> Float[Tensor, " responses"]:
        """The scores, given moments that include this batch."""
        scores = rewards - moments.mean if self.center else rewards
        scores = scores / moments.std if self.scale else scores
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)
