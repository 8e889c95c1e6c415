"""Responses of a causal LM to prompts, as token ids.

A model directory's own generation defaults (a top-k of 50, a repetition penalty) are never used. A model in
training is left unchanged: modes, cache, attention, random state.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from hafrm.engine.logprobs import chunk_rows, final_logits
from hafrm.engine.model import HybridModel, stock_attention
from hafrm.errors import ModelError
from hafrm.progress import OnProgress, no_progress


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int  # maximum tokens of a response, its end included
    temperature: float = 1.0  # divides the logits; 0: always the most likely token
    top_p: float = 1.0  # draw from the most likely tokens that together have this probability
    repetition_penalty: float = 1.0  # divides logits of tokens already there (arXiv 1909.05858)


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
    """For each prompt, `num` responses as ids, each up to the first of `ends` or to the length limit.

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
                # after the first end is padding
                end = next((k for k, token in enumerate(ids) if token in ends), len(ids))
                responses[i].append(ids[: end + 1])
            on_progress(start + len(batch), len(owners))
    return responses if copies == num else [own * num for own in responses]


Predicted = tuple[HybridModel, Float[Tensor, "tokens hidden"]]
"""A model, and its states that predict the tokens of a response."""


@torch.no_grad()
def sampled_ratios(
    policy: Predicted,
    reference: Predicted,
    prompt: Int[np.ndarray, " prompt"],
    response: Int[np.ndarray, " tokens"],
    options: Sampling,
) -> Float[Tensor, " tokens"]:
    """log q - log q_ref (nat, float32) of each token of a response that `sample` drew from the policy.

    q is the policy after penalty, temperature and top-p; q_ref is the reference after the same penalty and
    temperature; both are over the tokens that the policy could draw. Their mean estimates a KL: negative
    only by noise, and 0 for equal models. But log pi - log pi_ref of such draws has a mean below 0.
    """
    model, states = policy
    assert model.policy_head is not None
    device, at_once = states.device, chunk_rows(len(model.policy_head.weight), states.device.type)
    ids = torch.from_numpy(np.concatenate([prompt, response])).long().to(device)
    penalty = RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
    top_p = TopPLogitsWarper(options.top_p)
    parts = []
    for start in range(0, len(response), at_once):
        ends = len(prompt) + torch.arange(start, min(start + at_once, len(response)), device=device)
        # what precedes each token, filled up with the first id; a repeated id is penalised once
        before = torch.where(torch.arange(len(ids), device=device) < ends[:, None], ids, ids[0])
        own, other = (
            penalty(before, _untempered(m, hidden[start : start + at_once])) / options.temperature
            for m, hidden in (policy, reference)
        )
        out_of_reach = top_p(before, own).isinf()
        target = ids[ends][:, None]
        out_of_reach.scatter_(1, target, False)  # rounding may differ from the draw's
        log_q, log_ref = (
            z.masked_fill(out_of_reach, float("-inf")).log_softmax(-1).gather(1, target)[:, 0]
            for z in (own, other)
        )
        parts.append(log_q - log_ref)
    return torch.cat(parts)


def _untempered(
    model: HybridModel, hidden: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens vocab"]:
    head, transform = model.policy_head, replace(model.transform, temperature=1.0)
    assert head is not None
    return final_logits(hidden, head.weight, head.bias, transform)


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
    """Evaluation mode, stock attention and neutral generation defaults in a `with` block."""
    modes = [(module, module.training) for module in model.modules()]
    use_cache = getattr(model.config, "use_cache", None)
    defaults = model.generation_config
    # transformers fills whatever an explicit config leaves open from the model's own config
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
