"""One batch of PPO: measure the samples, estimate advantages, and take all updates.

A mini-batch's losses are sums divided by the number of tokens in the whole mini-batch, so packing and
accumulation never change the gradient. Token arrays follow the responses in the order of sampling.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hafrm.engine.layout import Layout
from hafrm.engine.logprobs import token_entropies
from hafrm.engine.model import HybridModel, hidden_size
from hafrm.errors import NumericsError
from hafrm.rlhf import ppo_terms
from hafrm.rlhf.actor import Actor, Packed, Rollout, pack
from hafrm.rlhf.ppo_terms import Tokens
from hafrm.rlhf.rlhf_recipe import AlgorithmSection
from hafrm.training import parallel

TokenValues = tuple[
    Float[Tensor, " scored"], Float[Tensor, " scored"], Float[Tensor, "scored hidden"]
]
"""Per response token: its log-prob (nat), its value (the expected return), the state that predicts both."""


class PolicyWithValue(nn.Module):
    """A policy with a linear value head without bias on its hidden states, in float32."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model
        head = nn.Linear(hidden_size(model.backbone.config), 1, bias=False)
        nn.init.zeros_(head.weight)  # the value loss moves the backbone only as the head learns
        self.value_head = head.to(model.device)

    def forward(self, layout: Layout) -> TokenValues:
        """Log-probs and values of all response tokens of the layout, in its order."""
        hidden, logps = self.model.tokens(layout)
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.value_head(hidden.float())
        return logps, values[:, 0], hidden


@dataclass(frozen=True, eq=False)
class Measured:
    """Measures of responses under the policy that wrote them."""

    rollouts: list[Rollout]
    lengths: Int[Tensor, " responses"]
    logps: Float[Tensor, " tokens"]
    values: Float[Tensor, " tokens"]
    entropies: Float[Tensor, " tokens"]  # of the distribution that each token was drawn from, nat
    ratios: Float[Tensor, " tokens"]
    """log pi - log pi_ref, nat, of the sampled distribution; its mean estimates KL(pi || pi_ref)."""

    @property
    def kls(self) -> Float[Tensor, " responses"]:
        """log pi - log pi_ref of each whole response, nat."""
        return ppo_terms.to_rows(self.ratios, self.lengths).sum(1)


@torch.no_grad()
def measure_rollouts(policy: PolicyWithValue, actor: Actor, rollouts: list[Rollout]) -> Measured:
    """Old log-probs, values, entropies and the reference's log-probs of every response token."""
    device, head = policy.model.device, policy.model.policy_head
    assert head is not None
    lengths = torch.tensor([len(ids) for r in rollouts for ids in r.response_ids])
    num = int(lengths.sum())
    logps, values, entropies, reference = (torch.zeros(num, device=device) for _ in range(4))
    sequences = pack(rollouts, np.arange(len(rollouts)), actor.max_tokens, device)
    with actor.precision():
        for layout, tokens in sequences:
            logps[tokens], values[tokens], hidden = policy(layout)
            entropies[tokens] = token_entropies(
                hidden, head.weight, bias=head.bias, transform=policy.model.transform
            )
        if actor.samples_policy:
            with actor.reference() as start:
                for layout, tokens in sequences:
                    reference[tokens] = start.tokens(layout).logps
            ratios = logps - reference
    if not actor.samples_policy:
        ratios = actor.sampled_ratios(rollouts)
    return Measured(rollouts, lengths.to(device), logps, values, entropies, ratios)


def advantages_of(
    measured: Measured,
    scores: Float[Tensor, " responses"],
    algorithm: AlgorithmSection,
    kl_coefficient: float,
) -> tuple[Tokens, Tokens]:
    """(whitened advantages, returns) that follow from scores and KL penalties."""
    rewards = ppo_terms.token_rewards(scores, measured.ratios, measured.lengths, kl_coefficient)
    advantages, returns = ppo_terms.estimate_advantages(
        rewards, measured.values, measured.lengths, gamma=algorithm.gamma, lam=algorithm.lam
    )
    return ppo_terms.whiten(advantages), returns


def update(  # noqa: PLR0913 - what is trained, on what, by which rules
    policy: PolicyWithValue,
    optimizer: torch.optim.Optimizer,
    batch: Measured,
    targets: tuple[Tokens, Tokens],
    algorithm: AlgorithmSection,
    actor: Actor,
    *,
    seed: tuple[int, int],
    max_grad_norm: float,
) -> dict[str, float]:
    """All updates of a batch, and their metrics, means over all tokens; `seed` orders the prompts.

    Raises NumericsError before an update whose loss or gradient is not finite.
    """
    order = np.random.default_rng(seed)
    sums = torch.zeros(4, device=policy.model.device)
    norms: list[float] = []
    for _ in range(algorithm.epochs):
        shuffled = order.permutation(len(batch.rollouts))
        for chosen in np.array_split(shuffled, algorithm.mini_batches):
            sequences = pack(batch.rollouts, np.sort(chosen), actor.max_tokens, policy.model.device)
            sums += _accumulate(policy, sequences, batch, targets, algorithm, actor)
            trained = [p for p in policy.parameters() if p.grad is not None]
            norms.append(float(parallel.clip(trained, max_grad_norm)))
            if not np.isfinite(norms[-1]) or not bool(torch.isfinite(sums).all()):
                names = [batch.rollouts[i].prompt.id for i in np.sort(chosen)]
                raise NumericsError(
                    f"a loss of PPO or its gradient (norm {norms[-1]}) is not finite; stopped before the "
                    f"update. Prompts in it: {', '.join(names[:8])}. Lower training.learning_rate, set "
                    "reward.clip, or set training.precision: fp32"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    tokens, policy_loss, value_loss, clipped = sums.tolist()
    return {
        "policy_loss": policy_loss / tokens,
        "value_loss": value_loss / tokens,
        "clip_fraction": clipped / tokens,
        "grad_norm": float(np.mean(norms)),  # before clipping
    }


def _accumulate(
    policy: PolicyWithValue,
    sequences: list[Packed],
    batch: Measured,
    targets: tuple[Tokens, Tokens],
    algorithm: AlgorithmSection,
    actor: Actor,
) -> Float[Tensor, " sums"]:
    """Compute the gradient of a mini-batch; returns sums of its tokens, both losses and clipped tokens."""
    num_tokens = sum(len(tokens) for _, tokens in sequences)
    sums = torch.zeros(4, device=policy.model.device)
    for layout, tokens in sequences:
        with actor.precision():
            logps, values, _ = policy(layout)
        old, clip = batch.logps[tokens], algorithm.clip
        advantages, returns = (target[tokens] for target in targets)
        policy_loss = ppo_terms.policy_losses(logps, old, advantages, clip).sum()
        old_values = batch.values[tokens]
        value_loss = ppo_terms.value_losses(values, old_values, returns, algorithm.value_clip).sum()
        # PPO, Eq. 9: L = L_clip + c L_value, as means over the tokens of the whole mini-batch
        ((policy_loss + algorithm.value_weight * value_loss) / num_tokens).backward()
        num = torch.tensor(float(len(tokens)), device=policy.model.device)
        clipped = ppo_terms.clipped_tokens(logps, old, clip)
        sums += torch.stack([num, policy_loss.detach(), value_loss.detach(), clipped])
    return sums
