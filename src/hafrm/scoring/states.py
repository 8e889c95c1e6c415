"""The hidden states that rewards are read from, of many responses: what diagnostics look into."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.engine.layout import Branches, Layout
from hafrm.engine.model import HybridModel
from hafrm.scoring.forward import PerResponse, run_rows
from hafrm.scoring.scorer import MAX_TOKENS, MAX_TOKENS_CPU


class SomeBranches(NamedTuple):
    """A prompt and some of the responses to it."""

    prompt_ids: NDArray[np.int32]
    response_ids: tuple[NDArray[np.int32], ...]


def last_states(
    model: HybridModel,
    groups: Sequence[Branches],
    *,
    done: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "responses hidden"]:
    """The last token's hidden state of every response of `groups`, float32, in their order.

    `done(responses, tokens)` hears of every finished row.
    """
    on_cpu = model.device.type == "cpu"
    states: NDArray[np.float32] | None = None
    num = sum(len(group.response_ids) for group in groups)

    def run(layout: Layout) -> PerResponse:
        with torch.no_grad():
            return (model.last_states(layout.to(model.device)),)

    rows = run_rows(
        run,
        groups,
        max_tokens=MAX_TOKENS_CPU if on_cpu else MAX_TOKENS,
        threads=torch.get_num_threads() if on_cpu else 1,
    )
    for where, tokens, (found,) in rows:
        assert found is not None
        if states is None:
            states = np.empty((num, found.shape[1]), np.float32)
        states[where] = found.cpu().numpy()
        if done is not None:
            done(len(where), tokens)
    return np.empty((0, 0), np.float32) if states is None else states


def some_responses(groups: Sequence[Branches], num: int, *, seed: int) -> list[SomeBranches]:
    """At most `num` of all responses, drawn at random, with their prompts, in the order of the groups.

    Which ones depends on the groups' numbers of responses and on the seed alone, so that models with
    different tokenizers are given the same texts.
    """
    counts = [len(group.response_ids) for group in groups]
    kept = np.zeros(sum(counts), bool)
    kept[np.random.default_rng(seed).permutation(len(kept))[:num]] = True
    parts = np.split(kept, np.cumsum(counts)[:-1])
    drawn = [
        SomeBranches(
            group.prompt_ids, tuple(group.response_ids[i] for i in np.flatnonzero(part).tolist())
        )
        for group, part in zip(groups, parts, strict=True)
    ]
    return [branches for branches in drawn if branches.response_ids]
