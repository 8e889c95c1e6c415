"""A reward model in use: `RewardModel` scores responses, `ImplicitRewardModel` judges by a policy.

Both take a directory that stock transformers loads (hafrm's own exports or anybody's), lay a prompt out
once for all its responses, and give the numbers that a consumer of the directory gets. Both offer the
same verbs, so that one can stand in for the other.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

from hafrm.data.encoding import Encoder
from hafrm.data.parse import check_prompt, read_prompt
from hafrm.data.values import MAX_CHARS, RefusedError, check_text
from hafrm.engine.layout import Branches
from hafrm.engine.model import HybridModel
from hafrm.errors import DataError, ModelError
from hafrm.preferences import Group, Message, TokenizedGroup
from hafrm.scoring.forward import Scores, run_forward
from hafrm.scoring.loading import load_encoder, load_policy, load_reward
from hafrm.scoring.pooling import without_pad_at_the_end

Prompt = str | Sequence[Mapping[str, Any] | Message]
"""A user's text, or chat messages up to and without the response."""
IMPLICIT_RULE = "implicit_reward.json"
MAX_TOKENS = 2**15
"""Default token budget of one packed row: a prompt of 8k tokens and its responses fit into one."""
MAX_TOKENS_CPU = 1024
"""The same on a CPU, where a row's activations should stay in its caches (docs/scoring.md)."""


@dataclass(frozen=True)
class ImplicitRule:
    """How a policy scores a response; written beside it, because its weights do not say."""

    reference: str | None
    """Path or hub id of the frozen starting checkpoint; None: the log-prob alone."""
    beta: float = 1.0
    per_token: bool = False
    """Divide by the response's tokens."""


def write_implicit_rule(directory: Path, rule: ImplicitRule) -> None:
    """Leave the rule in an exported policy's directory."""
    (directory / IMPLICIT_RULE).write_text(json.dumps(asdict(rule), indent=1) + "\n")


def read_implicit_rule(directory: str | Path) -> ImplicitRule:
    """The rule of an exported policy; a foreign policy's is its mean log-prob per token."""
    file = Path(directory) / IMPLICIT_RULE
    if not file.is_file():
        return ImplicitRule(reference=None, per_token=True)
    try:
        return ImplicitRule(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file} is no rule of an implicit reward: {error}") from error


@dataclass(frozen=True)
class Best:
    """The best of several responses."""

    index: int
    response: str
    rewards: list[float]


class Scorer(ABC):
    """The verbs that follow from a score per response."""

    def __init__(self, model: HybridModel, encoder: Encoder, max_tokens: int | None) -> None:
        on_cpu = model.device.type == "cpu"
        self.encoder = encoder
        self.max_tokens = max_tokens or (MAX_TOKENS_CPU if on_cpu else MAX_TOKENS)
        self._threads = torch.get_num_threads() if on_cpu else 1

    @abstractmethod
    def score_encoded(
        self, encoded: Sequence[TokenizedGroup], done: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """The score of every response of encoded groups, in order; `done(responses, tokens)` hears of
        every finished row. Raises NumericsError for a score that is not finite."""

    def _run(
        self,
        model: HybridModel,
        groups: Sequence[Branches],
        done: Callable[[int, int], None] | None = None,
    ) -> Scores:
        return run_forward(
            model, groups, max_tokens=self.max_tokens, threads=self._threads, done=done
        )

    @overload
    def score(self, prompt: Prompt, responses: str) -> float: ...  # type: ignore[overload-overlap]
    @overload
    def score(self, prompt: Prompt, responses: Sequence[str]) -> list[float]: ...
    def score(self, prompt: Prompt, responses: str | Sequence[str]) -> float | list[float]:
        """The score of one response, or of each of several to the same prompt, laid out once.

        Raises DataError when prompt and response do not fit into the model's length, or are no
        conversation.
        """
        if isinstance(responses, str):
            return self._scores(prompt, [responses])[0]
        return self._scores(prompt, responses)

    def compare(self, prompt: Prompt, first: str, second: str) -> float:
        """P(first is preferred) = sigmoid(score_first - score_second), uncalibrated (Bradley-Terry)."""
        a, b = self._scores(prompt, [first, second])
        return 1.0 / (1.0 + math.exp(min(700.0, b - a)))

    def best_of(self, prompt: Prompt, responses: Sequence[str]) -> Best:
        """The response with the highest score; the first of equals."""
        if not responses:
            raise DataError("best_of needs one or more responses; got none")
        rewards = self._scores(prompt, responses)
        index = int(np.argmax(rewards))
        return Best(index, responses[index], rewards)

    def _scores(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        """One score each; a response given twice is run once."""
        distinct = tuple(dict.fromkeys(responses))
        group = Group(id="request", prompt=as_messages(prompt), responses=_checked(distinct))
        if not distinct:
            return []
        encoded, report = self.encoder.encode([group])
        if report.prompts_cut or report.responses_cut or not encoded:
            raise DataError(
                f"prompt and response are longer than {self.encoder.lengths.max_length} tokens, which "
                "is what this model was loaded for; shorten them, or load it with a larger max_length"
            )
        scores = dict(zip(distinct, self.score_encoded(encoded).tolist(), strict=True))
        return [scores[response] for response in responses]


class RewardModel(Scorer):
    """A scalar reward model, ready to score.

    >>> rm = RewardModel.from_pretrained("run/model/reward")
    >>> rm.score("What is 2+2?", ["4", "5"])            # one reward each, float32
    >>> rm.compare("What is 2+2?", "4", "5")            # P(first is preferred)
    >>> rm.best_of("What is 2+2?", ["3", "4"]).response
    """

    def __init__(
        self, model: HybridModel, encoder: Encoder, *, max_tokens: int | None = None
    ) -> None:
        super().__init__(model, encoder, max_tokens)
        self.model = model.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        max_length: int | None = None,
        max_tokens: int | None = None,
        too_long: Literal["cut", "drop"] = "cut",
    ) -> "RewardModel":
        """Load a `...ForSequenceClassification` directory or hub id with one label.

        `dtype` auto is the checkpoint's on a GPU, float32 on a CPU. Inputs longer than `max_length` (by
        default what the model can take) are refused by `score`; `encoder.encode` cuts or drops them, as
        `too_long` says. Rows hold up to `max_tokens` tokens (by default what suits the device).

        Raises ModelError for more than one label, a missing or untrained head, or one that is not linear.
        """
        model = load_reward(path, dtype=dtype, device=device)
        encoder = load_encoder(path, model.backbone.config, max_length, too_long)
        return cls(model, encoder, max_tokens=max_tokens)

    def score_encoded(
        self, encoded: Sequence[TokenizedGroup], done: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """The reward of every response of encoded groups, in their order.

        `done(responses, tokens)` hears of every finished row. Raises NumericsError for a reward that
        is not finite.
        """
        pad = self.model.backbone.config.get_text_config().pad_token_id
        groups = [without_pad_at_the_end(group, pad) for group in encoded]
        scores = self._run(self.model, groups, done)
        assert scores.rewards is not None
        return scores.rewards


class ImplicitRewardModel(Scorer):
    """A policy as judge: beta * (log pi - log pi_ref), what DPO scores with (arXiv 2305.18290).

    The directory's rule says whether there is a reference and whether it counts per token.
    """

    def __init__(
        self,
        policy: HybridModel,
        encoder: Encoder,
        *,
        reference: HybridModel | None,
        rule: ImplicitRule,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(policy, encoder, max_tokens)
        self.policy = policy.eval()
        self.reference = None if reference is None else reference.eval()
        self.rule = rule

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        reference: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        max_length: int | None = None,
    ) -> "ImplicitRewardModel":
        """Load a `...ForCausalLM` directory, and the reference that its rule names or that is given.

        Raises ModelError when the reference cannot be found or has another vocabulary.
        """
        rule = read_implicit_rule(path)
        policy = load_policy(path, dtype=dtype, device=device)
        name, frozen = reference or rule.reference, None
        if name is not None:
            try:
                frozen = load_policy(name, dtype=dtype, device=device)
            except ModelError as error:
                raise ModelError(
                    f"{path} is judged against its reference {name}, which cannot be used; say where "
                    f"the reference is now (--reference): {error}"
                ) from error
            sizes = [m.backbone.config.get_text_config().vocab_size for m in (policy, frozen)]
            if sizes[0] != sizes[1]:
                raise ModelError(
                    f"{path} has a vocabulary of {sizes[0]} tokens and its reference {name} one of "
                    f"{sizes[1]}: give the checkpoint that the policy was trained from"
                )
        rule = replace(rule, reference=None if name is None else str(name))
        encoder = load_encoder(path, policy.backbone.config, max_length)
        return cls(policy, encoder, reference=frozen, rule=rule)

    def score_encoded(
        self, encoded: Sequence[TokenizedGroup], done: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """The implicit reward of every response of encoded groups, in their order.

        `done(responses, tokens)` hears of every finished row. Raises NumericsError for a score that
        is not finite.
        """
        return self.judge(self._run(self.policy, encoded, done), encoded)

    def judge(self, scores: Scores, encoded: Sequence[TokenizedGroup]) -> NDArray[np.float32]:
        """The implicit rewards of the policy's log-probs of these groups."""
        assert scores.logps is not None
        implicit: NDArray[Any] = scores.logps
        if self.reference is not None:
            frozen = self._run(self.reference, encoded).logps
            assert frozen is not None
            implicit = implicit - frozen
        if self.rule.per_token:
            implicit = implicit / scores.lengths
        return (self.rule.beta * implicit).astype(np.float32)


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt in any accepted form as messages, by the rules that preference files follow.

    Raises DataError for anything else, and for a conversation that does not end before a response.
    """
    try:
        messages = read_prompt(prompt if isinstance(prompt, str) else list(prompt), "prompt")
        if not messages:
            raise DataError(
                "the prompt has no messages; give a text, or messages up to the response"
            )
        check_prompt(messages, MAX_CHARS)
    except RefusedError as error:
        raise DataError(f"the prompt cannot be used: {': '.join(error.refusal)}") from error
    return messages


def _checked(responses: tuple[str, ...]) -> tuple[str, ...]:
    try:
        for response in responses:
            check_text(response, "a response")
    except RefusedError as error:
        raise DataError(f"a response cannot be used: {': '.join(error.refusal)}") from error
    return responses
