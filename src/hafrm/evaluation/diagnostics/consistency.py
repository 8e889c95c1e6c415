"""Does a reward model like what its own policy head writes? (the paper's Figure 3)

Every policy continues the same prompts, and reward models say whose continuation is better. That a model
prefers its own is near to a tautology: both heads were trained on one backbone and the same pairs, and
rewards follow length. So two controls stand beside each share: the same on pairs of like length, and what
reward models say that share nothing with the policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

from hafrm.evaluation.diagnostics.generations import Generation
from hafrm.evaluation.metrics import Result, mean
from hafrm.statistics import Estimate, accuracy_interval, clustered_bootstrap

LIKE_LENGTH = 1.25
"""Longer over shorter, in tokens, up to which two continuations are of like length."""


@dataclass(frozen=True, slots=True)
class PolicyText(Result):
    """What one policy wrote."""

    name: str
    mean_tokens: float
    ended: Estimate
    """Share that the policy ended itself; the others were cut at the limit and scored as cut."""


@dataclass(frozen=True, slots=True)
class Win(Result):
    """One policy against another in the eyes of one reward model."""

    judge: str
    policy: str
    against: str
    own: bool
    """The policy is the judge's own."""
    win: Estimate
    """Share of prompts on which the policy's continuation has the higher reward; equal rewards half."""
    length_matched: Estimate
    """The same where the two are of like length (LIKE_LENGTH)."""
    longer: Estimate
    """Share of prompts on which the policy's continuation is the longer one; equal lengths half."""


@dataclass(frozen=True, slots=True)
class Consistency(Result):
    """All policies in the eyes of all reward models."""

    num_prompts: int
    max_new_tokens: int
    """Of a continuation: at most half of what the models take."""
    temperature: float
    seed: int
    policies: tuple[PolicyText, ...]
    wins: tuple[Win, ...]
    examples: tuple[dict[str, str], ...]
    """A few prompts with what every policy wrote."""


def policy_text(name: str, written: Sequence[Generation]) -> PolicyText:
    """What one policy wrote, in numbers."""
    lengths = np.array([len(each.ids) for each in written])
    return PolicyText(name, mean(lengths), accuracy_interval(np.array([w.ended for w in written])))


def wins(
    judge: str,
    rewards: Mapping[str, Float[np.ndarray, " prompts"]],
    lengths: Mapping[str, Int[np.ndarray, " prompts"]],
) -> tuple[Win, ...]:
    """Every two policies in the eyes of `judge`, from each policy's rewards and lengths.

    The judge's own policy, which has its name, is put first.
    """
    names = sorted(rewards, key=lambda name: name != judge)
    found = []
    for policy, against in combinations(names, 2):
        mine, other = lengths[policy], lengths[against]
        like = np.maximum(mine, other) <= LIKE_LENGTH * np.minimum(mine, other)
        found.append(
            Win(
                judge=judge,
                policy=policy,
                against=against,
                own=policy == judge,
                win=share_higher(rewards[policy], rewards[against]),
                length_matched=share_higher(rewards[policy][like], rewards[against][like]),
                longer=share_higher(mine.astype(float), other.astype(float)),
            )
        )
    return tuple(found)


def share_higher(
    first: Float[np.ndarray, " prompts"], second: Float[np.ndarray, " prompts"]
) -> Estimate:
    """Share of prompts on which the first is higher, equal ones half; Wilson's interval without those."""
    if not np.any(first == second):
        return accuracy_interval(first > second)
    return clustered_bootstrap((first > second) + (first == second) / 2)
