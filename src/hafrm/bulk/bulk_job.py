"""`score_files`: rows with a prompt and response(s) in, the same rows with scores out, order kept.

OUT/<shard>                            scored rows, complete or absent
OUT/_score/part-I-of-N/manifest.json   what the scores depend on; one folder for each --shard I/N
OUT/_score/part-I-of-N/shards.jsonl    finished shards; one that is not listed is scored again
OUT/_score/part-I-of-N/bad_rows.jsonl  rows without a score: source, row, reason, detail
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hafrm.atomic import atomic_write, clear_leftovers, fingerprint
from hafrm.bulk.shards import (
    ROWS_PER_SHARD,
    Input,
    RowScores,
    Shard,
    ShardRows,
    cut_into_shards,
    identify,
    read_shards,
    render_shard,
)
from hafrm.data.encoding import Encoder
from hafrm.data.files import Refusal, is_known_kind
from hafrm.data.parse import parse_row
from hafrm.engine.layout import lay_out
from hafrm.engine.model import self_check
from hafrm.errors import CheckpointError, ConfigError
from hafrm.preferences import Group, TokenizedGroup
from hafrm.progress import OnProgress, no_progress, over_passes
from hafrm.run_folder import ResumableFolder, read_json_lines
from hafrm.scoring.loading import Placement, choose_dtype, load_encoder, model_digest
from hafrm.scoring.model_files import load_config
from hafrm.scoring.outputs import ModelOutputs, heads_for, model_files

KIND = "bulk scoring"
RECORDS = "_score"  # readers of data folders (Spark, pyarrow) ignore a leading underscore
SHARDS, BAD_ROWS = "shards.jsonl", "bad_rows.jsonl"


@dataclass(frozen=True)
class BulkOptions:
    """How a job runs; its files depend on all options except `device` and `shard`."""

    rows_per_shard: int = ROWS_PER_SHARD
    max_length: int | None = None
    """Longer rows are not scored; None: as many tokens as the model takes."""
    dtype: str = "auto"
    device: str | None = None
    shard: str = "0/1"
    """i/n: only every n-th shard, starting with shard i (from 0); for job arrays."""
    outputs: tuple[str, ...] = ("reward",)
    """What each response gets: names in `scoring.outputs`."""

    @property
    def part(self) -> tuple[int, int]:
        """(i, n); raises ConfigError for a `shard` of another form."""
        i, _, n = self.shard.partition("/")
        if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise ConfigError(f"--shard is i/n with i from 0 to n - 1, as 0/8, not {self.shard}")
        return int(i), int(n)


@dataclass(frozen=True)
class BulkResult:
    """The rows of a job, or of one part of a job array."""

    num_rows: int
    num_responses: int
    num_bad: int  # rows without a score
    num_resumed: int  # shards that an earlier call had finished


def score_files(
    model: str | Path,
    sources: Sequence[str],
    out: Path,
    options: BulkOptions | None = None,
    on_progress: OnProgress = no_progress,
) -> BulkResult:
    """Write every row of `sources` with its scores into the folder `out`.

    `on_progress` counts the rows that were not scored before. Raises CheckpointError if `out` holds another
    job or cannot be written, NumericsError if scores are not finite or change when prompts are shared.
    """
    options = options or BulkOptions()
    Placement(options.dtype, options.device)
    i, n = options.part
    files = model_files(heads_for(model, options.outputs))
    dtype = str(choose_dtype(files[0], options.dtype, options.device)).removeprefix("torch.")
    options = replace(options, dtype=dtype)  # a later call or another part must use the same
    inputs = identify(sources)
    shards = cut_into_shards(inputs, options.rows_per_shard)[i::n]
    cache_key = _cache_key(files, inputs, options)
    _check_output(out)
    with ResumableFolder.open(out / RECORDS / f"part-{i}-of-{n}", KIND) as part:
        for other in (out / RECORDS).glob(f"part-*/{SHARDS}"):
            has_content = other.stat().st_size > 0
            ResumableFolder(other.parent, KIND).claim(SHARDS, cache_key, has_content=has_content)
        clear_leftovers(out, {shard.file for shard in shards})
        records, bad_rows = part.records(SHARDS, cache_key), part.records(BAD_ROWS, cache_key)
        finished = _finished_shards(out, shards)
        todo, num_resumed = [s for s in shards if s.file not in finished], len(finished)
        on_rows = over_passes(on_progress, sum(shard.num_rows for shard in todo))
        scored = _score_in_turn(model, todo, options, on_rows) if todo else ()
        for shard, (rows, scores) in zip(todo, scored, strict=True):
            is_packed = shard.file.endswith(".gz")
            content = render_shard(rows, scores, options.outputs, is_packed=is_packed)
            atomic_write(out / shard.file, content)
            bad = _bad_rows(shard, rows, scores)
            bad_rows.add([row for row in bad if row["id"] not in bad_rows.records])
            finished[shard.file] = {
                "id": shard.file,
                "num_responses": sum(
                    len(s[options.outputs[0]]) for s in scores if not isinstance(s, Refusal)
                ),
                "num_bad": len(bad),
                "digest": "sha256:" + hashlib.sha256(content).hexdigest(),
            }
            records.add([finished[shard.file]])  # last: it makes the shard count as finished
            on_rows(shard.num_rows, shard.num_rows)
    return BulkResult(
        num_rows=sum(shard.num_rows for shard in shards),
        num_responses=sum(record["num_responses"] for record in finished.values()),
        num_bad=sum(record["num_bad"] for record in finished.values()),
        num_resumed=num_resumed,
    )


def _check_output(out: Path) -> None:
    if is_known_kind(out) and not out.is_dir():
        raise ConfigError(f"--out is a folder, and {out} looks like a file")
    names = [p.name for p in out.iterdir() if p.name[0] != "."] if out.is_dir() else []
    if names and RECORDS not in names:
        what = f"is not empty ({min(names)}) and holds no job of {KIND}"
        raise CheckpointError(f"{out} {what}: give another --out")


def _cache_key(
    files: Sequence[str | Path], inputs: Sequence[Input], options: BulkOptions
) -> dict[str, Any]:
    """Everything that the scores and the names of the outputs depend on."""
    encoder = load_encoder(files[0], load_config(files[0]), options.max_length, "drop")
    return {
        "model": [model_digest(file) for file in files],
        "outputs": options.outputs,
        "tokenizer": encoder.cache_key,
        "template": encoder.template_sha256,
        "max_length": encoder.lengths.max_length,
        "dtype": options.dtype,
        "rows_per_shard": options.rows_per_shard,
        # not where an input is stored, but which rows of it are selected
        "inputs": [{**asdict(item), "source": item.source.partition("#")[2]} for item in inputs],
    }


def _bad_rows(shard: Shard, rows: ShardRows, scores: Sequence[RowScores]) -> list[dict[str, Any]]:
    return [
        {"id": f"{shard.file}:{number}", "source": shard.source, "row": number, **s._asdict()}
        for number, s in zip(rows.numbers, scores, strict=True)
        if isinstance(s, Refusal)
    ]


_parse = partial(parse_row, need_comparisons=False, read_labels=False)  # scores need no labels


def encode_rows(encoder: Encoder, rows: ShardRows) -> list[TokenizedGroup | Refusal]:
    """The rows as token ids; one that cannot be read or rendered, or is too long, is a refusal."""
    parsed = {
        f"row {number}": row if isinstance(row, Refusal) else _parse(row)
        for number, row in zip(rows.numbers, rows.values, strict=True)
    }
    rows_read = {n: row for n, row in parsed.items() if not isinstance(row, Refusal)}
    groups = [Group(name, row.prompt, row.responses) for name, row in rows_read.items()]
    by_id, report = encoder.encode(groups)
    limit = f"prompt and response have more than {encoder.lengths.max_length:,} tokens, the limit"
    too_long = Refusal("too long", limit)
    encoded: dict[str, TokenizedGroup | Refusal] = {group.id: too_long for group in groups}
    encoded |= {groups[i].id: Refusal("not encodable", why) for i, why in report.refused.items()}
    encoded |= {group.id: group for group in by_id}
    return [row if isinstance(row, Refusal) else encoded[name] for name, row in parsed.items()]


def score_rows(
    model: ModelOutputs,
    rows: Sequence[TokenizedGroup | Refusal],
    outputs: Sequence[str],
    on_progress: OnProgress = no_progress,
) -> list[RowScores]:
    """The scores of each row; `on_progress` counts responses."""
    groups = [row for row in rows if not isinstance(row, Refusal)]
    by_group = iter(model.score(groups, outputs, on_progress))
    return [row if isinstance(row, Refusal) else next(by_group) for row in rows]


def _score_in_turn(
    path: str | Path, shards: Sequence[Shard], options: BulkOptions, on_rows: OnProgress
) -> Iterator[tuple[ShardRows, list[RowScores]]]:
    """The rows and scores of every shard; the next one is encoded while one is scored."""
    place: dict[str, Any] = {"dtype": options.dtype, "device": options.device}
    place |= {"max_length": options.max_length, "too_long": "drop"}
    model = ModelOutputs(path, options.outputs, **place)
    hybrid = model.scorer.model
    all_rows, is_checked = read_shards(shards, options.rows_per_shard), False

    def prepare() -> tuple[ShardRows, list[TokenizedGroup | Refusal]]:
        rows = next(all_rows)
        return rows, encode_rows(model.scorer.encoder, rows)

    with ThreadPoolExecutor(1) as executor:  # one thread, so that shards are read in order
        upcoming = executor.submit(prepare)
        for i, shard in enumerate(shards, start=1):
            rows, encoded = upcoming.result()
            if i < len(shards):
                upcoming = executor.submit(prepare)
            groups = [row for row in encoded if not isinstance(row, Refusal)]
            if groups and not is_checked:
                # a few short groups against one response at a time, as other consumers score
                shortest = sorted(groups, key=lambda group: group.num_tokens)[:3]
                few = [replace(group, response_ids=group.response_ids[:2]) for group in shortest]
                self_check(hybrid, lay_out(few).to(hybrid.device))
                is_checked = True

            def on_responses(done: int, total: int, num_rows: int = shard.num_rows) -> None:
                # never all rows: a shard is done only once it is written
                on_rows(num_rows * done // (total + 1), num_rows)

            yield rows, score_rows(model, encoded, options.outputs, on_responses)


def _finished_shards(out: Path, shards: Sequence[Shard]) -> dict[str, dict[str, Any]]:
    """Records of shards, from all parts, whose output files are as they were written."""
    names = {shard.file for shard in shards}
    finished = {}
    for records in sorted((out / RECORDS).glob(f"part-*/{SHARDS}")):
        for record in (r for r in read_json_lines(records) if r["id"] in names):
            file = out / record["id"]
            if file.is_file() and fingerprint(file) == record["digest"]:
                finished[record["id"]] = record
    return finished
