"""The terms of PPO for language models as pure functions; each equation is cited at its line.

Tokens of all responses are concatenated, and `lengths` says how many belong to each. Sources: PPO = arXiv
1707.06347, GAE = arXiv 1506.02438, FT = arXiv 1909.08593 (fine-tuning from preferences).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hafrm.rlhf.rlhf_recipe import RewardSection

Tokens = Float[Tensor, " tokens"]
Lengths = Int[Tensor, " responses"]
_TINY = 1e-8


def to_rows(flat: Tokens, lengths: Lengths) -> Float[Tensor, "responses time"]:
    """One row for each response, padded with zeros on the right."""
    filled = _filled(lengths)
    rows = flat.new_zeros(filled.shape)
    rows[filled] = flat
    return rows


def _filled(lengths: Lengths) -> Bool[Tensor, "responses time"]:
    return torch.arange(int(lengths.max()), device=lengths.device)[None, :] < lengths[:, None]


def token_rewards(
    scores: Float[Tensor, " responses"], ratios: Tokens, lengths: Lengths, kl_coefficient: float
) -> Tokens:
    """The reward of every token: -beta * log(pi / pi_ref), plus the score at the last token.

    FT, Eq. 2: R(x, y) = r(x, y) - beta log(pi(y | x) / rho(y | x)), spread over the tokens that cause it.
    """
    rewards = -kl_coefficient * ratios
    rewards[lengths.cumsum(0) - 1] += scores
    return rewards


def estimate_advantages(
    rewards: Tokens, values: Tokens, lengths: Lengths, *, gamma: float, lam: float
) -> tuple[Tokens, Tokens]:
    """(advantages, returns = advantages + values: the value head's targets); nothing follows a response.

    GAE, Eq. 16: A_t = sum_l (gamma lam)^l delta_{t+l}, with delta_t = r_t + gamma V_{t+1} - V_t.
    """
    r, v = to_rows(rewards, lengths), to_rows(values, lengths)
    # After a response's end, rewards and values are 0, hence deltas and advantages too: no mask is needed.
    following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], dim=1)
    deltas = r + gamma * following - v
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    flat = advantages[_filled(lengths)]
    return flat, flat + values


def whiten(values: Tokens) -> Tokens:
    """The values scaled to mean 0 and standard deviation 1, over all tokens of the batch."""
    mean = values.mean()
    # the unbiased variance, as in TRL's masked_whiten; a single token has none and becomes 0
    variance = values.var() if len(values) > 1 else torch.zeros_like(mean)
    return (values - mean) * torch.rsqrt(variance + _TINY)


def policy_losses(logps: Tokens, old_logps: Tokens, advantages: Tokens, clip: float) -> Tokens:
    """The negative clipped surrogate of every token.

    PPO, Eq. 7: L = -min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi(a | s) / pi_old(a | s).
    """
    ratios = (logps - old_logps).exp()
    clipped = ratios.clamp(1.0 - clip, 1.0 + clip)
    return torch.maximum(-advantages * ratios, -advantages * clipped)


def value_losses(values: Tokens, old_values: Tokens, returns: Tokens, clip: float) -> Tokens:
    """Half the squared error of every token's value; a move beyond `clip` from the old value gains nothing.

    L = max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2) / 2, as in OpenAI's baselines (ppo2) and
    TRL; PPO's Eq. 9 without clipping is clip = inf.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


@torch.no_grad()
def clipped_tokens(logps: Tokens, old_logps: Tokens, clip: float) -> Float[Tensor, ""]:
    """The number of tokens whose ratios lie outside 1 +- clip."""
    return (((logps - old_logps).exp() - 1.0).abs() > clip).float().sum()


def next_kl_coefficient(
    coefficient: float, kl: float, num_responses: int, target: float | None, horizon: int
) -> float:
    """The factor on the KL penalty after a batch with this mean KL per response (nat).

    A `target` of None keeps it. Else FT, Sec. 2.2: beta <- beta (1 + K e), e = clip(KL / target - 1, -0.2,
    0.2), with K = responses / horizon as in TRL.
    """
    if target is None:
        return coefficient
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * num_responses / horizon)


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of all rewards seen so far, updated batch by batch (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def including(self, values: Float[Tensor, " responses"]) -> "Moments":
        """The moments with a batch added."""
        num, batch = len(values), values.double()
        delta, total = float(batch.mean()) - self.mean, self.count + num
        squares = self.squares + float((batch - batch.mean()).square().sum())
        squares += delta**2 * self.count * num / total
        return Moments(total, self.mean + delta * num / total, squares)

    @property
    def std(self) -> float:
        """The unbiased standard deviation; 1 before there are two rewards, or if all are equal."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0


def scores_of(
    rewards: Float[Tensor, " responses"],
    ended: Bool[Tensor, " responses"],
    moments: Moments,
    section: RewardSection,
) -> Float[Tensor, " responses"]:
    """Rewards centred, scaled and clipped as the recipe says, given moments that include this batch; minus
    the penalty of responses that were cut before their EOS."""
    # order and meaning as in TRL's use_score_norm, use_score_scaling and score_clip
    scores = rewards - moments.mean if section.center else rewards
    scores = scores / moments.std if section.scale else scores
    if section.clip is not None:
        scores = scores.clamp(-section.clip, section.clip)
    return torch.where(ended, scores, scores - section.missing_eos_penalty)
