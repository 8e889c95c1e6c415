"""What responses are worth: the reward that trains a policy, and the held-out measures that judge it.

The reward model is asked through text, so it may have another tokenizer than the policy. A reward that is
not finite is an error, never a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.errors import DataError
from hafrm.evaluation.heads import EvaluationOptions, load_main_head
from hafrm.preferences import Group, Message
from hafrm.rlhf.actor import Rollout
from hafrm.scoring.reward_model import Scorer
from hafrm.statistics import Estimate, clustered_bootstrap

Responses = Float[np.ndarray, " responses"]
Measure = Literal["gold", "independent", "penalised"]
"""What selects a step: the gold reward, evaluation.reward_model's, or the reward minus a KL penalty."""
WINDOW = 4  # evaluations over which a fall of the held-out measure is looked for


def load_scorer(path: str) -> Scorer:
    """The reward model at a run folder, exported directory or hub id; of a policy, its implicit reward."""
    return load_main_head(path, EvaluationOptions())


def score_texts(
    scorer: Scorer, prompts: Sequence[Sequence[Message]], responses: Sequence[Sequence[str]]
) -> NDArray[np.float32]:
    """The reward of every response, prompt by prompt; equal responses to a prompt are run once.

    Raises DataError for a conversation that the reward model's template or length refuses, NumericsError
    for a reward that is not finite.
    """
    groups = [
        Group(id=str(i), prompt=tuple(prompt), responses=tuple(dict.fromkeys(texts)))
        for i, (prompt, texts) in enumerate(zip(prompts, responses, strict=True))
    ]
    encoded, report = scorer.encoder.encode(groups)
    num_long = max(report.prompts_cut, report.responses_cut)
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


def score_rollouts(scorer: Scorer, rollouts: Sequence[Rollout]) -> NDArray[np.float32]:
    """The reward of every response of a policy."""
    return score_texts(scorer, [r.prompt.messages for r in rollouts], [r.texts for r in rollouts])


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One evaluation; an entry per held-out prompt."""

    rollouts: list[Rollout]
    rewards: Responses  # the proxy, which training raises
    kls: Responses
    independent: Responses | None  # by evaluation.reward_model
    gold: Responses | None

    def selection(self, kl_penalty: float) -> tuple[Measure, Responses]:
        """The measure that selects the best step, and its value for each prompt."""
        if self.gold is not None:
            return "gold", self.gold
        if self.independent is not None:
            return "independent", self.independent
        return "penalised", self.rewards - kl_penalty * self.kls

    def estimates(self) -> dict[str, Estimate]:
        """Means with intervals over prompts, of every reward there is."""
        measures = {"reward": self.rewards, "independent": self.independent, "gold": self.gold}
        return {
            name: clustered_bootstrap(values.astype(np.float64), proportion=False)
            for name, values in measures.items()
            if values is not None
        }


def reward_hacking(history: Sequence[tuple[float, Sequence[float]]]) -> str | None:
    """Why to stop after the last of the evaluations (mean reward, other measure per prompt), or None.

    Reward hacking: over WINDOW evaluations the reward that is trained on has risen on held-out prompts, and
    a measure that is not trained on has fallen by more than two standard errors, prompt by prompt.
    """
    if len(history) < WINDOW:
        return None
    (reward_then, then), (reward_now, now) = history[-WINDOW], history[-1]
    change = np.array(now) - np.array(then)
    error = float(change.std(ddof=1)) / len(change) ** 0.5
    if reward_now <= reward_then or float(change.mean()) >= -2.0 * error:
        return None
    return (
        f"reward hacking: over {WINDOW} evaluations the held-out reward rose from {reward_then:.3f} to "
        f"{reward_now:.3f} while the measure that selects steps fell by {-change.mean():.3f} (standard "
        f"error {error:.3f}): raise algorithm.kl_coefficient, or take another reward model"
    )
