"""Score files: rows with a prompt and response(s) in, the same rows with scores out, order kept.

Inputs are cut into shards of some thousand rows. A shard is written whole or not at all, and a job that
was killed goes on behind its last finished shard when it is called again. One file in and one file out
is the same job, whose shards lie beside the output until they are joined. A row that cannot be scored
keeps its place, with null for its score and the reason in `error`, and is listed apart.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hafrm.atomic import (
    atomic_file,
    atomic_write,
    clear_leftovers,
    fingerprint,
    remove_directory,
)
from hafrm.data.files import is_known_kind
from hafrm.data.reader import parse_source
from hafrm.errors import CheckpointError, ConfigError, DataError
from hafrm.process_pool import default_num_processes
from hafrm.scoring.inputs import (
    ROWS_PER_SHARD,
    Input,
    Shard,
    cut,
    file_suffix,
    identify,
)
from hafrm.scoring.job_folder import JobFolder, ShardRecord, writing
from hafrm.scoring.loading import (
    Placement,
    choose_dtype,
    load_config,
    load_encoder,
    model_digest,
)
from hafrm.scoring.pace import Pace
from hafrm.scoring.processes import score_in_processes
from hafrm.scoring.shard_files import join
from hafrm.scoring.worker import Work


@dataclass(frozen=True)
class BulkOptions:
    """How a job is run; the first four decide about its scores and outputs, the others do not."""

    rows_per_shard: int = ROWS_PER_SHARD
    """A kill costs one shard at most; each becomes an output file of its own in a folder."""
    max_length: int | None = None
    """Tokens of prompt and response; None: as many as the model takes."""
    cut: bool = False
    """Cut inputs that are longer, as training does; otherwise their rows are not scored."""
    dtype: str = "auto"
    """Of the weights: auto, float32, bfloat16 or float16."""
    processes: int | None = None
    """On this machine; None: one for each GPU, or one."""
    part: tuple[int, int] = (0, 1)
    """(i, n): score only every n-th shard, from the i-th on, counted from 0; for job arrays."""
    device: str | None = None
    """Of all processes; None: a GPU for each where there are any, else the CPU."""

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
    """What became of the rows: of this part of a job array, or of all."""

    num_rows: int
    num_responses: int
    num_bad: int
    """Rows without a score."""
    num_cut: int
    """Prompts and responses that were cut to fit."""
    num_kept: int
    """Shards that an earlier call had finished."""
    bad_rows: Path | None
    """Where bad rows are listed: a file, or the folder that has one for each shard with any."""


def score_files(
    model: str | Path,
    sources: Sequence[str],
    out: Path,
    options: BulkOptions | None = None,
    watch: Callable[[Pace], None] | None = None,
) -> BulkResult:
    """Write every row of `sources` with its scores: to `out` when it ends in one of SUFFIXES, or into it.

    A row with `response` gets `reward`; `responses` or `completions` get `rewards`, in their order; a
    pair gets `chosen_reward` and `rejected_reward`. Calling it again goes on with a job that was ended.
    `watch` hears of the pace whenever rows are done.

    Raises DataError for input or an output name that cannot be used, ModelError for a directory without
    a reward model, CheckpointError when `out` holds another job or cannot be written, NumericsError for
    scores that must not be used.
    """
    options = options or BulkOptions()
    dtype = str(choose_dtype(model, options.dtype, options.device)).removeprefix("torch.")
    options = replace(options, dtype=dtype)  # what a later call, or another part, must find again
    inputs = identify(sources)
    to_file = _is_file(out, inputs, options)
    shards = cut(inputs, options.rows_per_shard, file_suffix(out.name) if to_file else None)
    _check_apart(inputs, [out] if to_file else [out / shard.file for shard in shards])
    decides = _decides(model, inputs, options)
    details = {"model": str(model), "shards": [asdict(shard) for shard in shards]}
    output = _Output(out) if to_file else None
    if output is not None and (before := output.finished(decides)) is not None:
        return before
    job = JobFolder.begin(output.parts if output else out, decides, details)
    mine = shards[options.part[0] :: options.part[1]]
    with job.lock(options.part, mine):
        result = _run(str(model), job, mine, options, watch)
        return output.finish(job, shards, decides, result) if output else result


def _run(
    model: str,
    job: JobFolder,
    shards: Sequence[Shard],
    options: BulkOptions,
    watch: Callable[[Pace], None] | None,
) -> BulkResult:
    """Score what is not finished of the shards; the sum over all of them."""
    known = {shard: job.record(shard) for shard in shards}
    todo = [shard for shard, record in known.items() if record is None]
    pace = Pace(sum(shard.stop - shard.start for shard in todo))

    def tell(rows: int, tokens: int) -> None:
        pace.add(rows, tokens)
        if watch is not None:
            watch(pace)

    work = Work(model, job, options.dtype, options.max_length, options.cut, options.device)
    if todo:
        num = 1 if options.device else default_num_processes()
        score_in_processes(work, todo, options.processes or num, tell)
    known |= {shard: job.record(shard) for shard in todo}
    done = [record for record in known.values() if record is not None]
    if len(done) < len(shards):
        raise CheckpointError(f"another job writes into {job.path}; give each an output of its own")
    bad = any(record.num_bad for record in done)
    return _total(done, len(shards) - len(todo), job.records if bad else None)


def _total(records: Sequence[ShardRecord], num_kept: int, bad_rows: Path | None) -> BulkResult:
    return BulkResult(
        num_rows=sum(record.num_rows for record in records),
        num_responses=sum(record.num_responses for record in records),
        num_bad=sum(record.num_bad for record in records),
        num_cut=sum(record.num_cut for record in records),
        num_kept=num_kept,
        bad_rows=bad_rows,
    )


class _Output:
    """One output file, the manifest and bad rows beside it, and the folder of its parts meanwhile."""

    def __init__(self, path: Path) -> None:
        stem = path.name.removesuffix(file_suffix(path.name))
        self.path = path
        self.manifest = path.with_name(f"{stem}.manifest.json")
        self.bad_rows = path.with_name(f"{stem}.bad_rows.jsonl")
        self.parts = path.with_name(f"{path.name}.parts")

    def finished(self, decides: dict[str, Any]) -> BulkResult | None:
        """What an earlier call made of the same job, if its output still is as it was."""
        if not self.path.exists() or not self.manifest.exists():
            return None
        try:
            known = json.loads(self.manifest.read_bytes())
            same = known["decides"] == json.loads(json.dumps(decides))
            if not same or known["digest"] != fingerprint(self.path):
                return None
            result = BulkResult(**known["result"])
        except (ValueError, KeyError, TypeError):
            return None  # somebody else's file; it is written anew
        if self.parts.exists():
            remove_directory(self.parts)
        bad = self.bad_rows if result.num_bad else None
        return BulkResult(**{**asdict(result), "num_kept": len(known["shards"]), "bad_rows": bad})

    def finish(
        self, job: JobFolder, shards: Sequence[Shard], decides: dict[str, Any], result: BulkResult
    ) -> BulkResult:
        """Join the shards into the output and remove them, the manifest last: a kill repeats this only."""
        clear_leftovers(self.path.parent, {self.path.name, self.manifest.name, self.bad_rows.name})
        with writing(self.path):
            with atomic_file(self.path) as file:
                join([job.path / shard.file for shard in shards], file, file_suffix(self.path.name))
            lists = [job.bad_rows(shard) for shard in shards]
            text = b"".join(listed.read_bytes() for listed in lists if listed.exists())
            self.bad_rows.unlink(missing_ok=True)
            if text:
                atomic_write(self.bad_rows, text)
            result = BulkResult(**{**asdict(result), "bad_rows": self.bad_rows if text else None})
            content = json.loads((job.records / "manifest.json").read_bytes())
            content |= {
                "decides": decides,
                "digest": fingerprint(self.path),
                "result": {**asdict(result), "bad_rows": None},
            }
            atomic_write(self.manifest, json.dumps(content, indent=1) + "\n")
            remove_directory(job.path)
        return result


def _is_file(out: Path, inputs: Sequence[Input], options: BulkOptions) -> bool:
    """Whether `out` names one file, by its ending; raises DataError for a file that cannot be it."""
    if out.is_dir() or not (is_known_kind(out) or out.is_file()):
        return False
    file_suffix(out.name)
    if len(inputs) > 1:
        raise DataError(f"{len(inputs)} inputs cannot all become {out}; give a folder")
    if options.part != (0, 1):
        raise ConfigError(f"--shard needs a folder for the shards of all its jobs, got {out}")
    return True


def _check_apart(inputs: Sequence[Input], outputs: Sequence[Path]) -> None:
    """Raises DataError when an output would replace an input."""
    places = {Path(parse_source(each.source).location).resolve() for each in inputs}
    for output in outputs:
        if output.resolve() in places:
            raise DataError(
                f"{output} is an input too, and is not overwritten; give another output"
            )


def _decides(model: str | Path, inputs: Sequence[Input], options: BulkOptions) -> dict[str, Any]:
    """What must be the same for a job to go on."""
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
        "inputs": [each.key for each in inputs],
    }
