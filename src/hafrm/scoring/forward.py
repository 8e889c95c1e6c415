"""Run a model over many groups without gradients: rewards and log-probs of every response.

The one inference path: reference log-probs, validation, evaluation and scoring all use it, laid out and
packed as in training. Groups with the same prompt ids share one layout, wherever they come from, and one
too large for a packed sequence is split. The longest sequences run first, so memory peaks at the start;
results are in the order of the input.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hafrm.engine.layout import Branches, Layout, lay_out
from hafrm.engine.model import HybridModel, Outputs
from hafrm.engine.packing import first_fit_decreasing, free_memory, is_out_of_memory
from hafrm.errors import MemoryBudgetError, NumericsError
from hafrm.preferences import TokenizedGroup
from hafrm.progress import OnProgress, no_progress

log = logging.getLogger("hafrm")

_WINDOW = 512
"""Groups packed together. First fit over all of them would take quadratic time."""

_Response = tuple[int, NDArray[np.int32]]
"""Its index among all responses, and its ids."""
PerResponse = tuple[Tensor | None, ...]
"""What a forward returns, one entry per response of its layout each; `Outputs` is one."""


@dataclass(frozen=True)
class Scores:
    """Per response, in the order of the groups; None for a head that the model lacks."""

    rewards: NDArray[np.float32] | None
    logps: NDArray[np.float32] | None
    lengths: NDArray[np.int64]
    """Tokens of each response, EOS included."""
    first: NDArray[np.int64]
    """Index of each group's first response."""


class IndexedGroup(NamedTuple):
    """A prompt with some of its responses, and where these are among all responses."""

    group: TokenizedGroup
    indices: list[int]


def first_responses(groups: Sequence[Branches]) -> NDArray[np.int64]:
    """Index of each group's first response among the responses of all groups."""
    counts = [len(group.response_ids) for group in groups]
    return np.cumsum([0, *counts])[:-1].astype(np.int64)


def run_forward(  # noqa: PLR0913
    model: HybridModel,
    groups: Sequence[Branches],
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
    threads: int = 1,
    on_progress: OnProgress = no_progress,
    part: tuple[int, int] = (0, 1),
) -> Scores:
    """Scores of all responses, from packed sequences of up to `max_tokens` tokens.

    `threads` sequences run at a time. Several threads are for a CPU that this process has to itself: there
    they beat one sequence on all cores (docs/scoring.md). `on_progress` counts responses. `part` = (i, n)
    runs every n-th sequence, and leaves the scores of the others 0.
    Raises NumericsError for a score that is not finite, except for a part.
    """
    lengths = np.array([len(ids) for group in groups for ids in group.response_ids], np.int64)
    rewards, logps = (np.zeros(len(lengths), np.float32) for _ in range(2))

    def run(layout: Layout) -> Outputs:
        half = contextlib.nullcontext()
        device = model.device
        with torch.no_grad(), half if autocast is None else torch.autocast(device.type, autocast):
            outputs: Outputs = model(layout.to(device))
        return outputs

    # One rank of a sharded model cannot run more forwards than the others.
    halve = not isinstance(model, FSDPModule)
    num_done = 0
    for indices, outputs in run_sequences(
        run, groups, max_tokens=max_tokens, threads=threads, part=part, halve=halve
    ):
        for values, output in ((rewards, outputs[0]), (logps, outputs[1])):
            if output is not None:
                values[indices] = output.float().cpu().numpy()
        num_done += len(indices)
        on_progress(num_done, len(lengths))
    scores = Scores(
        rewards=None if model.reward_head is None else rewards,
        logps=None if model.policy_head is None else logps,
        lengths=lengths,
        first=first_responses(groups),
    )
    if part == (0, 1):
        check_finite(scores)
    return scores


def run_sequences(
    run: Callable[[Layout], PerResponse],
    groups: Sequence[Branches],
    *,
    max_tokens: int,
    threads: int = 1,
    part: tuple[int, int] = (0, 1),
    halve: bool = True,
) -> Iterator[tuple[NDArray[np.int64], PerResponse]]:
    """(indices of responses, what `run` returns for them) of every packed sequence.

    `part` = (i, n) takes every n-th sequence from the i-th on.
    Raises MemoryBudgetError for a single response that does not fit into memory, and without `halve` for
    any sequence.
    """
    shared = share_prompts(groups, max_tokens)
    plan = plan_sequences([item.group for item in shared], max_tokens)
    sequences = [[shared[i] for i in members] for members in plan]
    index, num_parts = part
    mine = sequences[index::num_parts]
    # All ranks must run equally many forwards, because each gathers shards: a rank with one sequence less
    # runs the shortest group again and drops the result.
    is_short = len(mine) < -(-len(sequences) // num_parts)
    filler = [[min(shared, key=lambda item: item.group.num_tokens)]] if is_short else []
    outputs = iter(_map(lambda s: _run_or_halve(run, s, halve), [*mine, *filler], threads))
    for sequence in mine:
        indices = np.concatenate([np.asarray(item.indices, np.int64) for item in sequence])
        yield indices, next(outputs)
    deque(outputs, maxlen=0)  # the filler's forward must run too


def _run_or_halve(
    run: Callable[[Layout], PerResponse], sequence: list[IndexedGroup], halve: bool
) -> PerResponse:
    """One forward; where memory is short, two with half the responses each, recursively."""
    try:
        return run(lay_out([item.group for item in sequence]))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).split("\n", 1)[0]
    # Outside the handler the exception is gone, and with it the tensors of the failed forward.
    free_memory()
    tokens = sum(item.group.num_tokens for item in sequence)
    if not halve:
        raise MemoryBudgetError(
            f"a sequence of {tokens} tokens does not fit into memory ({what}), and a sharded model cannot "
            "run it in halves; lower training.max_tokens"
        )
    if len(sequence) == 1 and len(sequence[0].indices) == 1:
        raise MemoryBudgetError(
            f"a single response of {tokens} tokens (with its prompt) does not fit into memory ({what}); "
            "load the model in bfloat16, or set a smaller max_length"
        )
    log.warning("a sequence of %d tokens ran out of memory (%s); running two halves", tokens, what)
    first, second = (_run_or_halve(run, half, halve) for half in _halves(sequence))
    return tuple(
        None if a is None or b is None else torch.cat([a, b])
        for a, b in zip(first, second, strict=True)
    )


def _halves(sequence: list[IndexedGroup]) -> tuple[list[IndexedGroup], list[IndexedGroup]]:
    """The same responses in the same order, split between two prompts or two responses of one prompt."""
    if len(sequence) > 1:
        return sequence[: len(sequence) // 2], sequence[len(sequence) // 2 :]
    group, indices = sequence[0]
    ids, cut = group.response_ids, len(indices) // 2
    first = IndexedGroup(replace(group, response_ids=ids[:cut]), indices[:cut])
    second = IndexedGroup(replace(group, response_ids=ids[cut:]), indices[cut:])
    return [first], [second]


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


def share_prompts(groups: Sequence[Branches], max_tokens: int) -> list[IndexedGroup]:
    """All responses grouped by their prompt's ids, split so that each group fits into `max_tokens`; a
    single response that is longer stays whole."""
    by_prompt: dict[bytes, tuple[NDArray[np.int32], list[_Response]]] = {}
    index = 0
    for group in groups:
        prompt = np.asarray(group.prompt_ids, np.int32)  # one dtype: bytes are the key
        _, responses = by_prompt.setdefault(prompt.tobytes(), (prompt, []))
        for ids in group.response_ids:
            responses.append((index, ids))
            index += 1
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


def _map(
    run: Callable[[list[IndexedGroup]], PerResponse],
    sequences: list[list[IndexedGroup]],
    threads: int,
) -> Iterable[PerResponse]:
    """`run` of every sequence, in order, on as many threads as there are sequences for."""
    # torch releases the GIL inside its kernels, so threads share one copy of the weights
    workers = min(threads, len(sequences))
    if workers <= 1:
        yield from map(run, sequences)
        return
    before = torch.get_num_threads()
    cores = max(1, threads // workers)
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(cores,)
        ) as pool:
            yield from pool.map(run, sequences)
    finally:
        torch.set_num_threads(before)  # torch takes it as the default of threads that start later


def check_finite(scores: Scores) -> None:
    """Raise NumericsError for scores that are not finite, naming their groups by index."""
    for values in (scores.rewards, scores.logps):
        if values is None or np.isfinite(values).all():
            continue
        responses = np.flatnonzero(~np.isfinite(values))
        # the group of a response: the last one that starts at or before it
        bad = np.unique(np.searchsorted(scores.first, responses, side="right") - 1).tolist()
        raise NumericsError(
            f"the model gives scores that are not finite for {len(bad)} of {len(scores.first)} groups, "
            f"such as {bad[:8]} (by index); check its weights, or run it in float32"
        )
