"""What a policy writes by itself: sampled continuations of prompts, with transformers' own `generate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

BATCH = 32
"""Prompts of one call; the draws depend on it, so it is no option."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """1 is the policy itself; 0 takes the likeliest token."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation."""

    ids: tuple[int, ...]
    """Without EOS and pad."""
    ended: bool
    """Whether the policy wrote an EOS, as opposed to running into the limit."""


def generate(
    model: Any,
    prompts: Sequence[NDArray[np.int32]],
    sampling: Sampling,
    *,
    eos: int,
    pad: int,
    done: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """One continuation of each prompt's ids, in their order; the same call draws the same ones.

    Prompts of like length go together, padded on the left. The checkpoint's own generation settings are not
    used, so that all policies are sampled alike. `done(continuations, tokens)` hears of every batch.
    """
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
        **(
            {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
            if sampling.temperature > 0
            else {"do_sample": False}
        ),
    )
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Generation] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(sampling.seed)
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            ids, mask = _padded([prompts[i] for i in part], pad)
            written = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
            )[:, ids.shape[1] :].cpu()
            for i, row in zip(part, written, strict=True):
                found[i] = _cut(row.tolist(), eos, pad)
            if done is not None:
                done(len(part), written.numel())
    return [found[i] for i in range(len(prompts))]


def _padded(prompts: Sequence[NDArray[np.int32]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[prompts, longest] ids and mask, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _cut(ids: list[int], eos: int, pad: int) -> Generation:
    """What stands before the first EOS; a policy may write pad, which is nothing that it says."""
    ended = eos in ids
    kept = ids[: ids.index(eos)] if ended else ids
    return Generation(tuple(i for i in kept if i != pad), ended)
