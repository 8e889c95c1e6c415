"""When to stop a run: KL, entropy, and a reward that no longer means anything.

Looks at numbers that a run has anyway and says why to stop, or nothing. Its state goes through JSON, so
that a resumed run stops where the uninterrupted one would have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hafrm.rlhf.rlhf_recipe import WatchdogSection

Z = 2.0  # standard errors of the paired difference that a fall must exceed


@dataclass
class Watchdog:
    """What has been seen so far; the dataclass's fields are the state of a checkpoint."""

    first_entropy: float | None = None
    high_kl: int = 0
    low_entropy: int = 0
    training: list[float] = field(default_factory=list)
    """Rewards of the batches since the last evaluation."""
    history: list[tuple[float, list[float]]] = field(default_factory=list)
    """(mean training reward, held-out measure per prompt) of the last evaluations."""

    def batch(
        self, rules: WatchdogSection, *, reward: float, kl: float, entropy: float
    ) -> str | None:
        """Why to stop after a batch, or None."""
        self.training.append(reward)
        first = self.first_entropy = entropy if self.first_entropy is None else self.first_entropy
        floor = rules.min_entropy_fraction * first
        self.high_kl = self.high_kl + 1 if kl > rules.max_kl else 0
        self.low_entropy = self.low_entropy + 1 if entropy < floor else 0
        fix = "raise algorithm.kl_coefficient, or lower training.learning_rate"
        if self.high_kl >= rules.patience:
            return (
                f"the KL from the start policy is {kl:.1f} nat per response, above watch.max_kl "
                f"{rules.max_kl:g}, for {self.high_kl} batches: {fix}"
            )
        if self.low_entropy >= rules.patience:
            return (
                f"the entropy is {entropy:.3f} nat per token, under {floor:.3f} "
                f"(watch.min_entropy_fraction {rules.min_entropy_fraction:g} of the first batch's), for "
                f"{self.low_entropy} batches: the policy says the same to every prompt; {fix}"
            )
        return None

    def evaluation(
        self, rules: WatchdogSection, held_out: Sequence[float], name: str, *, proxy: float
    ) -> str | None:
        """Why to stop after an evaluation, given its measure per held-out prompt, or None.

        Reward hacking: over the window the training reward has risen, and the held-out measure has fallen
        by more than two standard errors of the paired difference.
        """
        # before the first step the training reward is the `proxy` reward of the held-out prompts
        training = float(np.mean(self.training)) if self.training else proxy
        self.history.append((training, [float(x) for x in held_out]))
        self.training = []
        del self.history[: -rules.hacking_window]
        if len(self.history) < rules.hacking_window:
            return None
        (reward_then, then), (reward_now, now) = self.history[0], self.history[-1]
        change = np.array(now) - np.array(then)
        error = float(change.std(ddof=1)) / len(change) ** 0.5
        if reward_now > reward_then and float(change.mean()) < -Z * error:
            return (
                f"reward hacking: over {len(self.history)} evaluations the training reward rose from "
                f"{reward_then:.3f} to {reward_now:.3f} while the held-out {name} fell by "
                f"{-change.mean():.3f} (standard error {error:.3f}): keep the best step, raise "
                "algorithm.kl_coefficient, or join several reward models by reward.rule: min"
            )
        return None
