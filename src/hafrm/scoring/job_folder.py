"""The output folder of a bulk job: what decides about its scores, and which shards are finished.

    OUT/<shard>                    scored rows, complete or absent
    OUT/_score/manifest.json       inputs, model, tokenizer, template, dtype, versions, shards
    OUT/_score/<shard>.json        the shard's record, written last: without one it is scored again
    OUT/_score/<shard>.bad.jsonl   the shard's bad rows with number and reason, where there are any

Any number of processes and machines may write into one folder, each its own shards. Readers of data
folders (Spark, pyarrow, hafrm) pass over names that begin with an underscore.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hafrm.atomic import (
    HASHED_BYTES,
    atomic_write,
    clear_leftovers,
    fingerprint,
    lock_directory,
)
from hafrm.data.reader import BadRow
from hafrm.errors import CheckpointError
from hafrm.provenance import describe_process
from hafrm.scoring.inputs import Shard

RECORDS = "_score"


@dataclass(frozen=True)
class ShardRecord:
    """What became of a shard, and proof that its file is the one that was written."""

    key: str
    """Of the manifest that it was scored under."""
    num_rows: int
    num_responses: int
    num_bad: int
    """Rows without a score."""
    num_cut: int
    """Prompts and responses that were cut to fit."""
    num_tokens: int
    """Tokens run through the model, a shared prompt once."""
    seconds: float
    size: int
    """Of the output file, in bytes."""
    digest: str
    process: dict[str, Any]
    """What computed it: versions, device, threads."""


class JobFolder:
    """One job's outputs and records; the same plan finds its finished shards, another one is refused."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.records = path / RECORDS

    @classmethod
    def begin(cls, path: Path, decides: dict[str, Any], details: dict[str, Any]) -> "JobFolder":
        """A new folder, or one in which the same job was begun.

        `decides` is what must be the same for a job to go on; `details` are only recorded.
        Raises CheckpointError for a folder that holds something else, or another job.
        """
        text = json.dumps(decides, sort_keys=True)
        decides, key = json.loads(text), hashlib.sha256(text.encode()).hexdigest()
        folder = cls(path, key)
        manifest = folder.records / "manifest.json"
        before = _read(manifest) if manifest.exists() else None
        if before is not None and before.get("key") != key and folder._has_records():
            was = before.get("decides", {})
            other = ", ".join(name for name in decides if was.get(name) != decides[name])
            raise CheckpointError(
                f"{path} holds the scores of another job (different: {other or 'its manifest'}): give "
                "another output, or remove it and score anew"
            )
        if before is None:
            _check_room(path)
        if before is None or before.get("key") != key:
            with writing(manifest):
                folder.records.mkdir(parents=True, exist_ok=True)
                content = {"key": key, "decides": decides, **details, "begun": describe_process()}
                atomic_write(manifest, json.dumps(content, indent=1) + "\n")
        return folder

    @contextlib.contextmanager
    def lock(self, part: tuple[int, int], shards: Sequence[Shard]) -> Iterator[None]:
        """Keep a second process off the same part, and clear what a kill left of its shards.

        Raises CheckpointError when another process has it.
        """
        place = self.records / f"part-{part[0]}-of-{part[1]}"
        with writing(place):
            place.mkdir(exist_ok=True)
        with lock_directory(place):
            clear_leftovers(self.path, {shard.file for shard in shards})
            written = {(self._record(shard), self.bad_rows(shard)) for shard in shards}
            clear_leftovers(self.records, {file.name for files in written for file in files})
            yield

    def record(self, shard: Shard) -> ShardRecord | None:
        """The record of a finished shard; None when it is to be scored (again).

        A file that is missing, shorter than it was or changed since is not finished.
        """
        file, place = self.path / shard.file, self._record(shard)
        if not place.exists() or not file.exists():
            return None
        try:
            known = ShardRecord(**_read(place))
        except TypeError as error:
            raise CheckpointError(f"{place} is no record of a shard: {error}; remove it") from error
        if known.key != self.key or file.stat().st_size != known.size:
            return None
        unchanged = known.size > HASHED_BYTES or fingerprint(file) == known.digest
        return known if unchanged else None

    def commit(
        self, shard: Shard, content: bytes, bad: Sequence[BadRow], known: dict[str, Any]
    ) -> ShardRecord:
        """Write a shard's file, its bad rows and, last of all, its record.

        Raises CheckpointError when that is not possible; what was written before stays.
        """
        file = self.path / shard.file
        record = ShardRecord(
            key=self.key,
            num_rows=shard.stop - shard.start,
            num_bad=len(bad),
            size=len(content),
            digest="sha256:" + hashlib.sha256(content).hexdigest(),
            **known,
        )
        with writing(file):
            atomic_write(file, content)
            self.bad_rows(shard).unlink(missing_ok=True)
            if bad:
                lines = "".join(json.dumps(asdict(row)) + "\n" for row in bad)
                atomic_write(self.bad_rows(shard), lines)
            atomic_write(self._record(shard), json.dumps(asdict(record), indent=1) + "\n")
        return record

    def bad_rows(self, shard: Shard) -> Path:
        """Where a shard's bad rows are listed, if it has any."""
        return self.records / f"{shard.file}.bad.jsonl"

    def _record(self, shard: Shard) -> Path:
        return self.records / f"{shard.file}.json"

    def _has_records(self) -> bool:
        return any(file.name != "manifest.json" for file in self.records.glob("*.json"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write (a full disk, say) into a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; once that is mended, the same command "
            "goes on behind the last finished shard"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}; remove it and run again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it holds no object; remove it and run again")
    return content


def _check_room(path: Path) -> None:
    """Raises CheckpointError when `path` holds anything that is not a bulk job's."""
    if path.is_file():
        raise CheckpointError(f"{path} is a file; several outputs need a folder")
    found = [p.name for p in path.iterdir() if p.name[0] not in "._"] if path.is_dir() else []
    if found:
        raise CheckpointError(
            f"{path} is not empty ({found[0]}) and no job of bulk scoring was begun there: give "
            "another output folder"
        )
