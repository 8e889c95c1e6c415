"""The hidden states that rewards are read from, for the measurements of collapse and representation."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.engine.layout import Branches, Layout
from hafrm.engine.model import HybridModel
from hafrm.preferences import TokenizedGroup
from hafrm.scoring.forward import PerResponse, run_sequences
from hafrm.scoring.reward_model import MAX_TOKENS, MAX_TOKENS_CPU


def last_states(
    model: HybridModel, groups: Sequence[Branches], autocast: torch.dtype | None = None
) -> Float[np.ndarray, "responses hidden"]:
    """The hidden state of every response's last token, float32, in the order of `groups`."""
    on_cpu = model.device.type == "cpu"
    states: NDArray[np.float32] | None = None
    num = sum(len(group.response_ids) for group in groups)

    def run(layout: Layout) -> PerResponse:
        device, half = model.device, contextlib.nullcontext()
        with torch.no_grad(), half if autocast is None else torch.autocast(device.type, autocast):
            return (model.last_states(layout.to(device)),)

    sequences = run_sequences(
        run,
        groups,
        max_tokens=MAX_TOKENS_CPU if on_cpu else MAX_TOKENS,
        threads=torch.get_num_threads() if on_cpu else 1,
    )
    for indices, (values,) in sequences:
        assert values is not None
        if states is None:
            states = np.empty((num, values.shape[1]), np.float32)
        states[indices] = values.cpu().numpy()
    return np.empty((0, 0), np.float32) if states is None else states


def some_responses(
    groups: Sequence[TokenizedGroup], num: int, *, seed: int
) -> list[TokenizedGroup]:
    """At most `num` of all responses, drawn at random, with their prompts, in the order of the groups.

    The choice depends only on the groups' numbers of responses and the seed, so models with different
    tokenizers get the same texts.
    """
    counts = [len(group.response_ids) for group in groups]
    is_drawn = np.zeros(sum(counts), bool)
    is_drawn[np.random.default_rng(seed).permutation(len(is_drawn))[:num]] = True
    parts = np.split(is_drawn, np.cumsum(counts)[:-1])
    return [
        replace(group, response_ids=tuple(group.response_ids[i] for i in np.flatnonzero(part)))
        for group, part in zip(groups, parts, strict=True)
        if part.any()
    ]
