"""Hidden states of one layout: prompts laid out once, or every response as a padded row of its own.

The two ways give the same states under the same names; heads and losses need not know which one ran.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hafrm.engine.last_layer import READ_ROWS
from hafrm.engine.layout import Layout, unshare


class States(NamedTuple):
    """The last layer's output, and where heads read it; rows that were not asked for may be wrong."""

    hidden: Float[Tensor, "rows hidden"]
    predictor: Int[Tensor, " scored"]
    """Row whose state predicts each response token."""
    last: Int[Tensor, " responses"]
    """Row of each response's last token."""


class TokenOutputs(NamedTuple):
    """What one forward gives, per response token."""

    hidden: Float[Tensor, "scored hidden"]
    """The state that predicts the token."""
    logps: Float[Tensor, " scored"]
    """Its log-prob, float32, nat."""


def run_shared(backbone: PreTrainedModel, layout: Layout, read: Int[Tensor, " read"]) -> States:
    """One packed row through a backbone whose attention knows layouts; the rows `read` are right."""
    hidden = backbone(
        input_ids=layout.input_ids[None],
        position_ids=layout.position_ids[None],
        attention_mask=None,
        use_cache=False,
        branch_layout=layout,
        **{READ_ROWS: read},
    ).last_hidden_state[0]
    return States(hidden, layout.predictor, layout.last)


def run_plain(backbone: PreTrainedModel, layout: Layout) -> States:
    """Every response alone, right-padded, through the backbone's stock attention: the slow twin."""
    padded = unshare(layout)
    hidden = backbone(
        input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
    ).last_hidden_state.flatten(0, 1)
    return States(hidden, padded.predictor, padded.last)
