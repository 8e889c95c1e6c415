"""Does a reward model prefer what its own policy head writes? (the paper's Figure 3)

Every policy continues the same prompts, and reward models say whose continuation is better. That a model
prefers its own is nearly a tautology: both heads were trained on one backbone and the same pairs, and
rewards follow length. So two controls are beside each fraction: the same on pairs of like length, and what
reward models say that share nothing with the policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

from hafrm.evaluation.metrics import mean
from hafrm.statistics import Estimate, accuracy_interval, clustered_bootstrap
from hafrm.table import Table, columns

LIKE_LENGTH = 1.25
"""Longer over shorter, in tokens, up to which two continuations are of like length."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a policy writes on one prompt."""

    text: str
    num_tokens: int
    """Without EOS and pad."""
    ended: bool
    """Whether the policy wrote an EOS, and did not run into the limit."""


@dataclass(frozen=True, slots=True)
class PolicyText:
    """What one policy wrote."""

    name: str
    mean_tokens: float
    ended: Estimate
    """Fraction that the policy ended itself; the others were cut at the limit and scored as cut."""


@dataclass(frozen=True, slots=True)
class RewardPreference:
    """One policy against another, by the rewards of one model."""

    reward_model: str
    policy: str
    against: str
    is_own: bool
    """Whether the policy is the reward model's own."""
    win: Estimate
    """Fraction of prompts on which the policy's continuation has the higher reward; equal rewards half."""
    length_matched: Estimate
    """The same for two of like length (LIKE_LENGTH)."""
    longer: Estimate
    """Fraction of prompts on which the policy's continuation is the longer one; equal lengths half."""


@dataclass(frozen=True, slots=True)
class OwnPolicyPreference:
    """All policies' continuations, scored by all reward models."""

    num_prompts: int
    max_new_tokens: int
    """Of a continuation: at most half of what the models take."""
    temperature: float
    seed: int
    policies: tuple[PolicyText, ...]
    preferences: tuple[RewardPreference, ...]
    examples: tuple[dict[str, str], ...]
    """A few prompts with what every policy wrote."""

    def tables(self) -> tuple[Table, Table]:
        """What the policies wrote, and whose continuations are preferred."""
        title = (
            f"continuations of {self.num_prompts} prompts, up to {self.max_new_tokens} tokens, "
            f"temperature {self.temperature:g}"
        )
        written = tuple((p.name, f"{p.mean_tokens:.1f}", p.ended) for p in self.policies)
        preferences = tuple(
            (
                p.reward_model,
                p.policy + (" (own)" if p.is_own else ""),
                p.against,
                p.win,
                p.length_matched,
                p.length_matched.num,
                p.longer,
            )
            for p in self.preferences
        )
        headings = columns(
            "reward model | policy | against | higher reward: percent | of like length: percent | "
            "such prompts: count | is longer: percent"
        )
        which = "whose continuation is preferred [95 %]; ties half"
        heads = columns("policy | mean tokens: general | ended by itself [95 %]: percent")
        return Table(title, heads, written), Table(which, headings, preferences)


def policy_text(name: str, written: Sequence[Continuation]) -> PolicyText:
    """What one policy wrote, in numbers."""
    ended = np.array([text.ended for text in written])
    return PolicyText(
        name, mean(np.array([t.num_tokens for t in written])), accuracy_interval(ended)
    )


def reward_preferences(
    reward_model: str,
    rewards: Mapping[str, Float[np.ndarray, " prompts"]],
    lengths: Mapping[str, Int[np.ndarray, " prompts"]],
) -> tuple[RewardPreference, ...]:
    """Every two policies by the rewards of one model, from each policy's rewards and lengths.

    The reward model's own policy, which has its name, is first.
    """
    # False sorts first; the others stay in their order
    names = sorted(rewards, key=lambda name: name != reward_model)
    result = []
    for policy, against in combinations(names, 2):
        own, other = lengths[policy], lengths[against]
        # rewards follow length, so the win on pairs of like length is the control
        like = np.maximum(own, other) <= LIKE_LENGTH * np.minimum(own, other)
        result.append(
            RewardPreference(
                reward_model=reward_model,
                policy=policy,
                against=against,
                is_own=policy == reward_model,
                win=fraction_higher(rewards[policy], rewards[against]),
                length_matched=fraction_higher(rewards[policy][like], rewards[against][like]),
                longer=fraction_higher(own.astype(float), other.astype(float)),
            )
        )
    return tuple(result)


def fraction_higher(
    first: Float[np.ndarray, " prompts"], second: Float[np.ndarray, " prompts"]
) -> Estimate:
    """Fraction of prompts on which the first is higher, equal ones half; Wilson's interval if none are."""
    # equal rewards count one half, which is no trial for Wilson's interval
    if not np.any(first == second):
        return accuracy_interval(first > second)
    return clustered_bootstrap((first > second) + (first == second) / 2)
