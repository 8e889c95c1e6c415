"""The policy and its value head: both read the states of one packed forward."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hafrm.engine.layout import Layout
from hafrm.engine.logprobs import token_entropies
from hafrm.engine.model import HybridModel, hidden_size


class TokenValues(NamedTuple):
    """What one forward gives, per response token, float32."""

    logps: Float[Tensor, " scored"]
    """Log-prob of the token, nat."""
    values: Float[Tensor, " scored"]
    """Reward to come, judged before the token is written."""
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
