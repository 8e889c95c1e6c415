"""Held-out prompts: what a policy is worth where nothing was learned, and which step is kept.

Always the same prompts and the same seed, so that two evaluations differ by the policy alone. The step
that is kept is the best by a measure that was not trained on: the gold reward where it is known, else a
judge's, else the minimum over the reward models less a price on the distance from the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.alignment.rlhf.actor import Actor, Written
from hafrm.alignment.rlhf.prompts import Prompt
from hafrm.alignment.rlhf.rewards import Rewards, score_texts
from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.scoring.scorer import Scorer
from hafrm.statistics import Estimate, clustered_bootstrap

Responses = Float[np.ndarray, " responses"]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One evaluation; an entry per held-out prompt."""

    written: list[Written]
    rewards: Responses
    """By the rule of the recipe: the proxy, what training raises."""
    lowest: Responses
    """The minimum over the reward models."""
    kls: Responses
    lengths: NDArray[np.int64]
    ended: NDArray[np.bool_]
    judged: Responses | None
    gold: Responses | None

    def kept_by(self) -> str:
        """The name of the measure that picks the best step."""
        if self.gold is not None:
            return "gold"
        return "judge" if self.judged is not None else "penalised"

    def measure(self, kl_penalty: float) -> Responses:
        """That measure, per prompt."""
        if self.gold is not None:
            return self.gold
        if self.judged is not None:
            return self.judged
        return self.lowest - kl_penalty * self.kls

    def estimates(self) -> dict[str, Estimate]:
        """Means with intervals over prompts, of whatever is known."""
        known = {"reward": self.rewards, "judge": self.judged, "gold": self.gold}
        return {
            name: clustered_bootstrap(values.astype(np.float64), proportion=False)
            for name, values in known.items()
            if values is not None
        }


class Examination:
    """What every evaluation of a run shares."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        *,
        judge: Scorer | None = None,
        gold: GoldReward | None = None,
        seed: int = 0,
    ) -> None:
        self.prompts, self.rewards = list(prompts), rewards
        self.judge, self.gold, self.seed = judge, gold, seed

    def write(self, actor: Actor) -> list[Written]:
        """The policy's responses, one to each prompt."""
        return actor.write(self.prompts, 1, self.seed)

    def take(self, actor: Actor, written: list[Written] | None = None) -> HeldOut:
        """The policy's responses (or those given), measured by everything that is at hand."""
        written = self.write(actor) if written is None else written
        prompts = [each.prompt.messages for each in written]
        texts = [each.texts for each in written]
        each = self.rewards.each(prompts, texts)
        policy, reference = actor.logps(written)
        assert policy.logps is not None
        assert reference.logps is not None
        return HeldOut(
            written,
            self.rewards.combine(each),
            np.asarray(each.min(0)),
            policy.logps - reference.logps,
            policy.lengths,
            np.array([end for response in written for end in response.ended]),
            None if self.judge is None else score_texts(self.judge, prompts, texts),
            gold_rewards(self.gold, written),
        )


def gold_rewards(gold: GoldReward | None, written: Sequence[Written]) -> Responses | None:
    """The gold reward of every response, where it is known."""
    if gold is None:
        return None
    values = [gold(each.prompt.messages, text) for each in written for text in each.texts]
    return np.array(values, np.float32)


def length_slope(rewards: Responses, lengths: NDArray[np.int64]) -> float:
    """Reward per token of length, by least squares over responses; 0 where all have one length."""
    x = lengths - lengths.mean()
    total = float((x * x).sum())
    return float((x * (rewards - rewards.mean())).sum()) / total if total > 0 else 0.0


def length_matched(
    rewards: Responses, lengths: NDArray[np.int64], slope: float, length: float
) -> Responses:
    """The rewards as if every response had `length` tokens: what growing longer earned is taken off."""
    return np.asarray(rewards - slope * (lengths - length), np.float32)
