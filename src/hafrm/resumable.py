"""`ResumableFolder`: the output folder of a long job, which the same command resumes after a kill.

    OUT/manifest.json    the kind of job, and for each output the `cache_key` it depends on
    OUT/<name>.jsonl     records appended one by one, known by their `id`; whole lines only

An output is only added to by a job with the same cache key. One process at a time writes into a folder.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hafrm.atomic import atomic_write, clear_leftovers, is_unused, lock_directory
from hafrm.errors import CheckpointError
from hafrm.provenance import describe_process
from hafrm.results import to_plain
from hafrm.run_folder import read_json_lines

MANIFEST = "manifest.json"
CacheKey = Mapping[str, Any]  # everything that a stored result depends on, by name, as JSON has it


class RecordFile:
    """Records in one JSON-lines file, in the order they were added."""

    def __init__(self, file: Path) -> None:
        """Reads what is there; a last line that a kill cut short is removed."""
        self.file = file
        self.records: dict[str, dict[str, Any]] = {r["id"]: r for r in read_json_lines(file)}
        content = file.read_bytes() if file.exists() else b""
        if content and not content.endswith(b"\n"):
            atomic_write(file, content[: content.rfind(b"\n") + 1])

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records; a kill after this returns cannot lose them."""
        lines = [json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records]
        with write_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:
                file.write("".join(lines).encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        self.records |= {r["id"]: dict(r) for r in records}


class ResumableFolder:
    """A job's output folder, and what each of its outputs depends on."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, kind: str) -> Iterator["ResumableFolder"]:
        """A new folder, or one in which a job of this kind was started, locked inside the block."""
        folder = cls(path, kind)
        folder._check_is_ours()
        with write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        with lock_directory(path):
            clear_leftovers(path)
            if not (path / MANIFEST).exists():
                folder._write({})
            yield folder

    def records(self, name: str, cache_key: CacheKey) -> RecordFile:
        """The JSON-lines file `name`, to be added to; raises CheckpointError as `claim` does."""
        file = RecordFile(self.path / name)
        self.claim(name, cache_key, has_content=bool(file.records))
        return file

    def claim(self, name: str, cache_key: CacheKey, *, has_content: bool) -> None:
        """Note what `name` depends on; raises CheckpointError where it has content of something else."""
        new = json.loads(json.dumps(to_plain(cache_key), sort_keys=True))
        file = self.path / MANIFEST
        try:
            outputs: dict[str, Any] = json.loads(file.read_bytes())["outputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error!r}; give another --out") from error
        old = outputs.get(name)
        if old == new:
            return
        if has_content:
            old = old or {}
            differing = sorted(k for k in {**new, **old} if new.get(k) != old.get(k))
            raise CheckpointError(
                f"{self.path / name} was made with other settings (different: {', '.join(differing)}): "
                "give another --out, or remove that file to make it again"
            )
        self._write({**outputs, name: new})

    def _write(self, outputs: Mapping[str, Any]) -> None:
        content = {"kind": self.kind, "outputs": outputs, "process": describe_process()}
        with write_errors(self.path):
            atomic_write(self.path / MANIFEST, json.dumps(content, indent=1) + "\n")

    def _check_is_ours(self) -> None:
        manifest = self.path / MANIFEST
        if not self.path.exists() or (self.path.is_dir() and is_unused(self.path)):
            return
        try:
            kind = json.loads(manifest.read_bytes()).get("kind")
        except (OSError, ValueError, AttributeError):
            kind = None
        if kind != self.kind:
            raise CheckpointError(
                f"{self.path} is not empty and holds no job of this kind ({self.kind}): give another --out"
            )


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; fix that and run the same command again "
            "to resume"
        ) from error


def cache_folder(kind: str) -> Path:
    """Where results that can be computed again are kept: $HAFRM_CACHE/kind, or under the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HAFRM_CACHE", home / "hafrm")) / kind
