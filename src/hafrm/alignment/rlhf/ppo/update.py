"""One batch of experience into updates: epochs, mini-batches, micro-batches, each gradient exact.

A mini-batch's losses are sums over its tokens, divided by the tokens of the whole mini-batch, so packing
and accumulation never change the gradient. A loss or gradient that is not finite stops the run before
the update.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hafrm.alignment.rlhf.actor import Actor
from hafrm.alignment.rlhf.ppo.experience import Experience, Row, pack
from hafrm.alignment.rlhf.ppo.policy import PolicyWithValue, TokenValues
from hafrm.alignment.rlhf.ppo.terms import (
    clipped_tokens,
    explained_variance,
    policy_losses,
    squared_log_ratios,
    value_losses,
)
from hafrm.alignment.rlhf.recipe import AlgorithmSection
from hafrm.errors import NumericsError
from hafrm.training import parallel


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """Means over all tokens of all updates of a batch."""

    policy_loss: float
    value_loss: float
    clip_fraction: float
    """Share of tokens whose ratio left 1 -+ clip."""
    update_kl: float
    """(log ratio)^2 / 2 per token, against the policy that wrote the responses."""
    explained_variance: float
    """Of the returns by the values before the first update; NaN where the returns are constant."""
    grad_norm: float
    """Before clipping, mean over updates."""


def update(  # noqa: PLR0913 - what is trained, on what, by which rules
    policy: PolicyWithValue,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    algorithm: AlgorithmSection,
    actor: Actor,
    *,
    seed: tuple[int, int],
    max_grad_norm: float,
) -> UpdateStats:
    """All updates of a batch; `seed` orders the prompts of each epoch.

    Raises NumericsError before an update whose loss or gradient is not finite.
    """
    order = np.random.default_rng(seed)
    sums = torch.zeros(len(_SUMS), device=policy.device)
    norms: list[float] = []
    for _ in range(algorithm.epochs):
        shuffled = order.permutation(len(experience.written))
        for chosen in np.array_split(shuffled, algorithm.mini_batches):
            rows = pack(experience.written, np.sort(chosen), actor.max_tokens, policy.device)
            sums += _accumulate(policy, rows, experience, algorithm, actor)
            trained = [p for p in policy.parameters() if p.grad is not None]
            norms.append(float(parallel.clip(trained, max_grad_norm)))
            if not np.isfinite(norms[-1]) or not bool(torch.isfinite(sums).all()):
                raise NumericsError(_message(experience, chosen, norms[-1]))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    tokens, policy_loss, value_loss, clipped, moved = sums.tolist()
    return UpdateStats(
        policy_loss / tokens,
        value_loss / tokens,
        clipped / tokens,
        moved / tokens,
        explained_variance(experience.values, experience.returns),
        float(np.mean(norms)),
    )


_SUMS = ("tokens", "policy_loss", "value_loss", "clipped", "moved")


def _accumulate(
    policy: PolicyWithValue,
    rows: list[Row],
    experience: Experience,
    algorithm: AlgorithmSection,
    actor: Actor,
) -> Float[Tensor, " sums"]:
    """The gradient of a whole mini-batch, row by row; its sums of `_SUMS`."""
    num_tokens = sum(len(row.tokens) for row in rows)
    sums = torch.zeros(len(_SUMS), device=policy.device)
    for row in rows:
        with actor.precision():
            seen = policy(row.layout)
        parts = losses_of(seen, row, experience, algorithm)
        # PPO, Eq. 9: L = L_clip + c L_value, here as means over the mini-batch's tokens.
        total = parts[0].sum() + algorithm.value_weight * parts[1].sum()
        (total / num_tokens).backward()
        old = experience.logps[row.tokens]
        sums += torch.stack(
            [
                torch.tensor(float(len(row.tokens)), device=policy.device),
                parts[0].detach().sum(),
                parts[1].detach().sum(),
                clipped_tokens(seen.logps, old, algorithm.clip),
                squared_log_ratios(seen.logps, old),
            ]
        )
    return sums


def losses_of(
    seen: TokenValues, row: Row, experience: Experience, algorithm: AlgorithmSection
) -> tuple[Float[Tensor, " scored"], Float[Tensor, " scored"]]:
    """Policy and value loss of every token of a row."""
    where = row.tokens
    return (
        policy_losses(
            seen.logps, experience.logps[where], experience.advantages[where], algorithm.clip
        ),
        value_losses(
            seen.values, experience.values[where], experience.returns[where], algorithm.value_clip
        ),
    )


def _message(experience: Experience, chosen: np.ndarray, norm: float) -> str:
    names = [experience.written[i].prompt.id for i in np.sort(chosen)]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    what = "loss" if np.isfinite(norm) else f"gradient ({norm})"
    return (
        f"the {what} of a PPO step is not finite; stopped before the update. Prompts in it: {shown}. "
        "Lower training.learning_rate, set reward.clip, or set training.precision: fp32"
    )
