"""One batch of PPO: measure what was sampled, estimate advantages, and take all updates.

A mini-batch's losses are sums over its tokens, divided by the tokens of the whole mini-batch, so packing
and accumulation never change the gradient. Flat token arrays follow the responses in the order in which
they were sampled, prompt by prompt. A loss or gradient that is not finite stops the run before the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from hafrm.engine.layout import Layout, lay_out
from hafrm.engine.logprobs import token_entropies
from hafrm.engine.model import HybridModel, hidden_size
from hafrm.errors import NumericsError
from hafrm.rlhf.actor import Actor, Rollout
from hafrm.rlhf.ppo_terms import (
    Advantages,
    clipped_tokens,
    estimate_advantages,
    explained_variance,
    log_ratios,
    policy_losses,
    squared_log_ratios,
    sums_by_response,
    token_rewards,
    value_losses,
    whiten,
)
from hafrm.rlhf.rlhf_recipe import AlgorithmSection
from hafrm.scoring.forward import first_responses, plan_sequences, share_prompts
from hafrm.training import parallel


class TokenValues(NamedTuple):
    """What one forward gives, per response token, float32."""

    logps: Float[Tensor, " scored"]  # log-prob of the token, nat
    values: Float[Tensor, " scored"]  # reward to come, judged before the token is sampled
    entropies: Float[Tensor, " scored"] | None
    """Of the distribution that the token was drawn from, nat; where it was asked for."""


class PolicyWithValue(nn.Module):
    """A policy with a linear value head without bias on its hidden states, in float32.

    The head starts at zero: the first advantages are returns as they are, and the value loss moves the
    backbone only as the head learns to see.
    """

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model
        head = nn.Linear(hidden_size(model.backbone.config), 1, bias=False)
        nn.init.zeros_(head.weight)
        self.value_head = head.to(model.device)

    def forward(self, layout: Layout, *, entropies: bool = False) -> TokenValues:
        """Log-probs and values of all response tokens of the layout, in its order."""
        hidden, logps = self.model.tokens(layout)
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.value_head(hidden.float())
        return TokenValues(logps, values[:, 0], self._entropies(hidden) if entropies else None)

    def _entropies(self, hidden: Float[Tensor, "scored hidden"]) -> Float[Tensor, " scored"]:
        head = self.model.policy_head
        assert head is not None
        return token_entropies(hidden, head.weight, bias=head.bias, transform=self.model.transform)

    @property
    def device(self) -> torch.device:
        return self.model.device


class PackedRollouts(NamedTuple):
    """One packed sequence, and which of the batch's tokens it holds."""

    layout: Layout
    tokens: Int[Tensor, " scored"]


def pack(
    rollouts: Sequence[Rollout], chosen: NDArray[np.int64], max_tokens: int, device: torch.device
) -> list[PackedRollouts]:
    """Packed sequences of the responses to the chosen prompts, each of up to `max_tokens` tokens."""
    lengths = [len(ids) for r in rollouts for ids in r.response_ids]
    starts = np.cumsum([0, *lengths])
    first = first_responses(rollouts)
    groups = [rollouts[i] for i in chosen]
    # indices of `shared` count the responses to the chosen prompts only
    of_batch = np.concatenate([first[i] + np.arange(len(rollouts[i].texts)) for i in chosen])
    shared = share_prompts(groups, max_tokens)
    sequences = []
    for plan in plan_sequences([item.group for item in shared], max_tokens):
        part = [shared[i].group for i in plan]
        responses = of_batch[np.concatenate([shared[i].indices for i in plan])]
        tokens = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in responses])
        layout = lay_out(part).to(device)
        sequences.append(PackedRollouts(layout, torch.from_numpy(tokens).to(device)))
    return sequences


@dataclass(frozen=True, eq=False)
class Measured:
    """Responses as the policy that wrote them sees them."""

    rollouts: list[Rollout]
    lengths: Int[Tensor, " responses"]
    ended: Bool[Tensor, " responses"]
    logps: Float[Tensor, " tokens"]
    values: Float[Tensor, " tokens"]
    entropies: Float[Tensor, " tokens"]
    ratios: Float[Tensor, " tokens"]  # log pi - log pi_ref

    @property
    def kls(self) -> Float[Tensor, " responses"]:
        """log pi - log pi_ref of each whole response, nat: their mean estimates KL(pi || pi_ref)."""
        return sums_by_response(self.ratios, self.lengths)


@torch.no_grad()
def measure_rollouts(policy: PolicyWithValue, actor: Actor, rollouts: list[Rollout]) -> Measured:
    """Old log-probs, values, entropies and the reference's log-probs of every response token."""
    device = policy.device
    lengths = torch.tensor([len(ids) for r in rollouts for ids in r.response_ids])
    num = int(lengths.sum())
    logps, values, entropies, reference = (torch.zeros(num, device=device) for _ in range(4))
    sequences = pack(rollouts, np.arange(len(rollouts)), actor.max_tokens, device)
    with actor.precision():
        for sequence in sequences:
            output = policy(sequence.layout, entropies=True)
            logps[sequence.tokens], values[sequence.tokens] = output.logps, output.values
            entropies[sequence.tokens] = output.entropies
        with actor.reference.model() as start:
            for sequence in sequences:
                reference[sequence.tokens] = start.tokens(sequence.layout).logps
    return Measured(
        rollouts,
        lengths.to(device),
        torch.tensor([end for r in rollouts for end in r.ended], device=device),
        logps,
        values,
        entropies,
        log_ratios(logps, reference),
    )


def advantages_of(
    measured: Measured,
    scores: Float[Tensor, " responses"],
    algorithm: AlgorithmSection,
    kl_coefficient: float,
) -> Advantages:
    """Whitened advantages and returns that follow from scores and KL penalties."""
    rewards = token_rewards(scores, measured.ratios, measured.lengths, kl_coefficient)
    advantages, returns = estimate_advantages(
        rewards, measured.values, measured.lengths, gamma=algorithm.gamma, lam=algorithm.lam
    )
    return Advantages(whiten(advantages), returns)


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """Means over all tokens of all updates of a batch."""

    policy_loss: float
    value_loss: float
    clip_fraction: float  # fraction of tokens whose ratio left 1 -+ clip
    update_kl: float  # (log ratio)^2 / 2 per token, against the policy that wrote the responses
    explained_variance: float
    """Of the returns by the values before the first update; NaN where the returns are constant."""
    grad_norm: float  # before clipping, mean over updates


def update(  # noqa: PLR0913 - what is trained, on what, by which rules
    policy: PolicyWithValue,
    optimizer: torch.optim.Optimizer,
    batch: Measured,
    targets: Advantages,
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
    sums = torch.zeros(5, device=policy.device)
    norms: list[float] = []
    for _ in range(algorithm.epochs):
        shuffled = order.permutation(len(batch.rollouts))
        for chosen in np.array_split(shuffled, algorithm.mini_batches):
            sequences = pack(batch.rollouts, np.sort(chosen), actor.max_tokens, policy.device)
            sums += _accumulate(policy, sequences, batch, targets, algorithm, actor)
            trained = [p for p in policy.parameters() if p.grad is not None]
            norms.append(float(parallel.clip(trained, max_grad_norm)))
            if not np.isfinite(norms[-1]) or not bool(torch.isfinite(sums).all()):
                names = [batch.rollouts[i].prompt.id for i in np.sort(chosen)]
                raise NumericsError(
                    f"a loss of PPO, or its gradient (norm {norms[-1]}), is not finite; stopped before the "
                    f"update. Prompts in it: {', '.join(names[:8])} ({len(names)} in all). Lower "
                    "training.learning_rate, set reward.clip, or set training.precision: fp32"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    tokens, policy_loss, value_loss, clipped, moved = sums.tolist()
    return UpdateStats(
        policy_loss / tokens,
        value_loss / tokens,
        clipped / tokens,
        moved / tokens,
        explained_variance(batch.values, targets.returns),
        float(np.mean(norms)),
    )


def _accumulate(
    policy: PolicyWithValue,
    sequences: list[PackedRollouts],
    batch: Measured,
    targets: Advantages,
    algorithm: AlgorithmSection,
    actor: Actor,
) -> Float[Tensor, " sums"]:
    """The gradient of a whole mini-batch; its (tokens, policy loss, value loss, clipped, moved), summed."""
    num_tokens = sum(len(sequence.tokens) for sequence in sequences)
    sums = torch.zeros(5, device=policy.device)
    for sequence in sequences:
        with actor.precision():
            output = policy(sequence.layout)
        where = sequence.tokens
        old = batch.logps[where]
        policy_loss = policy_losses(
            output.logps, old, targets.advantages[where], algorithm.clip
        ).sum()
        value_loss = value_losses(
            output.values, batch.values[where], targets.returns[where], algorithm.value_clip
        ).sum()
        # PPO, Eq. 9: L = L_clip + c L_value, as means over the tokens of the whole mini-batch
        ((policy_loss + algorithm.value_weight * value_loss) / num_tokens).backward()
        sums += torch.stack(
            [
                torch.tensor(float(len(where)), device=policy.device),
                policy_loss.detach(),
                value_loss.detach(),
                clipped_tokens(output.logps, old, algorithm.clip),
                squared_log_ratios(output.logps, old),
            ]
        )
    return sums
