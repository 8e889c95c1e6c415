"""`RewardModel` scores responses with a reward head, `PolicyModel` with a policy's implicit reward.

Both load a run folder or any directory that stock transformers loads, and give the same numbers as its
other consumers get.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

from hafrm.data.encoding import Encoder
from hafrm.data.files import RefusedError, show
from hafrm.data.parse import check_prompt, read_prompt
from hafrm.engine.model import HybridModel
from hafrm.errors import ConfigError, DataError, ModelError
from hafrm.preferences import Group, Message, TokenizedGroup
from hafrm.progress import OnProgress, no_progress
from hafrm.results import read_result
from hafrm.scoring.forward import Scores, run_forward
from hafrm.scoring.loading import head_directory, load_encoder, load_policy, load_reward

PromptLike = str | Sequence[Mapping[str, Any] | Message]
"""A user's text, or chat messages up to the response (without it)."""
IMPLICIT_RULE = "implicit_reward.json"
MAX_TOKENS = 2**15  # default of a packed sequence: a prompt of 8k tokens and its responses fit
MAX_TOKENS_CPU = 1024  # on a CPU, activations should stay in its caches (docs/scoring.md)


@dataclass(frozen=True)
class ImplicitRule:
    """How a policy scores a response; written into its directory, because its weights do not say."""

    reference: str | None  # path or hub id of the frozen starting checkpoint; None: log-prob alone
    beta: float = 1.0
    per_token: bool = False  # divide by the response's tokens
    logits: bool = False  # tokens' logits instead of log-probs
    revision: str | None = None  # of the reference on the hub


def read_implicit_rule(directory: str | Path) -> ImplicitRule:
    """The rule of an exported policy; without a file, the mean log-prob per token."""
    file = Path(directory) / IMPLICIT_RULE
    if file.is_file():
        return read_result(file, ImplicitRule)
    return ImplicitRule(reference=None, per_token=True)


@dataclass(frozen=True)
class Best:
    """The best of several responses."""

    index: int
    response: str
    rewards: list[float]


def forward_options(model: HybridModel, max_tokens: int | None = None) -> dict[str, Any]:
    """How many tokens a model scores at once, and in how many threads."""
    if model.device.type == "cpu":
        return {"max_tokens": max_tokens or MAX_TOKENS_CPU, "threads": torch.get_num_threads()}
    return {"max_tokens": max_tokens or MAX_TOKENS, "threads": 1}


class Scorer(ABC):
    """What every model that scores can do: `score`, `score_batch`, `probability`, `best_of`."""

    def __init__(
        self, model: HybridModel, encoder: Encoder, *, max_tokens: int | None = None
    ) -> None:
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise ConfigError(f"max_tokens must be a whole number above 0, got {max_tokens!r}")
        self.model, self.encoder = model.eval(), encoder
        self.forward: partial[Scores] = partial(run_forward, **forward_options(model, max_tokens))

    @abstractmethod
    def score_encoded(
        self, encoded: Sequence[TokenizedGroup], on_progress: OnProgress = no_progress
    ) -> NDArray[np.float32]:
        """The score of every response, in order; NumericsError for one that is not finite."""

    @overload
    def score(self, prompt: PromptLike, responses: str) -> float: ...  # type: ignore[overload-overlap]
    @overload
    def score(self, prompt: PromptLike, responses: Iterable[str]) -> list[float]: ...
    def score(self, prompt: PromptLike, responses: str | Iterable[str]) -> float | list[float]:
        """The score of one response, or of each of several responses to the same prompt; an empty response
        is a turn that ends at once. DataError for a prompt that is not a conversation, and for inputs that
        are longer than the model takes."""
        if isinstance(responses, str):
            return self.score_batch([prompt], [[responses]])[0][0]
        return self.score_batch([prompt], [responses])[0]

    def score_batch(
        self, prompts: Iterable[PromptLike], responses: Iterable[Iterable[str]]
    ) -> list[list[float]]:
        """For each i, the scores of `responses[i]`, the responses to `prompts[i]`."""
        return self.score_batch_cut(prompts, responses, may_cut=False)[0]

    def score_batch_cut(
        self,
        prompts: Iterable[PromptLike],
        responses: Iterable[Iterable[str]],
        may_cut: bool = True,
    ) -> tuple[list[list[Any]], int]:
        """Like `score_batch`, but inputs that are too long are cut; also returns how many prompts and
        responses were cut. A score is whatever `score_encoded` gives for a response."""
        prompts = _as_list(prompts, "prompts must be a list")
        lists = _as_list(responses, "responses must be a list of lists of texts")
        if len(prompts) != len(lists):
            raise DataError(
                f"score_batch got {len(prompts)} prompts and {len(lists)} lists of responses; give a list "
                "of responses for each prompt"
            )
        texts_of = []
        for i, texts in enumerate(lists):
            what = f"responses to prompt {i} must be a list of texts"
            texts_of.append(_as_list(texts, what))
            if not all(isinstance(text, str) for text in texts_of[-1]):
                raise DataError(f"{what}, got {show(texts_of[-1])}")
        groups = [
            Group(f"prompt {i}", as_messages(prompt), tuple(texts))
            for i, (prompt, texts) in enumerate(zip(prompts, texts_of, strict=True))
            if texts
        ]
        encoded, report = self.encoder.encode(groups)
        if report.refused:
            raise DataError(next(iter(report.refused.values())))
        num_cut = report.prompts_cut + report.responses_cut
        if (num_cut and not may_cut) or len(encoded) < len(groups):
            raise DataError(
                f"prompt and response are longer than {self.encoder.lengths.max_length} tokens: shorten "
                "them, or load the model with a larger max_length"
            )
        scores = iter(self.score_encoded(encoded).tolist())
        return [[next(scores) for _ in texts] for texts in texts_of], num_cut

    def probability(self, prompt: PromptLike, chosen: str, rejected: str) -> float:
        """P(chosen is preferred) = sigmoid(score difference), the Bradley-Terry model; not calibrated."""
        first, second = self.score(prompt, [chosen, rejected])
        return 1.0 / (1.0 + math.exp(min(700.0, second - first)))  # exp overflows above 709

    def best_of(self, prompt: PromptLike, responses: Iterable[str]) -> Best:
        """The response with the highest score; the first one if several are equally good."""
        responses = _as_list(responses, "best_of needs a list of responses")
        if not responses:
            raise DataError("best_of needs one or more responses; got none")
        rewards = self.score(prompt, responses)
        index = int(np.argmax(rewards))  # the first of equal ones
        return Best(index, responses[index], rewards)


class RewardModel(Scorer):
    """A reward model that gives each response a number.

    rm = RewardModel.from_pretrained("run")
    rm.score("What is 2+2?", ["4", "5"])            # one reward each, float32
    rm.probability("What is 2+2?", "4", "5")        # P(the first is preferred)
    rm.best_of("What is 2+2?", ["3", "4"]).response
    """

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        max_length: int | None = None,
        max_tokens: int | None = None,
        too_long: Literal["cut", "drop"] = "cut",
    ) -> "RewardModel":
        """Load a run folder, or the directory or hub id of a `...ForSequenceClassification`.

        `dtype` auto is the checkpoint's on a GPU, float32 on a CPU. `score` refuses inputs longer than
        `max_length`; `encoder.encode` cuts or drops them. Raises ModelError if it is not a reward model.
        """
        directory = head_directory(path, "reward")
        model = load_reward(directory, dtype=dtype, device=device)
        encoder = load_encoder(directory, model.backbone.config, max_length, too_long)
        return cls(model, encoder, max_tokens=max_tokens)

    def score_encoded(
        self, encoded: Sequence[TokenizedGroup], on_progress: OnProgress = no_progress
    ) -> NDArray[np.float32]:
        pad = self.model.backbone.config.get_text_config().pad_token_id
        groups = [_without_trailing_pad(group, pad) for group in encoded]
        scores = self.forward(self.model, groups, on_progress=on_progress)
        assert scores.rewards is not None
        return scores.rewards


class PolicyModel(Scorer):
    """The implicit reward of a policy: beta * (log pi - log pi_ref), DPO's reward (arXiv 2305.18290)."""

    def __init__(
        self,
        model: HybridModel,
        encoder: Encoder,
        reference: HybridModel | None,
        rule: ImplicitRule,
    ) -> None:
        super().__init__(model, encoder)
        self.reference = None if reference is None else reference.eval()
        self.rule = rule
        for part in (model, reference) if rule.logits else ():
            if part is not None:
                part.transform = replace(part.transform, normalised=False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        reference: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        max_length: int | None = None,
        too_long: Literal["cut", "drop"] = "cut",
    ) -> "PolicyModel":
        """Load a run folder or a `...ForCausalLM` directory; `reference` replaces the one in its rule."""
        directory = head_directory(path, "policy")
        rule = read_implicit_rule(directory)
        policy = load_policy(directory, dtype=dtype, device=device)
        name, frozen = reference or rule.reference, None
        if name is not None:
            revision = None if reference else rule.revision
            try:
                frozen = load_policy(name, dtype=dtype, device=device, revision=revision)
            except ModelError as error:
                raise ModelError(
                    f"{directory} needs its reference {name}, which cannot be loaded; pass "
                    f"reference= with its current path: {error}"
                ) from error
            size, other = (m.backbone.config.get_text_config().vocab_size for m in (policy, frozen))
            if size != other:
                raise ModelError(
                    f"{directory} has a vocabulary of {size} tokens, its reference {name} one of {other}; "
                    "give the checkpoint that the policy was trained from"
                )
        encoder = load_encoder(directory, policy.backbone.config, max_length, too_long)
        return cls(policy, encoder, frozen, rule)

    def score_encoded(
        self, encoded: Sequence[TokenizedGroup], on_progress: OnProgress = no_progress
    ) -> NDArray[np.float32]:
        implicit: Any = self.score_heads(encoded, on_progress).logps
        return np.asarray(implicit, np.float32)

    def score_heads(
        self,
        encoded: Sequence[TokenizedGroup],
        on_progress: OnProgress = no_progress,
        *,
        per_token: bool = False,
    ) -> Scores:
        """Implicit rewards instead of log-probs; if the model has a reward head, also rewards from the same
        forward. `per_token`: also each token's part; the parts sum to the implicit reward."""
        scores = self.forward(self.model, encoded, on_progress=on_progress, per_token=per_token)
        own: list[Any] = [scores.logps, *[scores.token_logps] * per_token]
        if self.reference is not None:
            start = self.forward(self.reference, encoded, per_token=per_token)
            own = [a - b for a, b in zip(own, (start.logps, start.token_logps), strict=False)]
        if self.rule.per_token:
            sizes = scores.lengths, np.repeat(scores.lengths, scores.lengths)
            own = [a / size for a, size in zip(own, sizes, strict=False)]
        implicit, *tokens = (np.asarray(self.rule.beta * values, np.float32) for values in own)
        return replace(scores, logps=implicit, token_logps=tokens[0] if tokens else None)


def _without_trailing_pad(group: TokenizedGroup, pad: int | None) -> TokenizedGroup:
    """The group with each response cut after its last token that is not pad, where the stock classifier
    reads the reward."""
    # only where pad is the EOS, as in some published models: transformers then reads before the EOS
    if pad is None or all(ids[-1] != pad for ids in group.response_ids):
        return group
    # -1 in front: index 0 for a response of pads alone
    shorter = tuple(
        ids[: np.flatnonzero(np.append(-1, ids) != pad)[-1]] for ids in group.response_ids
    )
    prompt = group.prompt_ids
    if all(len(ids) for ids in shorter):
        return replace(group, response_ids=shorter)
    # then the prompt's last token that is not pad is read, which we lay out with the responses
    last = int(np.flatnonzero(np.append(-1, prompt) != pad)[-1]) - 1
    if last < 1:
        raise DataError(f"group {group.id!r} is nothing but pad tokens and one other")
    moved = tuple(
        np.concatenate([prompt[last:], ids]) if len(ids) else prompt[last : last + 1]
        for ids in shorter
    )
    return replace(group, prompt_ids=prompt[:last], response_ids=moved)


def _as_list(values: Any, what: str) -> list[Any]:
    # a string would be scored letter by letter
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise DataError(f"{what}, got {show(values)}")
    return list(values)


def as_messages(prompt: PromptLike) -> tuple[Message, ...]:
    """A prompt as messages; DataError if it breaks the rules of preference files."""
    try:
        what = "a prompt must be a text or a list of messages"
        value = prompt if isinstance(prompt, str) else _as_list(prompt, what)
        messages = read_prompt(value, "prompt")
        if not messages:
            raise DataError("the prompt has no messages; give messages up to the response")
        check_prompt(messages)
    except RefusedError as error:
        raise DataError(f"the prompt cannot be used: {': '.join(error.refusal)}") from error
    return messages
