"""What responses are worth: one or several reward models, asked through text, joined by a rule.

All responses to a prompt are scored in one shared layout, whoever wrote them. A reward that is not finite
is an error, never a number. A new kind of reward model is one entry in KINDS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.errors import DataError, NumericsError
from hafrm.preferences import Group, Message
from hafrm.rlhf.rlhf_recipe import RewardSection, Rule
from hafrm.scoring.fused import FusedRewardModel
from hafrm.scoring.loading import find_heads
from hafrm.scoring.reward_model import PolicyModel, RewardModel, Scorer

Conversation = Sequence[Message]


def _reward_head(path: str) -> Scorer:
    return RewardModel.from_pretrained(find_heads(path).reward or path)


def _implicit(path: str) -> Scorer:
    return PolicyModel.from_pretrained(find_heads(path).policy or path)


KINDS: Mapping[str, Callable[[str], Scorer]] = {
    "reward": _reward_head,
    "implicit": _implicit,
    "fused": FusedRewardModel.from_pretrained,
}
"""How a run folder, exported directory or hub id becomes a scorer; the recipe's `Kind` lists the names."""


def load_scorer(path: str, kind: str = "auto") -> Scorer:
    """The reward model at a run folder, exported directory or hub id.

    `auto` takes the reward head where there is one, else the policy's implicit reward. Raises ModelError
    where the kind asked for is not there.
    """
    if kind == "auto":
        kind = "reward" if find_heads(path).reward is not None else "implicit"
    return KINDS[kind](path)


def score_texts(
    scorer: Scorer, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
) -> NDArray[np.float32]:
    """The reward of every response, prompt by prompt; equal responses to a prompt are run once.

    Raises DataError for a prompt that the reward model's template refuses, NumericsError for a reward
    that is not finite.
    """
    groups = [
        Group(id=str(i), prompt=tuple(prompt), responses=tuple(dict.fromkeys(texts)))
        for i, (prompt, texts) in enumerate(zip(prompts, responses, strict=True))
    ]
    encoded, report = scorer.encoder.encode(groups)
    num_long = max(report.prompts_cut, report.responses_cut, report.dropped)
    if num_long:
        longest = scorer.encoder.lengths.max_length
        raise DataError(
            f"{num_long} prompts (of {len(groups)}), or responses to them, do not fit into the {longest} "
            "tokens that the reward model takes: lower data.max_prompt_length or sampling.max_new_tokens"
        )
    rewards = scorer.score_encoded(encoded)
    found: list[np.float32] = []
    start = 0
    for group, texts in zip(groups, responses, strict=True):
        place = {text: start + k for k, text in enumerate(group.responses)}
        found += [rewards[place[text]] for text in texts]
        start += len(group.responses)
    return np.array(found, np.float32)


@dataclass(frozen=True)
class Scale:
    """Where one model's rewards of the start policy's responses lie, so that several can be joined."""

    mean: float = 0.0
    std: float = 1.0


def combine(
    rewards: Float[np.ndarray, "models responses"], rule: Rule, spread: float = 1.0
) -> Float[np.ndarray, " responses"]:
    """One reward per response: the models' mean, their min, or mean - spread * standard deviation."""
    if rule == "min":
        return np.asarray(rewards.min(0))
    mean = rewards.mean(0)
    return np.asarray(mean if rule == "mean" else mean - spread * rewards.std(0))


class Rewards:
    """The reward models of a run and the rule that joins them.

    Several models are first put on one scale, each by the mean and standard deviation of its rewards of
    the start policy's held-out responses: a minimum over different offsets would follow one model alone.
    """

    def __init__(self, scorers: Sequence[Scorer], section: RewardSection) -> None:
        self.scorers = list(scorers)
        self.rule, self.spread = section.rule, section.spread
        self.weights = np.array(section.weights or [1.0] * len(self.scorers), np.float32)
        self.scales = [Scale()] * len(self.scorers)

    @classmethod
    def load(cls, section: RewardSection) -> "Rewards":
        """The models that a recipe names."""
        kinds = section.kinds if len(section.kinds) > 1 else section.kinds * len(section.models)
        pairs = zip(section.models, kinds, strict=True)
        return cls([load_scorer(path, kind) for path, kind in pairs], section)

    def by_model(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> Float[np.ndarray, "models responses"]:
        """Every model's reward of every response: scaled, times the model's weight."""
        rows = [score_texts(scorer, prompts, responses) for scorer in self.scorers]
        for number, row in enumerate(rows):
            num_bad = int((~np.isfinite(row)).sum())
            if num_bad:
                raise NumericsError(
                    f"reward model {number} gives rewards that are not finite for {num_bad} of {len(row)} "
                    "responses; stopped before anything was learned from them"
                )
        scaled = [(row - s.mean) / s.std for row, s in zip(rows, self.scales, strict=True)]
        return np.asarray(np.stack(scaled) * self.weights[:, None], np.float32)

    def combine(
        self, by_model: Float[np.ndarray, "models responses"]
    ) -> Float[np.ndarray, " responses"]:
        """One reward per response, by the recipe's rule."""
        return combine(by_model, self.rule, self.spread)

    def fit_scales(
        self, prompts: Sequence[Conversation], responses: Sequence[Sequence[str]]
    ) -> None:
        """Put several models on one scale; a single one is left as it is."""
        if len(self.scorers) < 2:
            return
        rows = [score_texts(scorer, prompts, responses) for scorer in self.scorers]
        self.scales = [Scale(float(row.mean()), float(row.std()) or 1.0) for row in rows]
