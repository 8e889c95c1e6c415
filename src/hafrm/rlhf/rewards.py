"""What responses are worth: the rewards that train a policy, and the held-out measures that select a step.

Reward models are asked through text, so they may have other tokenizers than the policy. Held-out prompts
and their seed never change within a run, so two evaluations differ by the policy alone. A reward that is
not finite is an error, never a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.errors import DataError, NumericsError
from hafrm.evaluation.heads import EvaluationOptions, load_main_head
from hafrm.preferences import Group, Message
from hafrm.rlhf.actor import Rollout
from hafrm.rlhf.rlhf_recipe import RewardSection
from hafrm.scoring.reward_model import Scorer
from hafrm.statistics import Estimate, clustered_bootstrap

Conversation = Sequence[Message]
Responses = Float[np.ndarray, " responses"]
Measure = Literal["gold", "independent", "penalised"]
"""What selects a step: the gold reward, evaluation.reward_model's, or the minimum minus a KL penalty."""


def load_scorer(path: str) -> Scorer:
    """The reward model at a run folder, exported directory or hub id; of a policy, its implicit reward."""
    return load_main_head(path, EvaluationOptions())


def score_texts(
    scorer: Scorer, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
) -> NDArray[np.float32]:
    """The reward of every response, prompt by prompt; equal responses to a prompt are run once.

    Raises DataError for a conversation that the reward model's template or length refuses.
    """
    groups = [
        Group(id=str(i), prompt=tuple(prompt), responses=tuple(dict.fromkeys(texts)))
        for i, (prompt, texts) in enumerate(zip(prompts, responses, strict=True))
    ]
    encoded, report = scorer.encoder.encode(groups)
    num_long = max(report.prompts_cut, report.responses_cut, report.dropped)
    if num_long:
        raise DataError(
            f"{num_long} prompts (of {len(groups)}), or responses to them, do not fit into the "
            f"{scorer.encoder.lengths.max_length} tokens that the reward model takes: lower "
            "data.max_prompt_length or sampling.max_new_tokens"
        )
    distinct = iter(scorer.score_encoded(encoded))
    rewards: list[np.float32] = []
    for group, texts in zip(groups, responses, strict=True):
        by_text = {text: next(distinct) for text in group.responses}
        rewards += [by_text[text] for text in texts]
    return np.array(rewards, np.float32)


class Rewards:
    """The reward models of a run and the rule that joins them."""

    def __init__(self, scorers: Sequence[Scorer], rule: Literal["mean", "min"] = "mean") -> None:
        self.scorers, self.rule = list(scorers), rule
        self.scales = [(0.0, 1.0)] * len(self.scorers)
        """Mean and standard deviation of each model's rewards of the start policy's responses."""

    @classmethod
    def load(cls, section: RewardSection) -> "Rewards":
        """The models that a recipe names."""
        return cls([load_scorer(path) for path in section.models], section.rule)

    def by_model(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> Float[np.ndarray, "models responses"]:
        """Every model's reward of every response, on the common scale."""
        rows = [score_texts(scorer, prompts, responses) for scorer in self.scorers]
        for number, row in enumerate(rows):
            num_bad = int((~np.isfinite(row)).sum())
            if num_bad:
                raise NumericsError(
                    f"reward model {number} gives rewards that are not finite for {num_bad} of {len(row)} "
                    "responses; stopped before anything was learned from them"
                )
        scaled = [(row - mean) / std for row, (mean, std) in zip(rows, self.scales, strict=True)]
        return np.asarray(np.stack(scaled), np.float32)

    def combine(self, by_model: Float[np.ndarray, "models responses"]) -> Responses:
        """One reward per response: the models' mean, or their minimum."""
        return np.asarray(by_model.min(0) if self.rule == "min" else by_model.mean(0))

    def fit_scales(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> None:
        """Put several models on one scale; a single one is left as it is."""
        if len(self.scorers) > 1:  # a minimum over different offsets would follow one model alone
            rows = [score_texts(scorer, prompts, responses) for scorer in self.scorers]
            self.scales = [(float(row.mean()), float(row.std()) or 1.0) for row in rows]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One evaluation; an entry per held-out prompt."""

    rollouts: list[Rollout]
    rewards: Responses  # by the rule of the recipe: the proxy, which training raises
    lowest: Responses  # the minimum over the reward models
    kls: Responses
    lengths: NDArray[np.int64]
    ended: NDArray[np.bool_]
    independent: Responses | None  # by evaluation.reward_model
    gold: Responses | None

    def selection(self, kl_penalty: float) -> tuple[Measure, Responses]:
        """The measure that selects the best step, and its value for each prompt."""
        if self.gold is not None:
            return "gold", self.gold
        if self.independent is not None:
            return "independent", self.independent
        return "penalised", self.lowest - kl_penalty * self.kls

    def estimates(self) -> dict[str, Estimate]:
        """Means with intervals over prompts, of every reward there is."""
        measures = {"reward": self.rewards, "independent": self.independent, "gold": self.gold}
        return {
            name: clustered_bootstrap(values.astype(np.float64), proportion=False)
            for name, values in measures.items()
            if values is not None
        }


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
