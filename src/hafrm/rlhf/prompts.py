"""The prompts of an RLHF run: read, encoded as the policy will see them, measured, split.

A prompt is never cut: half a question is another question. What is too long is left out and counted.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hafrm.data.encoding import Encoder
from hafrm.data.reader import read_preferences
from hafrm.data.splits import split_by_prompt, without_prompts
from hafrm.errors import DataError
from hafrm.preferences import Group, Message
from hafrm.rlhf.rlhf_recipe import PromptSection

log = logging.getLogger("hafrm")
_HELD_OUT_SEED = 2**33
"""Apart from the seeds of splits and of validation parts, so that none nests in another."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Messages up to the response, and their ids under the policy's template."""

    id: str
    messages: tuple[Message, ...]
    ids: NDArray[np.int32]


@dataclass(frozen=True)
class Prompts:
    """What a run answers, and what it is judged by."""

    train: list[Prompt]
    held_out: list[Prompt]
    counts: dict[str, int]


def load_prompts(
    data: PromptSection, encoder: Encoder, *, seed: int, bad_rows_file: Path | None = None
) -> Prompts:
    """Read, split by prompt, encode, and leave out what is too long.

    Raises DataError where nothing is left of a part, and for a long prompt where those are refused.
    """
    train: Sequence[Group] = read_prompts(data.train, data, bad_rows_file)
    if data.validation:
        held: Sequence[Group] = read_prompts(data.validation, data)
    else:
        train, held = split_by_prompt(
            train, fraction=data.validation_fraction, seed=_HELD_OUT_SEED + seed
        )
    kept = without_prompts(train, held)
    parts = {"data.train": kept, "data.validation": list(held)}
    fitting = {name: fit_prompts(part, encoder, data) for name, part in parts.items()}
    for name, prompts in fitting.items():
        if not prompts:
            raise DataError(
                f"{name} has no prompt of at most {data.max_prompt_length} tokens "
                f"({len(parts[name])} longer ones): raise data.max_prompt_length, or give other sources"
            )
    counts = {
        "train_prompts": len(fitting["data.train"]),
        "held_out_prompts": len(fitting["data.validation"]),
        "held_out_prompts_not_trained_on": len(train) - len(kept),
        "prompts_too_long": sum(len(parts[name]) - len(fitting[name]) for name in parts),
    }
    return Prompts(fitting["data.train"], fitting["data.validation"], counts)


def read_prompts(
    sources: Sequence[str], data: PromptSection, bad_rows_file: Path | None = None
) -> list[Group]:
    """The distinct prompts of sources, in their order, by the section's rules for bad rows."""
    reading = read_preferences(
        sources,
        max_bad_fraction=data.max_bad_fraction,
        bad_rows_file=bad_rows_file,
        need_responses=False,
    )
    distinct = {group.prompt: group for group in reversed(reading.groups)}
    return list(distinct.values())[::-1]


def fit_prompts(groups: Sequence[Group], encoder: Encoder, data: PromptSection) -> list[Prompt]:
    """The prompts that are not too long, in their order.

    Raises DataError for a long one where `data.too_long` is refuse.
    """
    prompts = encode_prompts(groups, encoder)
    long = [prompt for prompt in prompts if len(prompt.ids) > data.max_prompt_length]
    if long and data.too_long == "refuse":
        raise DataError(
            f"{len(long)} of {len(prompts)} prompts are longer than data.max_prompt_length "
            f"{data.max_prompt_length}, such as {long[0].id!r} with {len(long[0].ids)} tokens: raise it, "
            "remove them, or set data.too_long: drop"
        )
    if long:
        log.info("%d of %d prompts are too long and left out", len(long), len(prompts))
    return [prompt for prompt in prompts if len(prompt.ids) <= data.max_prompt_length]


def encode_prompts(groups: Sequence[Group], encoder: Encoder) -> list[Prompt]:
    """Every prompt's ids: what the policy's template writes up to the response."""
    # The encoder cuts prompt from response at the place where all responses begin.
    asked = [Group(id=g.id, prompt=g.prompt, responses=("a", "b")) for g in groups]
    encoded, _ = encoder.encode(asked)
    return [
        Prompt(group.id, group.prompt, each.prompt_ids)
        for group, each in zip(groups, encoded, strict=True)
    ]


def prompts_of_step(num_prompts: int, step: int, per_step: int, seed: int) -> NDArray[np.int64]:
    """Indices of a step's prompts: every prompt once per pass, each pass in an order of its own.

    A pure function, so that a resumed run asks what the uninterrupted one would have asked.
    """
    epochs, within = np.divmod(np.arange(step * per_step, (step + 1) * per_step), num_prompts)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(num_prompts)
        for epoch in np.unique(epochs).tolist()
    }
    return np.array([orders[e][i] for e, i in zip(epochs.tolist(), within, strict=True)], np.int64)
