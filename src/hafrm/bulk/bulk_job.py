"""`score_files`: rows with a prompt and response(s) in, the same rows with scores out, order kept.

    OUT/<shard>                            scored rows, complete or absent
    OUT/_score/part-I-of-N/manifest.json   what the scores depend on; one folder for each --shard I/N
    OUT/_score/part-I-of-N/shards.jsonl    finished shards; one that is not listed is scored again
    OUT/_score/part-I-of-N/bad_rows.jsonl  rows without a score: source, row, reason, detail

The same command resumes a job after its last finished shard. Several machines may write into one folder,
each its own part. Readers of data folders (Spark, pyarrow) ignore names with a leading underscore. One
output file is the same job, with its shards in `<file>.parts/` until they are joined.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

from hafrm.atomic import (
    atomic_file,
    atomic_write,
    clear_leftovers,
    fingerprint,
    remove_directory,
)
from hafrm.bulk.scored_rows import EncodedRows, encode_rows, join_files, render_shard, score_rows
from hafrm.bulk.shards import (
    ROWS_PER_SHARD,
    Input,
    Shard,
    ShardReader,
    ShardRecord,
    ShardRows,
    check_not_inputs,
    cut_into_shards,
    file_suffix,
    identify,
    is_one_file,
)
from hafrm.data.reader import BadRow
from hafrm.data.values import Refusal
from hafrm.engine.layout import lay_out
from hafrm.engine.model import self_check
from hafrm.errors import CheckpointError, ConfigError, NumericsError
from hafrm.preferences import TokenizedGroup
from hafrm.process_pool import ProcessPool, default_num_processes
from hafrm.progress import OnProgress, no_progress
from hafrm.provenance import describe_process
from hafrm.results import from_plain, to_plain, write_result
from hafrm.resumable import RecordFile, ResumableFolder, write_errors
from hafrm.run_folder import read_json_lines
from hafrm.scoring.loading import Placement, choose_dtype, load_config, load_encoder, model_digest
from hafrm.scoring.reward_model import RewardModel

KIND = "bulk scoring"
RECORDS = "_score"
SHARDS, BAD_ROWS = "shards.jsonl", "bad_rows.jsonl"


@dataclass(frozen=True)
class BulkOptions:
    """How a job runs; the scores and outputs depend on the first four only."""

    rows_per_shard: int = ROWS_PER_SHARD
    """The most that a kill can cost; in a folder each shard becomes an output file."""
    max_length: int | None = None
    """Tokens of prompt and response; None: as many as the model takes."""
    cut: bool = False
    """Cut longer inputs, as training does; otherwise their rows are not scored."""
    dtype: str = "auto"
    """Of the weights: auto, float32, bfloat16 or float16."""
    processes: int | None = None
    """On this machine; None: one for each GPU, or one."""
    part: tuple[int, int] = (0, 1)
    """(i, n): score only every n-th shard, from the i-th on, counted from 0; for job arrays."""
    device: str | None = None
    """Of all processes; None: a GPU for each if there are any, else the CPU."""

    def __post_init__(self) -> None:
        i, n = self.part
        if not 0 <= i < n:
            raise ConfigError(f"--shard {i}/{n} must be i/n with i from 0 to n - 1")
        Placement(self.dtype, self.device)
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"processes must be 1 or more, got {self.processes}")


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"; raises ConfigError for anything else."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal()):
        raise ConfigError(f"--shard must be i/n, such as 0/8, got {text!r}")
    return int(i), int(n)


@dataclass(frozen=True)
class BulkResult:
    """The rows of a job, or of one part of a job array."""

    num_rows: int
    num_responses: int
    num_bad: int
    """Rows without a score."""
    num_cut: int
    """Prompts and responses that were cut to fit."""
    num_resumed: int
    """Shards that an earlier call had finished."""
    bad_rows: Path | None
    """Where bad rows are listed: a file, or the folder with one list for each part of the job."""


def score_files(
    model: str | Path,
    sources: Sequence[str],
    out: Path,
    options: BulkOptions | None = None,
    on_progress: OnProgress = no_progress,
) -> BulkResult:
    """Write every row of `sources` with its scores: to the file `out` if it ends in one of SUFFIXES, else
    into the folder `out`.

    A row with `response` gets `reward`; `responses` or `completions` get `rewards`, in their order; a
    pair gets `chosen_reward` and `rejected_reward`. `on_progress` counts rows that are not scored yet.

    Raises DataError for inputs or an output name that cannot be used, ModelError for a directory without
    a reward model, CheckpointError when `out` holds another job or cannot be written, NumericsError for
    scores that are not finite.
    """
    options = options or BulkOptions()
    dtype = str(choose_dtype(model, options.dtype, options.device)).removeprefix("torch.")
    options = replace(options, dtype=dtype)  # a later call or another part must use the same
    inputs = identify(sources)
    to_file = is_one_file(out, inputs)
    if to_file and options.part != (0, 1):
        raise ConfigError(f"--shard needs a folder for the shards of all its jobs, got {out}")
    shards = cut_into_shards(
        inputs, options.rows_per_shard, file_suffix(out.name) if to_file else None
    )
    check_not_inputs(inputs, [out] if to_file else [out / shard.file for shard in shards])
    cache_key = _cache_key(model, inputs, options)
    if to_file and (before := _finished_file(out, cache_key)) is not None:
        return before
    folder = out.with_name(f"{out.name}.parts") if to_file else out
    _check_is_ours(folder)
    i, n = options.part
    mine = shards[i::n]
    with ResumableFolder.open(folder / RECORDS / f"part-{i}-of-{n}", KIND) as part:
        for other in (folder / RECORDS).glob(f"part-*/{SHARDS}"):
            has_content = other.stat().st_size > 0
            ResumableFolder(other.parent, KIND).claim(SHARDS, cache_key, has_content=has_content)
        clear_leftovers(folder, {shard.file for shard in mine})
        part_files = part.records(SHARDS, cache_key), part.records(BAD_ROWS, cache_key)
        result = _score_shards(str(model), folder, part_files, mine, options, on_progress)
        return _join(out, folder, shards, cache_key, result) if to_file else result


def _score_shards(
    model: str,
    folder: Path,
    part_files: tuple[RecordFile, RecordFile],
    shards: Sequence[Shard],
    options: BulkOptions,
    on_progress: OnProgress,
) -> BulkResult:
    """Score the shards that are not finished; the sum over all of them."""
    finished = _finished_shards(folder, shards)
    todo = [shard for shard in shards if shard.file not in finished]
    num_resumed, num_done = len(finished), 0
    total = sum(shard.num_rows for shard in todo)
    num = min(options.processes or (1 if options.device else default_num_processes()), len(todo))

    def on_done(task: tuple[Shard, Shard | None], result: tuple[ShardRecord, list[BadRow]]) -> None:
        nonlocal num_done
        record, bad = result
        rows = [{"id": f"{record.id}:{row.row}", **asdict(row)} for row in bad]
        records, bad_rows = part_files
        bad_rows.add([row for row in rows if row["id"] not in bad_rows.records])
        records.add([asdict(record)])  # last: it makes the shard count as finished
        finished[record.id] = record
        num_done += task[0].num_rows
        on_progress(num_done, total)

    # Within a shard only a job of one process reports progress: a function cannot be sent to others.
    within = None if num > 1 else lambda rows: on_progress(num_done + rows, total)
    make_scorer = partial(_ShardScorer, model, folder, options, within)
    # The second shard of a task is read and encoded while the first is scored.
    tasks = list(zip_longest(todo, todo[num:]))
    if todo:
        with ProcessPool(make_scorer, num) as pool:
            pool.run(tasks, on_done)
    records = [finished[shard.file] for shard in shards]
    has_bad = any(record.num_bad for record in records)
    counts = {
        name: sum(getattr(record, name) for record in records)
        for name in ("num_rows", "num_responses", "num_bad", "num_cut")
    }
    bad_rows = folder / RECORDS if has_bad else None
    return BulkResult(**counts, num_resumed=num_resumed, bad_rows=bad_rows)


def _finished_shards(folder: Path, shards: Sequence[Shard]) -> dict[str, ShardRecord]:
    """Records of shards, from all parts, whose output files are as they were written."""
    names = {shard.file for shard in shards}
    finished = {}
    for file in sorted((folder / RECORDS).glob(f"part-*/{SHARDS}")):
        for line in read_json_lines(file):
            try:
                record = from_plain(ShardRecord, line)
            except ValueError as error:
                raise CheckpointError(f"{file} is damaged: {error}; give another output") from error
            if record.id in names and record.matches(folder / record.id):
                finished[record.id] = record
    return finished


class _ShardScorer:
    """A process's model; called with a shard and the next one, it writes the shard's output file."""

    def __init__(
        self,
        model: str,
        folder: Path,
        options: BulkOptions,
        on_rows: Callable[[int], None] | None = None,
    ) -> None:
        self.model = RewardModel.from_pretrained(
            model,
            dtype=options.dtype,
            device=options.device,
            max_length=options.max_length,
            too_long="cut" if options.cut else "drop",
        )
        self.folder, self.on_rows = folder, on_rows
        self.process = {
            "versions": describe_process()["versions"],
            "device": str(self.model.model.device),
            "threads": torch.get_num_threads(),
        }
        self.is_checked = False
        self._reader = ShardReader()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._prepared: dict[Shard, Future[tuple[ShardRows, EncodedRows]]] = {}

    def __call__(self, task: tuple[Shard, Shard | None]) -> tuple[ShardRecord, list[BadRow]]:
        """The shard's record and bad rows.

        Raises NumericsError for scores that are not finite, or that shared prompts change, DataError for
        damaged input, CheckpointError for a full disk.
        """
        shard, following = task
        future = self._prepared.pop(shard, None) or self._executor.submit(self._prepare, shard)
        self._prepared.clear()  # another process may have taken the shard that was prepared
        rows, encoded = future.result()
        if following is not None:
            self._prepared[following] = self._executor.submit(self._prepare, following)
        if encoded.groups and not self.is_checked:
            _check_sharing(self.model, encoded.groups)
            self.is_checked = True
        start = time.monotonic()

        def on_progress(done: int, total: int) -> None:
            if self.on_rows is not None:
                self.on_rows(len(rows.values) * done // total)

        scores = score_rows(self.model, encoded, on_progress)
        content = render_shard(rows, scores, file_suffix(shard.file))
        bad = [
            BadRow(shard.source, number, row_scores.reason, row_scores.detail)
            for number, row_scores in zip(rows.numbers, scores, strict=True)
            if isinstance(row_scores, Refusal)
        ]
        file = self.folder / shard.file
        with write_errors(file):
            atomic_write(file, content)
        record = ShardRecord(
            id=shard.file,
            num_rows=shard.num_rows,
            num_responses=sum(len(s) for s in scores if not isinstance(s, Refusal)),
            num_bad=len(bad),
            num_cut=encoded.num_cut,
            num_tokens=sum(group.num_tokens for group in encoded.groups),
            seconds=round(time.monotonic() - start, 3),
            size=len(content),
            digest="sha256:" + hashlib.sha256(content).hexdigest(),
            process=self.process,
        )
        return record, bad

    def _prepare(self, shard: Shard) -> tuple[ShardRows, EncodedRows]:
        rows = self._reader.read(shard)
        return rows, encode_rows(self.model.encoder, rows.values, rows.numbers)


def _check_sharing(model: RewardModel, groups: Sequence[TokenizedGroup]) -> None:
    """Compare a few short groups with one response at a time, which is how other consumers score."""
    shortest = sorted(groups, key=lambda group: group.num_tokens)[:3]
    few = [replace(group, response_ids=group.response_ids[:2]) for group in shortest]
    try:
        self_check(model.model, lay_out(few).to(model.model.device))
    except NumericsError as error:
        raise NumericsError(
            f"{error}. This kind of model is not known to fail; score it with plain transformers, and "
            "please report it"
        ) from error


def _beside(out: Path) -> tuple[Path, Path]:
    """The manifest and the list of bad rows beside one output file."""
    stem = out.name.removesuffix(file_suffix(out.name))
    return out.with_name(f"{stem}.manifest.json"), out.with_name(f"{stem}.bad_rows.jsonl")


def _finished_file(out: Path, cache_key: Mapping[str, Any]) -> BulkResult | None:
    """The result of an earlier call for the same job, if its output is unchanged."""
    manifest, _ = _beside(out)
    if not out.exists() or not manifest.exists():
        return None
    try:
        content = json.loads(manifest.read_bytes())
        if content["cache_key"] != to_plain(cache_key) or content["digest"] != fingerprint(out):
            return None
        result = from_plain(BulkResult, content["result"])
    except (ValueError, KeyError, TypeError):
        return None  # not our file: it is written again
    if (parts := out.with_name(f"{out.name}.parts")).exists():
        remove_directory(parts)  # a kill came before their removal
    return replace(result, num_resumed=content["num_shards"])


def _join(
    out: Path,
    folder: Path,
    shards: Sequence[Shard],
    cache_key: Mapping[str, Any],
    result: BulkResult,
) -> BulkResult:
    """Join the shards into `out`, write the manifest last, and remove the parts.

    A kill in between repeats only this.
    """
    manifest, bad_rows = _beside(out)
    clear_leftovers(out.parent, {out.name, manifest.name, bad_rows.name})
    with write_errors(out):
        with atomic_file(out) as file:
            join_files([folder / shard.file for shard in shards], file, file_suffix(out.name))
        listed = [
            row for f in folder.glob(f"{RECORDS}/part-*/{BAD_ROWS}") for row in read_json_lines(f)
        ]
        lines = [
            json.dumps({name: value for name, value in row.items() if name != "id"}) + "\n"
            for row in sorted(listed, key=lambda row: row["row"])
        ]
        bad_rows.unlink(missing_ok=True)
        if lines:
            atomic_write(bad_rows, "".join(lines))
        result = replace(result, bad_rows=bad_rows if lines else None)
        content = {
            "cache_key": cache_key,
            "digest": fingerprint(out),
            "num_shards": len(shards),
            "result": result,
            "process": describe_process(),
        }
        write_result(manifest, content)
        remove_directory(folder)
    return result


def _check_is_ours(folder: Path) -> None:
    """Raises CheckpointError for a folder with content that no bulk job wrote."""
    names = [p.name for p in folder.iterdir() if p.name[0] != "."] if folder.is_dir() else []
    if names and RECORDS not in names:
        raise CheckpointError(
            f"{folder} is not empty ({min(names)}) and holds no job of bulk scoring: give another output"
        )


def _cache_key(model: str | Path, inputs: Sequence[Input], options: BulkOptions) -> dict[str, Any]:
    """Everything that the scores and the outputs' names depend on."""
    too_long: Literal["cut", "drop"] = "cut" if options.cut else "drop"
    encoder = load_encoder(model, load_config(model), options.max_length, too_long)
    return {
        "model": model_digest(model),
        "tokenizer": encoder.cache_key,
        "template": encoder.template_sha256,
        "max_length": encoder.lengths.max_length,
        "too_long": too_long,
        "dtype": options.dtype,
        "rows_per_shard": options.rows_per_shard,
        "inputs": [item.cache_key for item in inputs],
    }
