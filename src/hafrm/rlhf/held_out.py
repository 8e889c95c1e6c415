"""Held-out prompts: how good a policy is where nothing was learned, and which step is exported.

Always the same prompts and the same seed, so that two evaluations differ only by the policy. The exported
step is the best by a measure that was not trained on: the gold reward where it is known, else that of
`evaluation.judge`, else the minimum over the reward models minus a penalty on the distance from the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.rlhf.actor import Actor, Rollout
from hafrm.rlhf.prompts import Prompt
from hafrm.rlhf.rewards import Rewards, score_texts
from hafrm.scoring.reward_model import Scorer
from hafrm.statistics import Estimate, clustered_bootstrap

Responses = Float[np.ndarray, " responses"]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One evaluation; an entry per held-out prompt."""

    rollouts: list[Rollout]
    rewards: Responses
    """By the rule of the recipe: the proxy, what training raises."""
    lowest: Responses
    """The minimum over the reward models."""
    kls: Responses
    lengths: NDArray[np.int64]
    ended: NDArray[np.bool_]
    judged: Responses | None
    gold: Responses | None

    def selected_by(self) -> str:
        """The name of the measure that picks the best step."""
        if self.gold is not None:
            return "gold"
        return "judge" if self.judged is not None else "penalised"

    def selection_scores(self, kl_penalty: float) -> Responses:
        """That measure for each prompt."""
        if self.gold is not None:
            return self.gold
        if self.judged is not None:
            return self.judged
        return self.lowest - kl_penalty * self.kls

    def estimates(self) -> dict[str, Estimate]:
        """Means with intervals over prompts, of every measure there is."""
        measures = {"reward": self.rewards, "judge": self.judged, "gold": self.gold}
        return {
            name: clustered_bootstrap(values.astype(np.float64), proportion=False)
            for name, values in measures.items()
            if values is not None
        }


class HeldOutEvaluator:
    """The prompts, rewards and seed that every evaluation of a run shares."""

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

    def write(self, actor: Actor) -> list[Rollout]:
        """The policy's responses, one to each prompt."""
        return actor.write(self.prompts, 1, self.seed)

    def measure(self, actor: Actor, rollouts: list[Rollout]) -> HeldOut:
        """The policy's responses, measured by every reward there is."""
        prompts = [r.prompt.messages for r in rollouts]
        texts = [r.texts for r in rollouts]
        by_model = self.rewards.by_model(prompts, texts)
        policy, reference = actor.logps(rollouts)
        assert policy.logps is not None
        assert reference.logps is not None
        return HeldOut(
            rollouts,
            self.rewards.combine(by_model),
            np.asarray(by_model.min(0)),
            policy.logps - reference.logps,
            policy.lengths,
            np.array([end for response in rollouts for end in response.ended]),
            None if self.judge is None else score_texts(self.judge, prompts, texts),
            gold_rewards(self.gold, rollouts),
        )


def gold_rewards(gold: GoldReward | None, rollouts: Sequence[Rollout]) -> Responses | None:
    """The gold reward of every response, where it is known."""
    if gold is None:
        return None
    values = [gold(r.prompt.messages, text) for r in rollouts for text in r.texts]
    return np.array(values, np.float32)


def length_slope(rewards: Responses, lengths: NDArray[np.int64]) -> float:
    """Reward per token of length, by least squares over responses; 0 where all have one length."""
    x = lengths - lengths.mean()
    total = float((x * x).sum())
    return float((x * (rewards - rewards.mean())).sum()) / total if total > 0 else 0.0


def length_matched(
    rewards: Responses, lengths: NDArray[np.int64], slope: float, length: float
) -> Responses:
    """The rewards as if every response had `length` tokens: without what growing longer earned."""
    return np.asarray(rewards - slope * (lengths - length), np.float32)
