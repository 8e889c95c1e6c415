"""Policies that write candidates: a model directory on this machine, or a chat model behind an endpoint.

Both take prompts as messages and return text without the blanks around it. A prompt that a policy cannot
answer is refused in its place, and costs no other prompt its draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel

from hafrm.best_of_n.drawing import Draw, DrawRound
from hafrm.best_of_n.endpoint import Endpoint, Reply, require_some
from hafrm.data.chat_template import read_template
from hafrm.data.encoding import Encoder
from hafrm.data.values import Refusal
from hafrm.engine.sampling import Sampling, sample
from hafrm.errors import DataError, ModelError
from hafrm.preferences import Group, Message
from hafrm.scoring.loading import (
    AUTO,
    Placement,
    choose_dtype,
    find_heads,
    load_causal_lm,
    load_config,
    model_digest,
)

_NO_LIMIT = 2**20


class LocalPolicy:
    """A causal LM in a directory that stock transformers loads, asked through its chat template."""

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        encoder: Encoder,
        options: Sampling,
        *,
        positions: int | None = None,
        name: str = "",
        batch_size: int = 32,
    ) -> None:
        """`load` is called when the model is first needed; it takes up to `positions` tokens, and `name`
        distinguishes its weights from others."""
        self.encoder, self.options, self.positions = encoder, options, positions
        self.name, self.batch_size = name, batch_size
        self.end_of_turn = _end_of_turn(encoder)
        self._load = load
        self._model: PreTrainedModel | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        options: Sampling,
        *,
        chat_template: str | None = None,
        place: Placement = AUTO,
        batch_size: int = 32,
    ) -> "LocalPolicy":
        """A `...ForCausalLM` directory or hub id, or a run folder with a policy; `chat_template` (a name or
        a file) replaces its own.

        Raises ModelError for anything else, and for a tokenizer without a template.
        """
        policy = find_heads(path).policy
        if policy is None:
            raise ModelError(
                f"{path} is a reward model and cannot write; give --policy the directory of a causal LM"
            )
        encoder = _policy_encoder(policy, chat_template)
        text_config = load_config(policy).get_text_config()
        dtype = choose_dtype(policy, place.dtype, place.device)
        return cls(
            lambda: load_causal_lm(policy, dtype=dtype, device=place.device),
            encoder,
            options,
            positions=getattr(text_config, "max_position_embeddings", None),
            name=f"{model_digest(policy)} {encoder.cache_key} {dtype}",
            batch_size=batch_size,
        )

    def cache_key(self) -> dict[str, Any]:
        """Everything its responses depend on; a batch is drawn together, so its size is part of it."""
        return {"policy": self.name, **asdict(self.options), "batch_size": self.batch_size}

    def write(
        self, prompts: Sequence[Group], num: int, draw_round: DrawRound
    ) -> list[list[Draw] | Refusal]:
        """For each prompt `num` draws; a refusal where the template or the model's length forbids it."""
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        if self._model is None:
            self._model = self._load()
        seed = int(np.random.SeedSequence(draw_round).generate_state(1, np.uint64)[0] >> 1)
        responses = sample(
            self._model,
            [prompt for prompt in ids if not isinstance(prompt, Refusal)],
            num,
            self.options,
            eos=self.end_of_turn,
            pad=self.end_of_turn if self.encoder.pad_id is None else self.encoder.pad_id,
            seed=seed,
            batch_size=self.batch_size,
        )
        remaining = iter(responses)
        return [
            prompt
            if isinstance(prompt, Refusal)
            else [self._decode(response) for response in next(remaining)]
            for prompt in ids
        ]

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None

    def _prompt_ids(self, prompt: Group) -> list[int] | Refusal:
        try:
            (encoded,), _ = self.encoder.encode([replace(prompt, responses=("x",))])
        except DataError as error:
            return Refusal("not encodable", str(error))
        room = (self.positions or _NO_LIMIT) - self.options.max_new_tokens
        size = len(encoded.prompt_ids)
        if size > room:
            return Refusal(
                "too long", f"the prompt has {size} tokens, the policy has room for {room}"
            )
        ids: list[int] = encoded.prompt_ids.tolist()
        return ids

    def _decode(self, ids: list[int]) -> Draw:
        ended = bool(ids) and ids[-1] == self.end_of_turn
        text = self.encoder.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Draw(str(text).strip(), ended)


def _policy_encoder(path: str | Path, chat_template: str | None) -> Encoder:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer from {path}: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the policy {path} has no chat template, so it is unknown how prompts are put to it; give one "
            "(--set draw.chat_template=FILE, a Jinja template), or take a policy trained on chats"
        )
    return Encoder(tokenizer, max_length=_NO_LIMIT, close=False)


def _end_of_turn(encoder: Encoder) -> int:
    """The first special token behind a response: what an assistant's turn ends in, or else the EOS.

    Raises ModelError when there is neither.
    """
    example = Group("example", (Message("user", "x"),), ("x",))
    (encoded,), _ = encoder.encode([example])
    special = {i for i, token in encoder.tokenizer.added_tokens_decoder.items() if token.special}
    ends = [token for token in encoded.response_ids[0].tolist() if token in special]
    if not ends and encoder.eos_id is None:
        raise ModelError(
            "the policy's tokenizer has no EOS token and its chat template writes none after a response, "
            "so it could never end; set tokenizer.eos_token"
        )
    return int(ends[0] if ends else encoder.eos_id)


class EndpointPolicy:
    """A chat model behind an endpoint; several draws come from one request where it supports `n`."""

    def __init__(self, endpoint: Endpoint, options: Sampling) -> None:
        self.endpoint, self.options = endpoint, options
        self._supports_n = True

    def cache_key(self) -> dict[str, Any]:
        """Everything its responses depend on."""
        return {
            "policy": self.endpoint.options.url,
            "model": self.endpoint.model,
            **asdict(self.options),
            "request": dict(self.endpoint.options.request),
        }

    def write(
        self, prompts: Sequence[Group], num: int, draw_round: DrawRound
    ) -> list[list[Draw] | Refusal]:
        """For each prompt `num` draws; a refusal where the endpoint rejects it.

        Raises ServerError when it rejects every one, or cannot be used.
        """
        replies: list[Reply] = []
        if self._supports_n:
            replies = self._ask(prompts, num, draw_round)
            if num > 1 and all(reply.error is not None for reply in replies):
                self._supports_n = False  # some servers reject `n`
        if not self._supports_n:
            replies = self._ask(prompts, 1, draw_round)
        require_some(replies, self.endpoint.options.url)
        choices = [list(reply.choices) for reply in replies]
        for k in range(1, num):  # others answer once, whatever `n` says
            lacking = [i for i, c in enumerate(choices) if 0 < len(c) < num and len(c) <= k]
            if not lacking:
                break
            later = draw_round._replace(num_before=draw_round.num_before + k)
            more = self._ask([prompts[i] for i in lacking], 1, later)
            for i, reply in zip(lacking, more, strict=True):
                choices[i] += reply.choices
        return [
            Refusal("not encodable", reply.error)
            if reply.error is not None
            else [Draw(choice.text.strip(), choice.ended) for choice in answers[:num]]
            for reply, answers in zip(replies, choices, strict=True)
        ]

    def close(self) -> None:
        """Nothing to free."""

    def _ask(self, prompts: Sequence[Group], num: int, draw_round: DrawRound) -> list[Reply]:
        settings = {
            "temperature": self.options.temperature,
            "top_p": self.options.top_p,
            "max_tokens": self.options.max_new_tokens,
            "n": num if num > 1 else None,
        }
        conversations = [prompt.prompt for prompt in prompts]
        repetition = (draw_round.seed, draw_round.num_before)
        return self.endpoint.ask(conversations, settings, repetition=repetition)
