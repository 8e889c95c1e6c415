"""One process of a bulk job: its shards one after the other, each encoded while the last is scored.

Several of them share nothing but the job's folder. A process whose parent is gone ends at the next row.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from hafrm.data.encoding import Encoder
from hafrm.data.reader import BadRow
from hafrm.data.values import Refusal
from hafrm.engine.layout import lay_out
from hafrm.engine.model import self_check
from hafrm.errors import NumericsError
from hafrm.preferences import TokenizedGroup
from hafrm.provenance import describe_process
from hafrm.scoring.inputs import Shard, file_suffix
from hafrm.scoring.job_folder import JobFolder
from hafrm.scoring.row_scores import EncodedRows, encode_rows, score_rows
from hafrm.scoring.scorer import RewardModel
from hafrm.scoring.shard_files import Rows, read_shards, render

Tell = Callable[[int, int], None]
"""Hears of rows that are done and of tokens that were run for them."""
_CHECKED = 3
"""Groups of the first shard on which shared prompts are compared with plain forwards."""


@dataclass(frozen=True)
class Work:
    """What a process must know to score shards."""

    model: str
    folder: JobFolder
    dtype: str
    max_length: int | None
    cut: bool
    device: str | None = None
    """None: a GPU for each process where there are any."""


def score_shards(work: Work, shards: Sequence[Shard], device: str | None, tell: Tell) -> None:
    """Score the shards and commit each to the job's folder.

    Raises ModelError for a directory without a reward model, NumericsError for scores that are not
    finite or that shared prompts change, DataError for damaged input, CheckpointError for a full disk.
    """
    model = RewardModel.from_pretrained(
        work.model,
        dtype=getattr(torch, work.dtype),
        device=device,
        max_length=work.max_length,
        too_long="cut" if work.cut else "drop",
    )
    process = describe_process()
    known = {
        "versions": process["versions"],
        "device": str(model.model.device),
        "threads": torch.get_num_threads(),
    }
    checked = False
    for shard, rows, encoded in _encoded_ahead(model.encoder, shards):
        if encoded.groups and not checked:
            _check_sharing(model, encoded.groups)
            checked = True
        _score(model, work.folder, shard, (rows, encoded), known, tell)


def _score(
    model: RewardModel,
    folder: JobFolder,
    shard: Shard,
    ready: tuple[Rows, EncodedRows],
    process: dict[str, Any],
    tell: Tell,
) -> None:
    rows, encoded = ready
    begun, run, told, tokens = time.monotonic(), 0, 0, 0

    def done(num_responses: int, num_tokens: int) -> None:
        nonlocal run, told, tokens
        run, tokens = run + num_responses, tokens + num_tokens
        finished = len(rows.values) * run // encoded.num_responses
        tell(finished - told, num_tokens)
        told = finished

    scores = score_rows(model, encoded, done)
    bad = [
        BadRow(shard.source, number, given.reason, given.detail)
        for number, given in zip(rows.numbers, scores, strict=True)
        if isinstance(given, Refusal)
    ]
    folder.commit(
        shard,
        render(rows, scores, file_suffix(shard.file)),
        bad,
        {
            "num_responses": sum(len(s) for s in scores if not isinstance(s, Refusal)),
            "num_cut": encoded.num_cut,
            "num_tokens": tokens,
            "seconds": round(time.monotonic() - begun, 3),
            "process": process,
        },
    )
    tell(len(rows.values) - told, 0)


def _encoded_ahead(
    encoder: Encoder, shards: Sequence[Shard]
) -> Iterator[tuple[Shard, Rows, EncodedRows]]:
    """Every shard, read and encoded; the next one is made ready in a thread meanwhile."""
    read = read_shards(shards)

    def prepare() -> tuple[Shard, Rows, EncodedRows]:
        shard, rows = next(read)
        return shard, rows, encode_rows(encoder, rows.values, rows.numbers)

    with ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        ahead = pool.submit(prepare)
        for left in range(len(shards) - 1, -1, -1):
            ready = ahead.result()
            if left:
                ahead = pool.submit(prepare)
            yield ready


def _check_sharing(model: RewardModel, groups: Sequence[TokenizedGroup]) -> None:
    """Compare a few short groups with one response at a time, as any consumer would run them."""
    shortest = sorted(groups, key=lambda group: group.num_tokens)[:_CHECKED]
    few = [replace(group, response_ids=group.response_ids[:2]) for group in shortest]
    try:
        self_check(model.model, lay_out(few).to(model.model.device))
    except NumericsError as error:
        raise NumericsError(
            f"{error}. hafrm did not know this of it: score it with plain transformers, and report it"
        ) from error
