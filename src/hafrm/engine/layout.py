"""One packed sequence: where prompts, branches, predictions and last tokens lie.

A sequence holds groups one after another, each as its prompt followed by one branch per response, with
no padding; positions restart at the prompt's end for every branch:

    sequence:   [ P0 P1 P2 | a0 a1 a2 | b0 b1 ] [ Q0 Q1 | c0 | d0 d1 ]
    position:     0  1  2    3  4  5    3  4      0  1    2    2  3

Attention runs per segment, one per response: the queries of the first are the prompt and its branch, those
of the others only their branch; the keys are always prompt and branch. Axes: tokens of the sequence, keys
of all segments, scored = response tokens (each has a log-prob), responses = branches = segments.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

T = TypeVar("T")


@runtime_checkable
class Branches(Protocol):
    """What a layout needs from an encoded group: the prompt's ids and the ids of each response."""

    @property
    def prompt_ids(self) -> NDArray[np.int32]: ...
    @property
    def response_ids(self) -> Sequence[NDArray[np.int32]]: ...


@dataclass(frozen=True)
class Layout:
    """The index tensors of one packed sequence."""

    shape: tuple[tuple[int, tuple[int, ...]], ...]
    """(prompt length, branch lengths) of every group; host-side integers, so no step synchronises."""
    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    predictor: Int[Tensor, " scored"]  # index of the state that predicts each response token
    targets: Int[Tensor, " scored"]
    response_of: Int[Tensor, " scored"]
    last: Int[Tensor, " responses"]  # index of the last real token, where the reward is read
    lengths: Int[Tensor, " responses"]
    read: Int[Tensor, " read"]  # what a head may read: each prompt's last token, and all branches
    key_index: Int[Tensor, " keys"]  # of every segment's keys: a prompt appears once per branch
    cu_queries: Int[Tensor, " bounds"]
    cu_keys: Int[Tensor, " bounds"]
    # what attention builds once for all layers, such as masks by (queries, keys, window)
    masks: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False)

    def once(self, name: Hashable, build: Callable[[], T]) -> T:
        """What `build` returns, built once for all layers."""
        if name not in self.masks:
            self.masks[name] = build()
        cached: T = self.masks[name]
        return cached

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_responses(self) -> int:
        return len(self.last)

    @cached_property
    def query_lengths(self) -> list[int]:
        """The number of queries of each segment; they sum to the sequence's tokens."""
        return [
            length + (prompt if branch == 0 else 0)
            for prompt, branches in self.shape
            for branch, length in enumerate(branches)
        ]

    @cached_property
    def key_lengths(self) -> list[int]:
        return [prompt + length for prompt, branches in self.shape for length in branches]

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout on another device; asynchronous if the memory is pinned."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Layout":
        """The same layout with every tensor as `move` returns it, without the old device's masks."""
        moved: dict[str, Any] = {
            f.name: move(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, masks={}, **moved)


def lay_out(groups: Sequence[Branches]) -> Layout:
    """The layout of `groups` in one sequence, in their order; ValueError for one that cannot be scored."""
    parts: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
    start = num_responses = 0
    queries, keys = [0], [0]
    for group in groups:
        prompt = len(group.prompt_ids)  # not 0: its last token predicts each first response token
        if prompt == 0 or not group.response_ids or any(len(r) == 0 for r in group.response_ids):
            raise ValueError(
                "a group needs a prompt and one or more responses of at least one token; got "
                f"{prompt} prompt tokens and responses of {[len(r) for r in group.response_ids]}"
            )
        prompt_indices = np.arange(start, start + prompt)
        parts["input_ids"].append(np.asarray(group.prompt_ids, np.int64))
        parts["position_ids"].append(np.arange(prompt))
        parts["read"].append(prompt_indices[-1:])
        start += prompt
        for branch, response in enumerate(group.response_ids):
            ids = np.asarray(response, np.int64)
            indices = np.arange(start, start + len(ids))
            parts["input_ids"].append(ids)
            parts["position_ids"].append(np.arange(prompt, prompt + len(ids)))
            parts["predictor"].append(np.concatenate([prompt_indices[-1:], indices[:-1]]))
            parts["targets"].append(ids)
            parts["read"].append(indices)
            parts["response_of"].append(np.full(len(ids), num_responses))
            parts["key_index"].append(np.concatenate([prompt_indices, indices]))
            parts["last"].append(indices[-1:])
            parts["lengths"].append(np.array([len(ids)]))
            keys.append(prompt + len(ids))
            queries.append(len(ids) if branch else keys[-1])
            num_responses += 1
            start += len(ids)
    tensors: dict[str, Any] = {n: torch.from_numpy(np.concatenate(x)) for n, x in parts.items()}
    return Layout(
        shape=tuple((len(g.prompt_ids), tuple(len(r) for r in g.response_ids)) for g in groups),
        # int32, as the varlen kernels take bounds
        cu_queries=torch.from_numpy(np.cumsum(queries).astype(np.int32)),
        cu_keys=torch.from_numpy(np.cumsum(keys).astype(np.int32)),
        **tensors,
    )


@dataclass(frozen=True)
class Team:
    """Ranks that run each sequence together (Ulysses, arXiv 2309.14509): a rank has a part of the tokens,
    but in attention all tokens of a part of the heads. By default a single rank."""

    group: Any = None  # a ProcessGroup
    rank: int = 0
    size: int = 1

    def own(self, rows: Tensor) -> Tensor:
        """This rank's part of the rows."""
        return rows.tensor_split(self.size)[self.rank]

    def to_heads(
        self, x: Float[Tensor, "1 heads own dim"], layout: Layout
    ) -> Float[Tensor, "1 part tokens dim"]:
        heads = x.shape[1] // self.size
        shapes = [(heads, num, x.shape[3]) for num in self._tokens(layout)]
        return torch.cat(self._exchange(x[0].chunk(self.size), shapes), dim=1)[None]

    def to_tokens(
        self, x: Float[Tensor, "1 tokens part dim"], layout: Layout
    ) -> Float[Tensor, "1 own heads dim"]:
        tokens = self._tokens(layout)
        shape = (tokens[self.rank], *x.shape[2:])
        return torch.cat(self._exchange(x[0].split(tokens), [shape] * self.size), dim=1)[None]

    def gather(self, x: Float[Tensor, "own dim"], layout: Layout) -> Float[Tensor, "tokens dim"]:
        shapes = [(num, x.shape[1]) for num in self._tokens(layout)]
        return torch.cat(self._exchange([x] * self.size, shapes))

    def add_up(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""
        return torch.stack(self._exchange([x] * self.size, [x.shape] * self.size)).sum(0)

    def _tokens(self, layout: Layout) -> list[int]:
        return [len(part) for part in layout.input_ids.tensor_split(self.size)]

    def _exchange(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send one part to each rank; returns what every rank sends here, in these shapes."""
        sent, sizes = torch.cat([part.flatten() for part in parts]), [math.prod(s) for s in shapes]
        lengths = [part.numel() for part in parts]
        received = all_to_all_single_autograd(sent, sizes, lengths, self.group)
        return [x.view(*s) for x, s in zip(received.split(sizes), shapes, strict=True)]


@dataclass(frozen=True)
class PaddedLayout:
    """The same responses without sharing: one right-padded sequence each, as any consumer runs them."""

    input_ids: Int[Tensor, "responses length"]
    attention_mask: Int[Tensor, "responses length"]
    predictor: Int[Tensor, " scored"]  # as in Layout, into the flattened [responses * length]
    last: Int[Tensor, " responses"]


def unshare(layout: Layout, pad_id: int = 0) -> PaddedLayout:
    """Every response with its prompt, right-padded; causal models, even recurrent ones, see no pads."""
    device = layout.input_ids.device
    keys = torch.tensor(layout.key_lengths, device=device)
    offset = torch.arange(max(layout.key_lengths), device=device)
    mask = offset[None, :] < keys[:, None]
    ids = torch.full(mask.shape, pad_id, device=device)
    ids[mask] = layout.input_ids[layout.key_index]
    start = torch.arange(len(keys), device=device) * mask.shape[1]  # of each response, flattened
    predictor_start = start + keys - layout.lengths - 1
    first_scored = torch.cumsum(layout.lengths, 0) - layout.lengths
    scored = torch.arange(len(layout.targets), device=device)
    return PaddedLayout(
        input_ids=ids,
        attention_mask=mask.long(),
        predictor=(predictor_start - first_scored)[layout.response_of] + scored,
        last=start + keys - 1,
    )
