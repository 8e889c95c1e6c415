"""A reward model in use: `RewardModel` scores responses, `ImplicitRewardModel` judges by a policy.

Both take a directory that stock transformers loads (hafrm's own exports or anybody's), lay a prompt out
once for all its responses, and give the numbers that a consumer of the directory gets. A directory
without a trained head is refused: a score from a fresh random head is worse than none.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hafrm.data.encoding import EncodedGroup, Encoder
from hafrm.data.groups import Group, Message
from hafrm.engine.model import HybridModel, sharing_obstacle, split_causal_lm
from hafrm.errors import DataError, ModelError
from hafrm.scoring.forward import Scores, run_forward

Prompt = str | Sequence[Mapping[str, str]]
"""A user's text, or chat messages up to and without the response."""
IMPLICIT_RULE = "implicit_reward.json"
MAX_TOKENS = 8192
"""Default token budget of one packed row."""


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
    return ImplicitRule(**json.loads(file.read_text()))


@dataclass(frozen=True)
class Best:
    """The best of several responses."""

    index: int
    response: str
    rewards: list[float]


class RewardModel:
    """A scalar reward model, ready to score.

    >>> rm = RewardModel.from_pretrained("run/model/reward")
    >>> rm.score("What is 2+2?", ["4", "5"])            # one reward each, float32
    >>> rm.compare("What is 2+2?", "4", "5")            # P(first is preferred)
    >>> rm.best_of("What is 2+2?", ["3", "4"]).response
    """

    def __init__(
        self, model: HybridModel, encoder: Encoder, *, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.model = model.eval()
        self.encoder = encoder
        self.max_tokens = max_tokens

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        max_length: int | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> Self:
        """Load a `...ForSequenceClassification` directory or hub id with one label.

        Inputs longer than `max_length` tokens (by default what the model can take) are refused by
        `score` and cut, and counted, by `score_groups`.

        Raises ModelError for more than one label, a missing or untrained head, or a head that is not
        linear.
        """
        loaded, info = _load(AutoModelForSequenceClassification, path, dtype)
        if loaded.config.num_labels != 1:
            raise ModelError(
                f"{path} has {loaded.config.num_labels} labels; a reward model has one. Export it with "
                "`hafrm export`, or set id2label to one entry if its head has one row"
            )
        if info["missing_keys"]:
            raise ModelError(
                f"{path} lacks weights for {sorted(info['missing_keys'])}: they would be random. Load a "
                "trained reward model directory (for a hafrm run: <run>/model/reward)"
            )
        head = getattr(loaded, "score", None)
        if not isinstance(head, nn.Linear):
            raise ModelError(
                f"{type(loaded).__name__} has no linear `score` head; hafrm reads rewards from one"
            )
        backbone = loaded.base_model
        model = HybridModel(backbone, reward_head=head, sharing=sharing_obstacle(backbone) is None)
        encoder = _encoder(path, backbone.config, max_length)
        return cls(model.to(device or _device()), encoder, max_tokens=max_tokens)

    def score(self, prompt: Prompt, responses: str | Sequence[str]) -> float | list[float]:
        """The reward of one response, or of each of several to the same prompt, laid out once.

        Raises DataError when prompt and response do not fit into the model's length.
        """
        single = isinstance(responses, str)
        several = [responses] if isinstance(responses, str) else list(responses)
        if not several:
            return []
        rewards = self._rewards(prompt, several)
        return rewards[0] if single else rewards

    def compare(self, prompt: Prompt, first: str, second: str) -> float:
        """P(first is preferred) = sigmoid(r_first - r_second), uncalibrated (Bradley-Terry)."""
        a, b = self._rewards(prompt, [first, second])
        return 1.0 / (1.0 + math.exp(min(700.0, b - a)))

    def best_of(self, prompt: Prompt, responses: Sequence[str]) -> Best:
        """The response with the highest reward; the first of equals."""
        if not responses:
            raise DataError("best_of needs one or more responses; got none")
        rewards = self._rewards(prompt, list(responses))
        index = int(np.argmax(rewards))
        return Best(index, responses[index], rewards)

    def _rewards(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        distinct = tuple(dict.fromkeys(responses))
        group = Group(id="request", prompt=as_messages(prompt), responses=distinct)
        encoded, report = self.encoder.encode([group])
        if report.prompts_cut or report.responses_cut or not encoded:
            raise DataError(
                f"prompt and response are longer than {self.encoder.lengths.max_length} tokens, which "
                "is what this model was loaded for; shorten them, or pass a larger max_length"
            )
        rewards = run_forward(self.model, encoded, max_tokens=self.max_tokens).rewards
        assert rewards is not None
        by_text = dict(zip(distinct, rewards.tolist(), strict=True))
        return [by_text[response] for response in responses]

    def score_groups(
        self, groups: Sequence[Group], done: Callable[[int], None] | None = None
    ) -> Scores:
        """Rewards of all responses of many groups, in their order; see `run_forward`."""
        encoded, _ = self.encoder.encode(groups)
        return run_forward(self.model, encoded, max_tokens=self.max_tokens, done=done)


class ImplicitRewardModel:
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
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self.policy, self.encoder = policy.eval(), encoder
        self.reference = None if reference is None else reference.eval()
        self.rule, self.max_tokens = rule, max_tokens

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        reference: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        max_length: int | None = None,
    ) -> Self:
        """Load a `...ForCausalLM` directory, and the reference that its config names or that is given.

        Raises ModelError when the reference cannot be found or has another vocabulary.
        """
        rule = read_implicit_rule(path)
        policy = _policy(path, dtype, device)
        config = policy.backbone.config
        name = reference or rule.reference
        frozen = None if name is None else _policy(name, dtype, device)
        if frozen is not None and frozen.backbone.config.vocab_size != config.vocab_size:
            raise ModelError(f"{path} and its reference {name} have different vocabularies")
        rule = replace(rule, reference=None if name is None else str(name))
        return cls(policy, _encoder(path, config, max_length), reference=frozen, rule=rule)

    def score_groups(
        self, groups: Sequence[Group], done: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """The implicit reward of every response of `groups`, in their order."""
        encoded, _ = self.encoder.encode(groups)
        return self.score_encoded(encoded, done)

    def score_encoded(
        self, encoded: Sequence[EncodedGroup], done: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """The implicit reward of every response of encoded groups, in their order."""
        scores = run_forward(self.policy, encoded, max_tokens=self.max_tokens, done=done)
        assert scores.logps is not None
        implicit: NDArray[Any] = scores.logps
        if self.reference is not None:
            frozen = run_forward(self.reference, encoded, max_tokens=self.max_tokens).logps
            assert frozen is not None
            implicit = implicit - frozen
        if self.rule.per_token:
            implicit = implicit / scores.lengths
        return (self.rule.beta * implicit).astype(np.float32)


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt in any accepted form as messages; raises DataError for anything else."""
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    try:
        return tuple(Message(str(m["role"]), str(m["content"])) for m in prompt)
    except (TypeError, KeyError) as error:
        raise DataError(
            "a prompt is a text or a list of {'role': ..., 'content': ...}; "
            f"got {json.dumps(prompt, default=repr)[:200]}"
        ) from error


def _load(auto: Any, path: str | Path, dtype: torch.dtype) -> tuple[Any, Mapping[str, Any]]:
    try:
        loaded, info = auto.from_pretrained(
            path, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"cannot load a model from {path}: {error}") from error
    return loaded, info


def _policy(path: str | Path, dtype: torch.dtype, device: str | torch.device | None) -> HybridModel:
    loaded, info = _load(AutoModelForCausalLM, path, dtype)
    if info["missing_keys"]:
        raise ModelError(f"{path} lacks weights for {sorted(info['missing_keys'])}")
    backbone, head = split_causal_lm(loaded)
    model = HybridModel(backbone, policy_head=head, sharing=sharing_obstacle(backbone) is None)
    return model.to(device or _device())


def _encoder(path: str | Path, config: Any, max_length: int | None) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(path)
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 2**20)
    return Encoder(tokenizer, max_length=max_length or longest, close=False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_reward_directory(path: str | Path) -> bool:
    """Whether the directory holds a sequence classifier, as opposed to a causal LM."""
    architectures = getattr(AutoConfig.from_pretrained(path), "architectures", None) or [""]
    return str(architectures[0]).endswith("ForSequenceClassification")
