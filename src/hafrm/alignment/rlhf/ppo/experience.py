"""From responses to what PPO learns from: packed rows, old numbers per token, advantages.

Flat token arrays follow the responses in the order in which they were written, prompt by prompt; `Row`
says where the tokens of a packed row lie in them. Nothing here has a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from hafrm.alignment.rlhf.actor import Actor, Written
from hafrm.alignment.rlhf.ppo.policy import PolicyWithValue
from hafrm.alignment.rlhf.ppo.terms import (
    estimate_advantages,
    log_ratios,
    sums_by_response,
    token_rewards,
    whiten,
)
from hafrm.alignment.rlhf.recipe import AlgorithmSection
from hafrm.engine.layout import Layout, lay_out
from hafrm.scoring.forward import first_responses, plan_rows, split_into_pieces


class Row(NamedTuple):
    """One packed row, and which of the batch's tokens it holds."""

    layout: Layout
    tokens: Int[Tensor, " scored"]


def pack(
    written: Sequence[Written], chosen: NDArray[np.int64], max_tokens: int, device: torch.device
) -> list[Row]:
    """Packed rows of the responses to the chosen prompts, each of up to `max_tokens` tokens."""
    lengths = [len(ids) for each in written for ids in each.response_ids]
    starts = np.cumsum([0, *lengths])
    first = first_responses(written)
    groups = [written[i] for i in chosen]
    # The pieces count responses through the chosen prompts only.
    of_batch = np.concatenate([first[i] + np.arange(len(written[i].texts)) for i in chosen])
    pieces = split_into_pieces(groups, max_tokens)
    rows = []
    for plan in plan_rows(pieces, max_tokens):
        part = [pieces[i] for i in plan]
        responses = of_batch[np.concatenate([piece.where for piece in part])]
        tokens = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in responses])
        rows.append(Row(lay_out(part).to(device), torch.from_numpy(tokens).to(device)))
    return rows


@dataclass(frozen=True, eq=False)
class Measured:
    """Responses as the policy that wrote them sees them."""

    written: list[Written]
    lengths: Int[Tensor, " responses"]
    ended: Bool[Tensor, " responses"]
    logps: Float[Tensor, " tokens"]
    values: Float[Tensor, " tokens"]
    entropies: Float[Tensor, " tokens"]
    ratios: Float[Tensor, " tokens"]
    """log pi - log pi_ref."""

    @property
    def kls(self) -> Float[Tensor, " responses"]:
        """log pi - log pi_ref of each whole response, nat: their mean estimates KL(pi || pi_ref)."""
        return sums_by_response(self.ratios, self.lengths)


@torch.no_grad()
def measure(policy: PolicyWithValue, actor: Actor, written: list[Written]) -> Measured:
    """Old log-probs, values, entropies and the reference's log-probs of every response token."""
    device = policy.device
    lengths = torch.tensor([len(ids) for each in written for ids in each.response_ids])
    num = int(lengths.sum())
    logps, values, entropies, reference = (torch.zeros(num, device=device) for _ in range(4))
    rows = pack(written, np.arange(len(written)), actor.max_tokens, device)
    with actor.precision():
        for row in rows:
            seen = policy(row.layout, entropies=True)
            logps[row.tokens], values[row.tokens] = seen.logps, seen.values
            entropies[row.tokens] = seen.entropies
        with actor.reference.model() as start:
            for row in rows:
                reference[row.tokens] = start.tokens(row.layout).logps
    return Measured(
        written,
        lengths.to(device),
        torch.tensor([end for each in written for end in each.ended], device=device),
        logps,
        values,
        entropies,
        log_ratios(logps, reference),
    )


@dataclass(frozen=True, eq=False)
class Experience:
    """What the update learns from, per token."""

    written: list[Written]
    logps: Float[Tensor, " tokens"]
    values: Float[Tensor, " tokens"]
    advantages: Float[Tensor, " tokens"]
    """Whitened over the batch."""
    returns: Float[Tensor, " tokens"]


def to_experience(
    measured: Measured,
    scores: Float[Tensor, " responses"],
    algorithm: AlgorithmSection,
    kl_coefficient: float,
) -> Experience:
    """Scores and KL penalties as token rewards, and the advantages that follow from them."""
    rewards = token_rewards(scores, measured.ratios, measured.lengths, kl_coefficient)
    if algorithm.whiten_rewards:
        rewards = whiten(rewards, keep_mean=True)
    found = estimate_advantages(
        rewards, measured.values, measured.lengths, gamma=algorithm.gamma, lam=algorithm.lam
    )
    return Experience(
        measured.written,
        measured.logps,
        measured.values,
        whiten(found.advantages),
        found.returns,
    )
