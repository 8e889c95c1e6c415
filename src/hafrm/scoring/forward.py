"""Run a model over many groups without gradients: rewards and log-probs of every response.

This is the only inference path. Groups with the same prompt ids share one layout; a group too large for a
packed sequence is split. The longest sequences run first, so memory peaks at the start.
"""

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hafrm.data.store import counts_of
from hafrm.engine.layout import Branches, Layout, lay_out
from hafrm.engine.model import HybridModel, Outputs
from hafrm.errors import MemoryBudgetError, NumericsError
from hafrm.preferences import TokenizedGroup
from hafrm.progress import OnProgress, no_progress

log = logging.getLogger("hafrm")

_WINDOW = 512  # groups packed at a time: first fit over all of them would take quadratic time
_OUT_OF_MEMORY = (  # as other error types: a CPU's, and those of CUDA and its libraries
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_Response = tuple[int, NDArray[np.int32]]  # its index among all responses, and its ids
PerResponse = tuple[Tensor | None, ...]  # what a forward returns; `Outputs` is one


@dataclass(frozen=True)
class Scores:
    """Per response, in the order of the groups; None for a head that the model lacks."""

    rewards: NDArray[np.float32] | None
    logps: NDArray[np.float32] | None
    lengths: NDArray[np.int64]  # tokens of each response, EOS included
    first: NDArray[np.int64]  # index of each group's first response
    token_logps: NDArray[np.float32] | None = None  # of all responses' tokens, if requested


class IndexedGroup(NamedTuple):
    """A prompt with some of its responses."""

    group: TokenizedGroup
    indices: list[int]  # of its responses among all responses


_Run = Callable[[list[IndexedGroup]], PerResponse]


def first_responses(groups: Sequence[Branches]) -> NDArray[np.int64]:
    """Index of each group's first response among the responses of all groups."""
    counts = counts_of(groups, "responses")
    return np.cumsum(counts) - counts


def run_forward(  # noqa: PLR0913
    model: HybridModel,
    groups: Sequence[Branches],
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
    threads: int = 1,
    on_progress: OnProgress = no_progress,
    part: tuple[int, int] = (0, 1),
    per_token: bool = False,
) -> Scores:
    """Scores of all responses, in order, from packed sequences of up to `max_tokens` tokens, `threads` at
    a time; NumericsError for a score that is not finite. Equal responses to equal prompts run once.
    `on_progress` counts responses.

    `part` = (i, n) runs every n-th sequence, leaves the other scores at 0, and checks none.
    """
    lengths = np.array([len(ids) for group in groups for ids in group.response_ids], np.int64)
    distinct, copy_of, num_copies = _drop_copies(groups)
    rewards, logps = (np.zeros(len(num_copies), np.float32) for _ in range(2))
    tokens: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(num_copies)

    def run(layout: Layout) -> Outputs:
        half = torch.autocast(model.device.type, autocast) if autocast else nullcontext()
        with torch.no_grad(), half:
            outputs: Outputs = model(layout.to(model.device))
        return outputs

    # Each rank of a sharded model must run the same number of forwards.
    halve = not isinstance(model, FSDPModule)
    num_done = 0
    for indices, outputs in run_sequences(
        run, distinct, max_tokens=max_tokens, threads=threads, part=part, halve=halve
    ):
        for values, output in ((rewards, outputs[0]), (logps, outputs[1])):
            if output is not None:
                values[indices] = output.float().cpu().numpy()
        if per_token and outputs[4] is not None:
            assert outputs[2] is not None
            for i, own in zip(indices, outputs[4].split(outputs[2].tolist()), strict=True):
                tokens[i] = own.float().cpu().numpy()
        num_done += int(num_copies[indices].sum())
        # the other parts have made about the same progress
        on_progress(min(num_done * part[1], len(lengths) - 1), len(lengths))
    on_progress(len(lengths), len(lengths))
    scores = Scores(
        rewards=None if model.reward_head is None else rewards[copy_of],
        logps=None if model.policy_head is None else logps[copy_of],
        lengths=lengths,
        first=first_responses(groups),
        token_logps=_concatenate([tokens[i] for i in copy_of]) if per_token else None,
    )
    if part == (0, 1):
        check_finite(scores)
    return scores


def _concatenate(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, np.float32), *parts])  # there may be none


def _drop_copies(
    groups: Sequence[Branches],
) -> tuple[Sequence[Branches], NDArray[np.int64], NDArray[np.int64]]:
    """(the groups without repeated responses to the same prompt, compared by ids; each response's index
    among the distinct ones; how often each of these occurs)."""
    number: dict[tuple[bytes, bytes], int] = {}
    distinct, copy_of = list[Branches](), list[int]()
    for group in groups:
        prompt, own = np.asarray(group.prompt_ids, np.int32).tobytes(), []
        for ids in group.response_ids:
            key, num_before = (prompt, np.asarray(ids, np.int32).tobytes()), len(number)
            copy_of.append(number.setdefault(key, num_before))
            own += [ids] if len(number) > num_before else []
        distinct += [TokenizedGroup(group.prompt_ids, tuple(own))] if own else []
    return distinct, np.array(copy_of, np.int64), np.bincount(np.array(copy_of, np.int64))


def run_sequences(
    run: Callable[[Layout], PerResponse],
    groups: Sequence[Branches],
    *,
    max_tokens: int,
    threads: int = 1,
    part: tuple[int, int] = (0, 1),
    halve: bool = True,
) -> Iterator[tuple[NDArray[np.int64], PerResponse]]:
    """(indices of responses, what `run` returns for them) of every packed sequence, or of a `part` of them;
    MemoryBudgetError if a single response (without `halve`: a sequence) does not fit."""
    shared = share_prompts(groups, max_tokens)
    plan = plan_sequences([item.group for item in shared], max_tokens)
    sequences = [[shared[i] for i in members] for members in plan]
    index, num_parts = part
    mine = sequences[index::num_parts]
    # All ranks must run the same number of forwards, because each one gathers shards: a rank that has one
    # sequence fewer runs the shortest group again and drops the result.
    is_short = len(mine) < -(-len(sequences) // num_parts)
    filler = [[min(shared, key=lambda item: item.group.num_tokens)]] if is_short else []
    outputs = iter(_map(lambda s: _run_or_halve(run, s, halve), [*mine, *filler], threads))
    for sequence in mine:
        indices = np.concatenate([np.asarray(item.indices, np.int64) for item in sequence])
        yield indices, next(outputs)
    deque(outputs, maxlen=0)  # the extra forward must run too


def _run_or_halve(
    run: Callable[[Layout], PerResponse], sequence: list[IndexedGroup], halve: bool
) -> PerResponse:
    """One forward; if memory runs out, two with half the responses each, recursively."""
    try:
        return run(lay_out([item.group for item in sequence]))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).split("\n", 1)[0]
    # Outside the handler, the exception is freed, and with it the tensors of the failed forward.
    free_memory()
    tokens = sum(item.group.num_tokens for item in sequence)
    if not halve or len(sequence) == len(sequence[0].indices) == 1:
        fix = (
            "load the model in bfloat16, or lower max_length"
            if halve
            else "lower training.max_tokens"
        )
        raise MemoryBudgetError(f"{tokens} tokens do not fit into memory ({what}); {fix}")
    log.warning("a sequence of %d tokens ran out of memory (%s); running two halves", tokens, what)
    if len(sequence) == 1:  # one prompt: split between its responses, else between prompts
        group, indices = sequence[0]
        ids, cut = group.response_ids, len(indices) // 2
        parts = ((ids[:cut], indices[:cut]), (ids[cut:], indices[cut:]))
        sequence = [IndexedGroup(replace(group, response_ids=i), where) for i, where in parts]
    cut = len(sequence) // 2
    first, second = (_run_or_halve(run, half, halve) for half in (sequence[:cut], sequence[cut:]))
    return tuple(
        None if a is None or b is None else torch.cat([a, b])
        for a, b in zip(first, second, strict=True)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a pass failed because memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in _OUT_OF_MEMORY
    )


def free_memory() -> None:
    """Free what a failed pass left behind; call it once its exception, which holds tensors, is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def plan_sequences(groups: Sequence[TokenizedGroup], max_tokens: int) -> list[list[int]]:
    """Indices of the groups of each sequence, longest first; only groups of similar length share one."""
    sizes = [group.num_tokens for group in groups]
    order = sorted(range(len(groups)), key=lambda i: -sizes[i])
    sequences = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]  # of similar sizes, because they are sorted
        bins = first_fit_decreasing([sizes[i] for i in window], max_tokens)
        sequences += [[window[i] for i in members] for members in bins]
    return sequences


def first_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the items in each bin; a bin exceeds `budget` only to hold a single larger item."""
    bins: list[list[int]] = []
    space: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fit = next((b for b, left in enumerate(space) if sizes[item] <= left), None)
        if fit is None:
            bins.append([item])
            space.append(budget - sizes[item])
        else:
            bins[fit].append(item)
            space[fit] -= sizes[item]
    return bins


def share_prompts(groups: Sequence[Branches], max_tokens: int) -> list[IndexedGroup]:
    """All responses grouped by their prompt's ids, split to fit into `max_tokens` as far as possible."""
    by_prompt: dict[bytes, tuple[NDArray[np.int32], list[_Response]]] = {}
    index = count()
    for group in groups:
        prompt = np.asarray(group.prompt_ids, np.int32)  # one dtype: bytes are the key
        _, responses = by_prompt.setdefault(prompt.tobytes(), (prompt, []))
        responses += [(next(index), ids) for ids in group.response_ids]
    return [
        IndexedGroup(TokenizedGroup(prompt, tuple(ids for _, ids in part)), [i for i, _ in part])
        for prompt, responses in by_prompt.values()
        for part in _split(responses, max_tokens - len(prompt))
    ]


def _split(responses: list[_Response], room: int) -> Iterator[list[_Response]]:
    part: list[_Response] = []
    size = 0
    for response in responses:
        length = len(response[1])
        if part and size + length > room:
            yield part
            part, size = [], 0
        part.append(response)
        size += length
    yield part


def _map(run: _Run, sequences: list[list[IndexedGroup]], threads: int) -> Iterable[PerResponse]:
    # on a CPU a thread per sequence beats all threads on one (docs/scoring.md); torch releases the GIL
    # inside its kernels, so threads share one copy of the weights
    workers = min(threads, len(sequences))
    if workers <= 1:
        yield from map(run, sequences)
        return
    before, cores = torch.get_num_threads(), max(1, threads // workers)
    try:
        with ThreadPoolExecutor(workers, "score", torch.set_num_threads, (cores,)) as pool:
            yield from pool.map(run, sequences)
    finally:
        torch.set_num_threads(before)  # torch takes it as the default of threads that start later


def check_finite(scores: Scores) -> None:
    """Raise NumericsError for scores that are not finite, naming their groups by index."""
    bad = np.zeros(len(scores.lengths), bool)
    for values in (scores.rewards, scores.logps):
        bad |= False if values is None else ~np.isfinite(values)
    if bad.any():
        # a response's group: the last one that starts at or before it
        owners = np.searchsorted(scores.first, np.flatnonzero(bad), side="right") - 1
        raise NumericsError(
            f"the model gives scores that are not finite, in groups {np.unique(owners)[:8].tolist()} (by "
            "index); check its weights, or run it in float32"
        )
