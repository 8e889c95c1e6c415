"""The types of preference data: messages, comparisons, groups of text and groups of token ids.

A preference pair is the smallest group. Packing, training, scoring and evaluation all work on groups.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Message(NamedTuple):
    """One turn of a conversation; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


class Votes(NamedTuple):
    """How many annotators preferred each side, and how many called it a tie."""

    chosen: int
    rejected: int
    tie: int = 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """`responses[chosen]` was preferred over `responses[rejected]`, or tied with it."""

    chosen: int
    rejected: int
    margin: float = 0.0  # in reward units: the Bradley-Terry loss asks for r_c - r_r > margin
    weight: float = 1.0  # factor on this comparison's losses
    tie: bool = False  # neither was preferred; kept for evaluation and not trained on
    votes: Votes | None = None

    @property
    def is_decided(self) -> bool:
        """Whether metrics count it: it is not a tie, and its weight is not 0."""
        return not self.tie and self.weight > 0


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt, its distinct responses, and the comparisons among them."""

    id: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()
    source: str = ""  # a file's stem or a data set's name; evaluation slices by it
    tags: dict[str, str] = field(default_factory=dict)  # further slices, such as subset or split


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedGroup:
    """A group as token ids; prompt_ids + response_ids[k] is the k-th conversation."""

    prompt_ids: NDArray[np.int32]
    response_ids: tuple[NDArray[np.int32], ...]  # each ends in the EOS that the reward is read at
    comparisons: tuple[Comparison, ...] = ()
    id: str = ""
    source: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens in a packed sequence: the prompt once and every response."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)


def prompt_key(prompt: Sequence[Message]) -> str:
    """Hexadecimal digest (16 digits) of a prompt; splits and leakage checks compare it."""
    text = json.dumps([[m.role, m.content] for m in prompt], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def num_comparisons(groups: Sequence[Group]) -> int:
    """Number of comparisons in all groups, ties included."""
    return sum(len(group.comparisons) for group in groups)
