"""What a policy writes by itself on each of several prompts, ready to be judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hafrm.engine.sampling import Sampling, sample

SEED = 0
"""Of the draws; all policies are sampled alike."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation."""

    ids: tuple[int, ...]
    """Without EOS and pad."""
    ended: bool
    """Whether the policy wrote an EOS, as opposed to running into the limit."""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[NDArray[np.int32]],
    options: Sampling,
    *,
    eos: int,
    pad: int,
    done: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """One continuation of each prompt's ids, in their order; raises what `sample` raises."""
    plain = [prompt.tolist() for prompt in prompts]
    written = sample(model, plain, 1, options, eos=eos, pad=pad, seed=SEED, done=done)
    return [_read(ids, eos, pad) for (ids,) in written]


def _read(ids: list[int], eos: int, pad: int) -> Generation:
    """What stands before the EOS; a policy may write pad, which is nothing that it says."""
    ended = eos in ids
    kept = ids[: ids.index(eos)] if ended else ids
    return Generation(tuple(i for i in kept if i != pad), ended)
