"""Policies that write candidates: a model directory on this machine, or a chat model behind an endpoint.

Both take prompts as messages and return stripped text. A prompt that a policy cannot answer is refused in
its place and costs no other prompt its draws.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel

from hafrm.best_of_n.endpoint import Choice, Endpoint, Reply, require_some
from hafrm.data.encoding import Encoder
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


class DrawRound(NamedTuple):
    """Which draws these are; the same round gives the same draws."""

    seed: int
    chunk: int
    num_before: int  # draws made for these prompts before


class LocalPolicy:
    """A causal LM in a directory that stock transformers loads, asked through its chat template."""

    def __init__(
        self, path: str | Path, options: Sampling, *, place: Placement = AUTO, batch_size: int = 32
    ) -> None:
        """`path` is a `...ForCausalLM` directory, a hub id, or a run folder with a policy.

        Raises ModelError for anything else, and for a tokenizer without a chat template.
        """
        directory = find_heads(path).policy
        if directory is None:
            raise ModelError(
                f"{path} is a reward model and cannot write; give --policy the directory of a causal LM"
            )
        self._directory, self._device = directory, place.device
        self.options, self.batch_size = options, batch_size
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if tokenizer.chat_template is None:
            raise ModelError(
                f"the policy {path} has no chat template, so it is unknown how it is asked; write one to "
                "its chat_template.jinja, or take a policy trained on chats"
            )
        self.encoder = Encoder(tokenizer, max_length=_NO_LIMIT, close=False)
        self.end_of_turn = _end_of_turn(self.encoder)
        self._dtype = choose_dtype(directory, place.dtype, place.device)
        text_config = load_config(directory).get_text_config()
        self._positions = getattr(text_config, "max_position_embeddings", None) or _NO_LIMIT
        self._model: PreTrainedModel | None = None  # loaded when something must be drawn

    def cache_key(self) -> dict[str, Any]:
        """Everything its responses depend on; a batch is drawn together, so its size is part of it."""
        return {
            "policy": f"{model_digest(self._directory)} {self.encoder.cache_key} {self._dtype}",
            **asdict(self.options),
            "batch_size": self.batch_size,
        }

    def write(self, prompts: Sequence[Group], num: int, draw_round: DrawRound) -> list[Reply]:
        """For each prompt `num` choices; an error where the template or the model's length forbids it."""
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        if self._model is None:
            self._model = load_causal_lm(self._directory, dtype=self._dtype, device=self._device)
        # torch takes seeds of 63 bits
        seed = int(np.random.SeedSequence(draw_round).generate_state(1, np.uint64)[0] >> 1)
        responses = sample(
            self._model,
            [prompt for prompt in ids if not isinstance(prompt, str)],
            num,
            self.options,
            eos=self.end_of_turn,
            pad=self.end_of_turn if self.encoder.pad_id is None else self.encoder.pad_id,
            seed=seed,
            batch_size=self.batch_size,
        )
        remaining = iter(responses)
        return [
            Reply((), prompt)
            if isinstance(prompt, str)
            else Reply(tuple(self._decode(response) for response in next(remaining)))
            for prompt in ids
        ]

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None

    def _prompt_ids(self, prompt: Group) -> list[int] | str:
        """The prompt up to the response, or why it cannot be answered."""
        try:
            # the encoder needs a response to find where the prompt ends
            (encoded,), _ = self.encoder.encode([replace(prompt, responses=("x",))])
        except DataError as error:
            return f"not encodable: {error}"
        room = self._positions - self.options.max_new_tokens
        ids: list[int] = encoded.prompt_ids.tolist()
        if len(ids) > room:
            return f"too long: the prompt has {len(ids)} tokens, the policy has room for {room}"
        return ids

    def _decode(self, ids: list[int]) -> Choice:
        ended = bool(ids) and ids[-1] == self.end_of_turn
        text = self.encoder.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Choice(str(text), refused=False, ended=ended)


def _end_of_turn(encoder: Encoder) -> int:
    """The first special token after a response: what an assistant's turn ends in, or else the EOS.

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
    """A chat model behind an endpoint."""

    def __init__(self, endpoint: Endpoint, options: Sampling) -> None:
        self.endpoint = endpoint
        self._settings = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new_tokens,
        }

    def cache_key(self) -> dict[str, Any]:
        """Everything its responses depend on."""
        return {"policy": self.endpoint.cache_key(self._settings)}

    def write(self, prompts: Sequence[Group], num: int, draw_round: DrawRound) -> list[Reply]:
        """For each prompt `num` choices, or why the endpoint rejects it.

        Raises ServerError when it rejects every prompt, or cannot be used.
        """
        conversations = [prompt.prompt for prompt in prompts]
        repetition = (draw_round.seed, draw_round.num_before)
        settings = {**self._settings, "n": num}
        first = self.endpoint.ask(conversations, settings, repetition=repetition)
        choices = [list(reply.choices) for reply in first]
        errors: dict[int, str] = {}
        # some servers reject n > 1, others answer once whatever n is: the rest is asked one by one
        for k in range(num):
            lacking = [i for i, c in enumerate(choices) if len(c) <= k and i not in errors]
            replies = self.endpoint.ask(
                [conversations[i] for i in lacking],
                self._settings,
                repetition=(draw_round.seed, draw_round.num_before + k),
            )
            for i, reply in zip(lacking, replies, strict=True):
                choices[i] += reply.choices
                if reply.error is not None:
                    errors[i] = f"not encodable: {reply.error}"
            if len(errors) == len(prompts):
                require_some(replies, self.endpoint.url)
        return [
            Reply((), errors[i]) if i in errors else Reply(tuple(answers[:num]))
            for i, answers in enumerate(choices)
        ]

    def close(self) -> None:
        """Nothing to free."""
