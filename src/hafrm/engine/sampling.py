"""Responses of a causal LM to prompts, as token ids.

A model directory's own generation defaults (a top-k of 50, a repetition penalty) never enter. A model in
training is left as it was: modes, cache, attention, random state.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from hafrm.engine.model import stock_attention
from hafrm.errors import ModelError
from hafrm.progress import OnProgress, no_progress


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int  # tokens of a response at most, its end included
    temperature: float = 1.0  # divides the logits; 0: always the likeliest token
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    repetition_penalty: float = 1.0  # divides logits of tokens that are there (arXiv 1909.05858)


def sample(  # noqa: PLR0913 - what to draw, how, what ends and pads it, and how to run it
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num: int,
    options: Sampling,
    *,
    ends: Sequence[int],
    pad: int,
    seed: int,
    batch_size: int = 32,
    on_progress: OnProgress = no_progress,
) -> list[list[list[int]]]:
    """For each prompt `num` responses as ids, each up to the first of `ends`, or to the length limit.

    The same arguments give the same responses; another batch size gives others. `on_progress` counts
    responses. Raises ModelError when prompt and response exceed the model's length.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + options.max_new_tokens > limit:
        raise ModelError(
            f"a prompt of {longest} tokens and {options.max_new_tokens} new ones exceed the model's "
            f"{limit} positions; lower max_new_tokens or cut the prompts"
        )
    copies = num if options.temperature > 0 else min(num, 1)
    indices = [i for i in range(len(prompts)) for _ in range(copies)]
    owners = sorted(indices, key=lambda i: -len(prompts[i]))  # prompts of similar length in a batch
    how: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:  # top_k 0: transformers' own default is 50
        how = {"do_sample": True, "top_k": 0, "top_p": options.top_p}
        how["temperature"] = options.temperature
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad,
        repetition_penalty=options.repetition_penalty,
        use_cache=True,
        **how,
    )
    responses: list[list[list[int]]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    with _evaluating(model), torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(owners), batch_size):
            batch = owners[start : start + batch_size]
            written = _generate(model, [prompts[i] for i in batch], config)
            for i, ids in zip(batch, written, strict=True):
                # behind the first end is padding
                end = next((k for k, token in enumerate(ids) if token in ends), len(ids))
                responses[i].append(ids[: end + 1])
            on_progress(start + len(batch), len(owners))
    return responses if copies == num else [own * num for own in responses]


def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), int(config.pad_token_id))
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # padded on the left, so that all continue at one index
        ids[i, width - len(prompt) :] = torch.tensor([int(token) for token in prompt])
        mask[i, width - len(prompt) :] = 1
    generate: Any = model.generate  # typed as a tensor by torch's `__getattr__`
    output = generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
    )
    written: list[list[int]] = output[:, width:].tolist()
    return written


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, stock attention and neutral generation defaults for a while."""
    modes = [(module, module.training) for module in model.modules()]
    use_cache = getattr(model.config, "use_cache", None)
    defaults = model.generation_config
    # transformers fills whatever an explicit config leaves open from the model's own
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        backbone: Any = model.base_model
        with stock_attention(backbone):
            yield
    finally:
        model.generation_config = defaults
        if use_cache is not None:
            model.config.use_cache = use_cache
        for module, mode in modes:
            module.training = mode
