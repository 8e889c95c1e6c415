"""The hidden states that rewards are read from, for the measurements of collapse and representation."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from hafrm.engine.layout import Branches, Layout
from hafrm.engine.model import HybridModel, hidden_size
from hafrm.preferences import TokenizedGroup
from hafrm.scoring.forward import PerResponse, run_sequences
from hafrm.scoring.reward_model import MAX_TOKENS, MAX_TOKENS_CPU


def last_states(
    model: HybridModel, groups: Sequence[Branches]
) -> Float[np.ndarray, "responses hidden"]:
    """The hidden state of every response's last token, float32, in the order of `groups`."""

    def run(layout: Layout) -> PerResponse:
        with torch.no_grad():
            return (model.last_states(layout.to(model.device)),)

    on_cpu = model.device.type == "cpu"
    sequences = run_sequences(
        run,
        groups,
        max_tokens=MAX_TOKENS_CPU if on_cpu else MAX_TOKENS,
        threads=torch.get_num_threads() if on_cpu else 1,
    )
    num = sum(len(group.response_ids) for group in groups)
    states = np.empty((num, hidden_size(model.backbone.config)), np.float32)
    for indices, (values,) in sequences:
        assert values is not None
        states[indices] = values.float().cpu().numpy()
    return states


def some_responses(
    groups: Sequence[TokenizedGroup], num: int, *, seed: int
) -> list[TokenizedGroup]:
    """At most `num` of all responses, drawn at random, with their prompts, in the order of the groups."""
    # only numbers of responses decide, so that models with different tokenizers get the same texts
    counts = [len(group.response_ids) for group in groups]
    is_drawn = np.zeros(sum(counts), bool)
    is_drawn[np.random.default_rng(seed).permutation(len(is_drawn))[:num]] = True
    parts = np.split(is_drawn, np.cumsum(counts)[:-1])
    return [
        replace(group, response_ids=tuple(group.response_ids[i] for i in np.flatnonzero(part)))
        for group, part in zip(groups, parts, strict=True)
        if part.any()
    ]
