"""Run folders: the recipe, provenance, metrics and checkpoints of one run, safe against any kill.

    recipe.yaml  provenance.json  metrics.jsonl  samples.jsonl  checkpoints/step-N/  model/

A file or folder under its final name is complete (see `hafrm.atomic`). One process at a time writes
into a folder; the kernel drops its lock when it dies, however it dies.
"""

import contextlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hafrm.atomic import (
    atomic_write,
    check_manifest,
    clear_leftovers,
    is_unused,
    lock_directory,
    remove_directory,
)
from hafrm.errors import CheckpointError
from hafrm.provenance import describe_process
from hafrm.results import to_plain

log = logging.getLogger("hafrm")
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, oldest first; a last line cut by a kill is left out."""
    return [record for _, record in _metric_lines(path)]


def _metric_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    pairs = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise CheckpointError(f"{path}, line {number}: not a JSON object; remove that line")
        pairs.append((line, record))
    return pairs


class RunFolder:
    """One run on disk. Any process may read it; the one that writes holds its `lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_path = path / "recipe.yaml"
        self.metrics_path = path / "metrics.jsonl"
        self.samples_path = path / "samples.jsonl"
        self.provenance_path = path / "provenance.json"
        self.checkpoints_path = path / "checkpoints"
        self.model_path = path / "model"
        self.unverified_path = path / "model.unverified"

    @classmethod
    def create(cls, path: str | Path, recipe_text: str) -> "RunFolder":
        """A new run folder that holds its recipe; nothing may be there yet."""
        folder = cls(Path(path).expanduser())
        path = folder.path
        try:
            _check_empty(path)  # before a lock file would be left there
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the run folder {path}: {error.strerror}") from error
        with lock_directory(path):
            _check_empty(path)
            clear_leftovers(path)
            atomic_write(folder.recipe_path, recipe_text)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run folder, to read; enter its `lock` before writing."""
        path = Path(path).expanduser()
        if not (path / "recipe.yaml").is_file():
            inside = [p for p in path.absolute().parents if (p / "recipe.yaml").is_file()]
            hint = f"did you mean {inside[0]}?" if inside else "give the folder of a run"
            raise CheckpointError(f"{path} is not a run folder, it has no recipe.yaml: {hint}")
        return cls(path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other writers out of a `with` block, and clear what a kill left."""
        with lock_directory(self.path):
            clear_leftovers(self.path)
            clear_leftovers(self.checkpoints_path)
            self.truncate_after(sys.maxsize)
            for path in self._checkpoint_directories():
                if not _is_complete(path):  # its step must be free to be written again
                    shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
                    path.rename(path.with_suffix(".damaged"))
            yield

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line, with its "step", to metrics.jsonl; a kill after this returns cannot lose it."""
        self._append(self.metrics_path, record)

    def append_sample(self, record: Mapping[str, Any]) -> None:
        """As `append_metrics`, to samples.jsonl, which holds what a policy wrote."""
        self._append(self.samples_path, record)

    def _append(self, path: Path, record: Mapping[str, Any]) -> None:
        assert isinstance(record["step"], int), "a resume drops records by their step"
        line = json.dumps(to_plain(record), allow_nan=False) + "\n"
        with path.open("ab") as file:
            file.write(line.encode("utf-8"))

    def truncate_after(self, step: int) -> None:
        """Drop the records of later steps, and torn last lines, before a resume writes them again."""
        for path in (self.metrics_path, self.samples_path):
            lines = _metric_lines(path)
            content = b"".join(line + b"\n" for line, r in lines if r.get("step", step) <= step)
            if path.exists() and content != path.read_bytes():
                atomic_write(path, content)

    def record_provenance(
        self, *, seed: int, data: Mapping[str, str], details: Mapping[str, Any] | None = None
    ) -> None:
        """Add this process to provenance.json: versions, command line, commit, seed, data digests."""
        path = self.provenance_path
        # one entry per process of a resumed run
        sessions = json.loads(path.read_bytes())["sessions"] if path.exists() else []
        entry = {"seed": seed, "data": dict(data), **to_plain(details or {})}
        sessions.append(describe_process() | entry)
        atomic_write(path, json.dumps({"sessions": sessions}, indent=1) + "\n")

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after optimizer step `step` lies, existing or not."""
        return self.checkpoints_path / f"step-{step}"

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, by step; others are left out with a warning."""
        return [path for path in self._checkpoint_directories() if _is_complete(path)]

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the latest step, or None."""
        return next(iter(self.checkpoints()[::-1]), None)

    def prune(self, keep: int, protect: Collection[int] = ()) -> None:
        """Remove all complete checkpoints but the newest `keep` and those of steps in `protect`."""
        assert keep >= 1, "a run must keep something to resume from"
        for path in self.checkpoints()[:-keep]:
            if step_of(path) not in protect:
                remove_directory(path)

    def _checkpoint_directories(self) -> list[Path]:
        paths = self.checkpoints_path.glob("step-*")
        return sorted((path for path in paths if _STEP.fullmatch(path.name)), key=step_of)


def _is_complete(checkpoint: Path) -> bool:
    try:
        check_manifest(checkpoint)
    except CheckpointError as error:
        log.warning("%s is not used: %s", checkpoint, error)
        return False
    return True


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint was written after, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def _check_empty(path: Path) -> None:
    if path.is_dir() and not is_unused(path):
        raise CheckpointError(
            f"{path} is not empty: resume its run with --resume {path}, or give another --out"
        )
