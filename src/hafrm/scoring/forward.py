"""Run a model over many groups without gradients: rewards and log-probs of every response.

The one bulk path: reference log-probs, validation, evaluation and scoring all come through here, laid
out and packed as in training. Groups with the same prompt ids share one layout, whichever rows they
came from, and one too large for a row is cut into several. Longest first, so that memory peaks at the
start; results come back in the order given.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

log = logging.getLogger("hafrm")

_WINDOW = 512
"""Pieces packed together; first fit over all of them would take time with their square."""


@dataclass(frozen=True)
class Scores:
    """Per response, in the order of the groups; absent heads give None."""

    rewards: NDArray[np.float32] | None
    logps: NDArray[np.float32] | None
    lengths: NDArray[np.int64]
    first: NDArray[np.int64]
    """Index of each group's first response."""


PerResponse = tuple[Tensor | None, ...]
"""What a forward gives, each with one entry per response of its layout; `Outputs` is one."""


class Piece(NamedTuple):
    """A prompt and some of the responses to it: what is laid out as one group."""

    prompt_ids: NDArray[np.int32]
    response_ids: list[NDArray[np.int32]]
    where: list[int]
    """Index of each response when all are counted through."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)


def first_responses(groups: Sequence[Branches]) -> NDArray[np.int64]:
    """Index of each group's first response when all responses are counted through."""
    counts = [len(group.response_ids) for group in groups]
    return np.cumsum([0, *counts])[:-1].astype(np.int64)


def run_forward(  # noqa: PLR0913
    model: HybridModel,
    groups: Sequence[Branches],
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
    threads: int = 1,
    done: Callable[[int, int], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Scores:
    """Scores of all responses of `groups`, up to `max_tokens` to a row, `threads` rows at a time.

    `done(responses, tokens)` is called after every row. Several threads are for a model on the CPU
    that this process has to itself: there they beat one row on all cores (see docs/scoring.md).
    `part` = (i, n) runs one row of n, and zero stands for the scores of the others.
    Raises NumericsError for a score that is not finite, naming such groups by index; of a part's scores
    none is checked.
    """
    lengths = np.array([len(ids) for group in groups for ids in group.response_ids], np.int64)
    rewards, logps = (np.zeros(len(lengths), np.float32) for _ in range(2))

    def run(layout: Layout) -> Outputs:
        half = contextlib.nullcontext()
        device = model.device
        with torch.no_grad(), half if autocast is None else torch.autocast(device.type, autocast):
            outputs: Outputs = model(layout.to(device))
        return outputs

    rows = run_rows(
        run,
        groups,
        max_tokens=max_tokens,
        threads=threads,
        part=part,
        # One rank of a sharded model cannot run more forwards than the others.
        halve=not isinstance(model, FSDPModule),
    )
    for where, tokens, outputs in rows:
        for values, output in ((rewards, outputs[0]), (logps, outputs[1])):
            if output is not None:
                values[where] = output.float().cpu().numpy()
        if done is not None:
            done(len(where), tokens)
    scores = Scores(
        rewards=None if model.reward_head is None else rewards,
        logps=None if model.policy_head is None else logps,
        lengths=lengths,
        first=first_responses(groups),
    )
    if part == (0, 1):
        check_finite(scores)
    return scores


def run_rows(
    run: Callable[[Layout], PerResponse],
    groups: Sequence[Branches],
    *,
    max_tokens: int,
    threads: int = 1,
    part: tuple[int, int] = (0, 1),
    halve: bool = True,
) -> Iterator[tuple[NDArray[np.int64], int, PerResponse]]:
    """(indices of responses, tokens run, what `run` gives per response) of every packed row.

    `part` = (i, n) takes every n-th row from the i-th on. Where a part has one row less, it runs the
    shortest piece for nothing: all parts make the same number of forwards, in which shards are exchanged.
    Raises MemoryBudgetError for a single response that does not fit, or without `halve` for any row.
    """
    pieces = split_into_pieces(groups, max_tokens)
    rows = [[pieces[i] for i in row] for row in plan_rows(pieces, max_tokens)]
    index, num_parts = part
    mine = rows[index::num_parts]
    is_short = len(mine) < -(-len(rows) // num_parts)
    filler = [[min(pieces, key=lambda piece: piece.num_tokens)]] if is_short else []
    all_outputs = iter(_map(lambda row: _run_row(run, row, halve), [*mine, *filler], threads))
    for row in mine:
        where = np.concatenate([np.asarray(piece.where, np.int64) for piece in row])
        yield where, sum(piece.num_tokens for piece in row), next(all_outputs)
    deque(all_outputs, maxlen=0)


def _run_row(run: Callable[[Layout], PerResponse], row: list[Piece], halve: bool) -> PerResponse:
    """One forward; where memory is short, two of half the responses, as often as it takes."""
    try:
        return run(lay_out(row))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).split("\n", 1)[0]
    # Out here the exception is gone, and with it the tensors of the pass that failed.
    free_memory()
    tokens = sum(piece.num_tokens for piece in row)
    if not halve:
        raise MemoryBudgetError(
            f"a row of {tokens} tokens does not fit into memory ({what}), and a sharded model cannot run "
            "it in halves; lower training.max_tokens"
        )
    if len(row) == 1 and len(row[0].where) == 1:
        raise MemoryBudgetError(
            f"a single response of {tokens} tokens (with its prompt) does not fit into memory ({what}); "
            "load the model in bfloat16, or set a smaller max_length"
        )
    log.warning("a row of %d tokens ran out of memory (%s); running it in two halves", tokens, what)
    first, second = (_run_row(run, half, halve) for half in _halves(row))
    return tuple(_joined(a, b) for a, b in zip(first, second, strict=True))


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _halves(row: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """The same responses in the same order, cut between two prompts, or between two of one's responses."""
    if len(row) > 1:
        return row[: len(row) // 2], row[len(row) // 2 :]
    prompt, responses, where = row[0]
    cut = len(where) // 2
    parts = (Piece(prompt, responses[s], where[s]) for s in (slice(cut), slice(cut, None)))
    first, second = parts
    return [first], [second]


def plan_rows(groups: Sequence[Branches], max_tokens: int) -> list[list[int]]:
    """Indices of the groups of each row, longest rows first; only neighbours in length share a row."""
    sizes = [len(g.prompt_ids) + sum(len(r) for r in g.response_ids) for g in groups]
    order = sorted(range(len(groups)), key=lambda i: -sizes[i])
    rows = []
    for start in range(0, len(order), _WINDOW):
        part = order[start : start + _WINDOW]
        bins = first_fit_decreasing([sizes[i] for i in part], max_tokens)
        rows += [[part[i] for i in b] for b in bins]
    return rows


def split_into_pieces(groups: Sequence[Branches], max_tokens: int) -> list[Piece]:
    """All responses by their prompts' ids, in pieces that fit into a row where a response does."""
    whole: dict[bytes, Piece] = {}
    counter = 0
    for group in groups:
        prompt = np.asarray(group.prompt_ids, np.int32)
        piece = whole.setdefault(prompt.tobytes(), Piece(prompt, [], []))
        for ids in group.response_ids:
            piece.response_ids.append(ids)
            piece.where.append(counter)
            counter += 1
    return [part for piece in whole.values() for part in _split(piece, max_tokens)]


def _split(piece: Piece, max_tokens: int) -> Iterator[Piece]:
    part = Piece(piece.prompt_ids, [], [])
    size = len(piece.prompt_ids)
    for ids, where in zip(piece.response_ids, piece.where, strict=True):
        if part.where and size + len(ids) > max_tokens:
            yield part
            part, size = Piece(piece.prompt_ids, [], []), len(piece.prompt_ids)
        part.response_ids.append(ids)
        part.where.append(where)
        size += len(ids)
    yield part


def _map(
    run: Callable[[list[Piece]], PerResponse], rows: list[list[Piece]], threads: int
) -> Iterable[PerResponse]:
    """`run` of every row, in order, over as many threads as there are rows for."""
    workers = min(threads, len(rows))
    if workers <= 1:
        yield from map(run, rows)
        return
    before = torch.get_num_threads()
    share = max(1, threads // workers)
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            yield from pool.map(run, rows)
    finally:
        torch.set_num_threads(before)  # the setting of threads that are yet to come is global


def check_finite(scores: Scores) -> None:
    """Raise NumericsError for scores that are not finite, naming their groups by index."""
    for values in (scores.rewards, scores.logps):
        if values is None or np.isfinite(values).all():
            continue
        responses = np.flatnonzero(~np.isfinite(values))
        bad = np.unique(np.searchsorted(scores.first, responses, side="right") - 1).tolist()
        raise NumericsError(
            f"the model gives scores that are not finite for {len(bad)} of {len(scores.first)} groups, "
            f"such as {bad[:8]} (by index); check its weights, or run it in float32"
        )
