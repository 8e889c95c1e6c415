"""A policy in RLHF: one set of weights that writes, is measured, and knows where it started.

The stock causal LM writes; the HybridModel around the same backbone and head gives log-probs of packed
rows. The reference is the frozen start: the same weights with their adapters switched off, or a copy.
What a policy wrote leaves as text, so that reward models may have other tokenizers.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel
from hafrm.engine.sampling import Sampling, sample
from hafrm.rlhf.prompts import Prompt
from hafrm.scoring.forward import Scores, run_forward


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt and the responses that a policy wrote to it; a layout takes it as it is."""

    prompt: Prompt
    response_ids: tuple[NDArray[np.int32], ...]
    """With their EOS where the policy ended by itself."""
    texts: tuple[str, ...]
    ended: tuple[bool, ...]

    @property
    def prompt_ids(self) -> NDArray[np.int32]:
        return self.prompt.ids


class Reference:
    """The frozen start policy."""

    def __init__(self, model: HybridModel, *, adapters: bool) -> None:
        """With `adapters` the start is `model` without them; else it is copied, as it is now."""
        self._adapters = adapters
        self._model = model if adapters else copy.deepcopy(model).requires_grad_(False).eval()

    @contextlib.contextmanager
    def model(self) -> Iterator[HybridModel]:
        """The start policy for a while; nothing else may run the policy meanwhile."""
        tuned = [part for part in self._model.modules() if isinstance(part, BaseTunerLayer)]
        try:
            for part in tuned if self._adapters else ():
                part.enable_adapters(False)
            yield self._model
        finally:
            for part in tuned if self._adapters else ():
                part.enable_adapters(True)


class Actor:
    """A policy and its reference, ready to write and to be measured."""

    def __init__(  # noqa: PLR0913 - two views of one model, its start, its tokenizer, two budgets
        self,
        causal: PreTrainedModel,
        model: HybridModel,
        reference: Reference,
        encoder: Encoder,
        *,
        sampling: Sampling,
        batch_size: int,
        max_tokens: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Log-probs of `model` and its reference become those at the sampling temperature."""
        self.causal, self.model, self.reference, self.encoder = causal, model, reference, encoder
        self.sampling, self.batch_size = sampling, batch_size
        self.max_tokens, self.autocast = max_tokens, autocast
        at_temperature = replace(model.transform, temperature=sampling.temperature)
        model.transform = at_temperature
        with reference.model() as start:
            start.transform = at_temperature

    def write(self, prompts: Sequence[Prompt], num: int, seed: int) -> list[Rollout]:
        """`num` responses to each prompt; the same weights, prompts and seed give the same ones."""
        with self.precision():
            drawn = sample(
                self.causal,
                [prompt.ids.tolist() for prompt in prompts],
                num,
                self.sampling,
                eos=self.encoder.eos_id,
                pad=self.encoder.pad_id,
                seed=seed,
                batch_size=self.batch_size,
            )
        return [self._written(*each) for each in zip(prompts, drawn, strict=True)]

    def _written(self, prompt: Prompt, responses: Sequence[Sequence[int]]) -> Rollout:
        eos = self.encoder.eos_id
        return Rollout(
            prompt,
            tuple(np.array(ids, np.int32) for ids in responses),
            tuple(self.text(ids) for ids in responses),
            tuple(ids[-1] == eos for ids in responses),
        )

    def text(self, ids: Sequence[int]) -> str:
        """What a reader sees of a response."""
        return response_text(self.encoder, ids)

    def logps(self, rollouts: Sequence[Rollout]) -> tuple[Scores, Scores]:
        """Log-prob sums of every response under the policy and under its reference."""
        policy = self._forward(self.model, rollouts)
        with self.reference.model() as start:
            return policy, self._forward(start, rollouts)

    def _forward(self, model: HybridModel, rollouts: Sequence[Rollout]) -> Scores:
        return run_forward(model, rollouts, max_tokens=self.max_tokens, autocast=self.autocast)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """Autocast as the run trains, or nothing."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, self.autocast)


def response_text(encoder: Encoder, ids: Sequence[int]) -> str:
    """A response as text: without its EOS; control tokens that the policy wrote stay visible."""
    own = [token for token in ids if token != encoder.eos_id]
    text = encoder.tokenizer.decode(
        own, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    # A template's blank before the answer is the response's first token, and no part of its text.
    return str(text).lstrip(" ")
