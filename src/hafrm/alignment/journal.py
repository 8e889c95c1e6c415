"""Results that land in files as they are made: JSON lines, appended, so that a killed job goes on.

    OUT/<name>.jsonl     one record a line, known by its `id`; whole lines only
    OUT/manifest.json    what decided about each of these files

A file is only added to by a job that would have made the same records; another one is refused and told
what differs. One process at a time writes into a folder.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hafrm.atomic import LOCK, atomic_write, clear_leftovers, is_leftover, lock_directory
from hafrm.errors import CheckpointError
from hafrm.provenance import describe_process
from hafrm.run_folder import read_json_lines

MANIFEST = "manifest.json"


class Journal:
    """The records of one file."""

    def __init__(self, file: Path) -> None:
        """Reads what is there; a last line that a kill cut short is taken away."""
        self.file = file
        self.records: dict[str, dict[str, Any]] = {r["id"]: r for r in read_json_lines(file)}
        content = file.read_bytes() if file.exists() else b""
        if content and not content.endswith(b"\n"):
            atomic_write(file, content[: content.rfind(b"\n") + 1])

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records; a kill after this returns cannot lose them."""
        lines = [json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.file.open("ab") as file:
                file.write("".join(lines).encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.file}: {error.strerror or error}; once that is mended, the same "
                "command goes on"
            ) from error
        self.records |= {r["id"]: dict(r) for r in records}


class JobFolder:
    """The output folder of a job, and what decided about its files."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, kind: str) -> Iterator["JobFolder"]:
        """A new folder, or one in which a job of this kind was begun, locked while the block runs.

        Raises CheckpointError for a folder that holds something else, or that another process uses.
        """
        folder = cls(path, kind)
        folder._check_room()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {path}: {error.strerror}") from error
        with lock_directory(path):
            clear_leftovers(path)
            if not (path / MANIFEST).exists():
                folder._write({})
            yield folder

    def journal(self, name: str, decides: Mapping[str, Any]) -> Journal:
        """The file `name`, to be added to; `decides` is all that its records depend on.

        Raises CheckpointError where the file has records that depend on something else.
        """
        journal = Journal(self.path / name)
        wanted = json.loads(json.dumps(decides, sort_keys=True))
        known = self._read()
        before = known.get(name)
        if before != wanted:
            if journal.records:
                before = before or {}
                other = [key for key in {**wanted, **before} if wanted.get(key) != before.get(key)]
                raise CheckpointError(
                    f"{journal.file} was made otherwise (different: {', '.join(sorted(other))}): give "
                    "another --out, or remove that file to make it anew"
                )
            self._write({**known, name: wanted})
        return journal

    def _read(self) -> dict[str, Any]:
        file = self.path / MANIFEST
        try:
            files: dict[str, Any] = json.loads(file.read_bytes())["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error!r}; give another --out") from error
        return files

    def _write(self, files: Mapping[str, Any]) -> None:
        content = {"kind": self.kind, "files": files, "process": describe_process()}
        atomic_write(self.path / MANIFEST, json.dumps(content, indent=1) + "\n")

    def _check_room(self) -> None:
        manifest = self.path / MANIFEST
        if self.path.is_file():
            raise CheckpointError(f"{self.path} is a file; give a folder")
        if manifest.is_file():
            try:
                kind = json.loads(manifest.read_bytes()).get("kind")
            except (ValueError, AttributeError):
                kind = None
            if kind == self.kind:
                return
        elif not self.path.is_dir() or not any(
            e.name != LOCK and not is_leftover(e) for e in self.path.iterdir()
        ):
            return
        raise CheckpointError(
            f"{self.path} is not empty and no job of this kind ({self.kind}) was begun there: give "
            "another --out"
        )
