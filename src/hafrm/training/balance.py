"""`alpha: auto`: the policy loss's weight from how hard each head pulls at the hidden states.

    ||alpha * g_policy|| = ratio * ||reward_weight * g_reward||

g is a loss's gradient by the hidden states that its head reads: the last token of each response for the
reward, each token before a response token for the log-probs. Backward passes by there anyway, so this costs
a norm of each and no pass of its own. Squares are summed over all tokens of a step and all ranks, and a
step's alpha follows from the steps before it, so neither packing nor ranks nor a resume can change it.
Nothing here waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hafrm.engine.model import Watch
from hafrm.training import parallel
from hafrm.training.methods import Method

HEADS: tuple[Literal["reward", "policy"], ...] = ("reward", "policy")
DECAY = 0.9
"""Share that the past keeps in the averages: alpha looks back about ten steps."""
MOST = 1000.0
"""How far alpha may go from where it started, up or down: one head may run out of gradient."""


@dataclass(frozen=True)
class Balance:
    """What is known of both heads' gradients before a step."""

    ratio: float
    start: float
    """alpha while nothing is known."""
    averages: Float[Tensor, " heads"]
    """Running averages of the squared norms, each loss times its weight but for alpha."""

    def alpha(self) -> Float[Tensor, ""]:
        """The weight of the policy loss in the next step."""
        reward, policy = self.averages.unbind()
        # Both averages grow up from 0 alike, so that the quotient needs no correction for that.
        alpha = (self.ratio * (reward / policy).sqrt()).nan_to_num(nan=self.start)
        return alpha.clamp(self.start / MOST, self.start * MOST)

    def after(self, squares: Float[Tensor, " heads"]) -> "Balance":
        """The balance once a step with these squared norms is done."""
        return replace(self, averages=DECAY * self.averages + (1 - DECAY) * squares)


def new_balance(
    method: Method, device: torch.device, averages: Sequence[float] = (0.0, 0.0)
) -> Balance | None:
    """The balance at a run's start, or with the `averages` of a checkpoint; None where alpha stays."""
    if method.gradient_ratio is None:
        return None
    return Balance(
        method.gradient_ratio,
        method.alpha,
        torch.tensor(averages, dtype=torch.float32, device=device),
    )


class Weighing:
    """One step's alpha, and what the step tells of the next one's; without a balance, nothing."""

    def __init__(self, balance: Balance | None, device: torch.device) -> None:
        self._balance = balance
        self.alpha = None if balance is None else balance.alpha()
        self._squares = {head: torch.zeros((), device=device) for head in HEADS}

    @property
    def watch(self) -> Watch | None:
        """What a forward shows the states that its heads read."""
        return None if self._balance is None else self._add_gradient

    def _add_gradient(
        self, head: Literal["reward", "policy"], states: Float[Tensor, "rows hidden"]
    ) -> None:
        def add(grad: Tensor) -> None:
            self._squares[head] += torch.linalg.vector_norm(grad, dtype=torch.float32).square()

        states.register_hook(add)

    def squares(self) -> Float[Tensor, " heads"]:
        """Squared norms of the step's gradients over all ranks, alpha taken out of the policy's."""
        assert self.alpha is not None
        total = parallel.add_up(torch.stack([self._squares[head] for head in HEADS]))
        # Every rank's loss was multiplied by their number, because gradients are averaged over them.
        reward, policy = (total / parallel.num_ranks() ** 2).unbind()
        return torch.stack([reward, policy / self.alpha.square()])

    def done(self) -> Balance | None:
        """The balance after the step, once all its micro-batches have run backward."""
        return None if self._balance is None else self._balance.after(self.squares())
