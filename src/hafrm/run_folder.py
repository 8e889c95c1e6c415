"""Folders of runs and of long jobs, safe against any kill: whatever has its final name is complete.

    RUN/  recipe.yaml  provenance.json  metrics.jsonl  samples.jsonl  checkpoints/step-N/  model/
    JOB/  manifest.json (its kind, and the `cache_key` of each output)  <name>.jsonl

Only one process at a time writes into a folder; the kernel drops its lock when it dies, however it dies.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hafrm.atomic import (
    LOCK,
    MANIFEST,
    atomic_write,
    check_manifest,
    clear_leftovers,
    is_unused,
    lock_directory,
    remove_directory,
    write_errors,
)
from hafrm.errors import CheckpointError, ConfigError
from hafrm.results import to_plain

log = logging.getLogger("hafrm")
CacheKey = Mapping[str, Any]  # everything that a stored result depends on, by name, as JSON values
PACKAGES = (
    *("hafrm", "torch", "transformers", "tokenizers", "peft", "datasets", "accelerate"),
    *("safetensors", "numpy", "scipy", "pydantic", "jinja2", "pyarrow"),
)
"""The packages whose versions affect what a run computes."""
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, oldest first; a last line cut by a kill is left out."""
    return [record for _, record in _whole_lines(path)]


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    pairs = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step", 0), int):
            problem = "not a JSON object with a whole step; remove that line"
            raise CheckpointError(f"{path}, line {number}: {problem}")
        pairs.append((line, record))
    return pairs


def _drop_after(path: Path, step: int) -> None:
    """Rewrite a JSON-lines file without records of later steps and without a torn last line."""
    lines = _whole_lines(path)
    content = b"".join(line + b"\n" for line, r in lines if r.get("step", step) <= step)
    if path.exists() and content != path.read_bytes():
        atomic_write(path, content)


_KEY = (
    r"(?:api|secret|access)[_-]?key|passw(?:or)?d|secret|authorization|(?:auth|access|hf)[_-]?token"
    r"|headers|extra_query"
)
_SECRET = re.compile(
    # user:password@ of an address; then name: value, name=value, --name value and an address's query
    r"(?P<scheme>\w://)[^/\s'\"]+@"
    rf"|(?P<name>[\w-]*(?:{_KEY})['\"]?\s*[:=]\s*|--[\w-]*(?:{_KEY})\s+|[?&](?:key|token)=)"
    r"(?:\{[^}]*\}|'[^']*'|\"[^\"]*\"|(?:Bearer\s+)?[^\s'\",}]+)",
    re.I,
)


def hide_secrets(text: str) -> str:
    """The text with *** in place of passwords in URLs, and of the values of settings such as `api_key`."""
    return _SECRET.sub(lambda m: f"{m['scheme']}***@" if m["scheme"] else f"{m['name']}***", text)


def without_secrets(plain: Any) -> Any:
    """JSON data without what `hide_secrets` hides."""
    if isinstance(plain, dict):
        return {
            name: "***" if re.search(_KEY, name, re.I) else without_secrets(value)
            for name, value in plain.items()
        }
    if isinstance(plain, list):
        return [without_secrets(value) for value in plain]
    return hide_secrets(plain) if isinstance(plain, str) else plain


def describe_process() -> dict[str, Any]:
    """When, where and with what this process runs; fit to publish: no host name and no home directory."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    home = os.path.expanduser("~")
    program = Path(sys.argv[0]).name.replace("__main__.py", "hafrm")  # of python -m hafrm
    command = hide_secrets(shlex.join([program, *sys.argv[1:]]))
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command if home in {"~", "/"} else command.replace(home + "/", "~/"),
        "git": _git_state(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def _git_state() -> dict[str, Any] | None:
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], capture_output=True, timeout=20, check=True)  # noqa: S607
        except (OSError, subprocess.SubprocessError):  # no git, or outside a repository
            return None
        answers.append(done.stdout.decode("utf-8", "replace").strip())
    return {"commit": answers[0], "changed": bool(answers[1])}


class RunFolder:
    """One run on disk. Any process may read it; the process that writes holds its `lock`."""

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
        """A new run folder with its recipe; the folder may only contain a run that took no step."""
        folder = cls(expand_user(path))
        path = folder.path
        with write_errors(path):
            _check_empty(path)  # before a lock file is left there
            path.mkdir(parents=True, exist_ok=True)
        with lock_directory(path):
            _check_empty(path)
            clear_leftovers(path)
            for name in _OF_A_START:
                (path / name).unlink(missing_ok=True)
            atomic_write(folder.recipe_path, recipe_text)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run folder, for reading; enter its `lock` before writing."""
        path = expand_user(path)
        if not (path / "recipe.yaml").is_file():
            inside = [p for p in path.absolute().parents if (p / "recipe.yaml").is_file()]
            hint = f"did you mean {inside[0]}?" if inside else "give the folder of a run"
            raise CheckpointError(f"{path} is not a run folder, it has no recipe.yaml: {hint}")
        return cls(path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other writers out during a `with` block, and clean up what a kill left."""
        with lock_directory(self.path):
            clear_leftovers(self.path)
            clear_leftovers(self.checkpoints_path)
            self.truncate_after(sys.maxsize)
            for path in self._checkpoint_directories():
                if not _is_complete(path):  # so that its step can be written again
                    shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
                    path.rename(path.with_suffix(".damaged"))
            yield

    def append_metrics(self, record: Mapping[str, Any], path: Path | None = None) -> None:
        """Add one line, with its "step", to metrics.jsonl; a kill after this returns cannot lose it."""
        assert isinstance(record["step"], int), "a resume drops records by their step"
        path = path or self.metrics_path
        with write_errors(path), path.open("ab") as file:
            file.write((json.dumps(to_plain(record), allow_nan=False) + "\n").encode("utf-8"))

    def append_sample(self, record: Mapping[str, Any]) -> None:
        """Like `append_metrics`, for samples.jsonl, which holds what a policy wrote."""
        self.append_metrics(record, self.samples_path)

    def truncate_after(self, step: int) -> None:
        """Drop the records of later steps, and torn last lines, before a resume writes them again."""
        for path in (self.metrics_path, self.samples_path):
            _drop_after(path, step)

    def record_provenance(
        self,
        *,
        seed: int,
        data: Mapping[str, str],
        inputs: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Add this process to provenance.json: versions, command line, commit, seed, digests of data files
        and other inputs; CheckpointError if the run's steps were taken with other inputs."""
        sessions = self._sessions()
        entry = {"seed": seed, "data": dict(data), "inputs": dict(inputs or {})}
        if sessions and (self._checkpoint_directories() or self.model_path.is_dir()):
            before, now = sessions[-1]["data"] | sessions[-1]["inputs"], {**data, **(inputs or {})}
            changed = {name for name in before | now if before.get(name) != now.get(name)}
            if changed:
                raise CheckpointError(
                    f"changed since {self.path} took its steps: {', '.join(sorted(changed))}. Put back "
                    "what was there to resume, or start a new run with another --out"
                )
        sessions.append(describe_process() | entry | to_plain(details or {}))
        atomic_write(self.provenance_path, json.dumps({"sessions": sessions}, indent=1) + "\n")

    def _sessions(self) -> list[dict[str, Any]]:
        """One entry for each process of a resumed run."""
        path = self.provenance_path
        try:
            sessions = json.loads(path.read_bytes())["sessions"] if path.exists() else []
            return [{**s, "data": dict(s["data"]), "inputs": dict(s["inputs"])} for s in sessions]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}), so it cannot be checked that data and models are those "
                "of the run: restore it, or remove it to resume without that check"
            ) from error

    def checkpoint_path(self, step: int) -> Path:
        """The path of the checkpoint after optimizer step `step`, whether it exists or not."""
        return self.checkpoints_path / f"step-{step}"

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, by step; others are left out with a warning."""
        return [path for path in self._checkpoint_directories() if _is_complete(path)]

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the latest step, or None."""
        return max(self.checkpoints(), key=step_of, default=None)

    def prune(self, keep: int, protect: Collection[int] = ()) -> None:
        """Remove all complete checkpoints except the newest `keep` and those of steps in `protect`."""
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
    """The optimizer step that a checkpoint was written after, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


_OF_A_START = ("recipe.yaml", "provenance.json", "bad_rows.jsonl", "bad_validation_rows.jsonl")
"""What a run writes before its first step; such a folder counts as empty."""


def _check_empty(path: Path) -> None:
    # without a lock file, no run ever began here: the recipe is the user's
    ours = _OF_A_START if (path / LOCK).exists() else ()
    if path.is_dir() and not is_unused(path, ours):
        resume = "--resume it, or " if (path / "recipe.yaml").is_file() else ""
        raise CheckpointError(f"{path} is not empty: {resume}give another --out")


def expand_user(path: str | Path) -> Path:
    """The path with ~ replaced by a home folder; ConfigError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such user's home folder") from error


class RecordFile:
    """Records in one JSON-lines file by their `id`, in the order they were added."""

    def __init__(self, file: Path) -> None:
        self.file = file
        _drop_after(file, sys.maxsize)
        try:
            self.records = {str(r["id"]): r for r in read_json_lines(file)}
        except KeyError:
            fix = "remove that line, or give another --out"
            raise CheckpointError(f"{file} has a line without an id: {fix}") from None

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
    """A long job's output folder, which the same command resumes if all cache keys are the same."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, kind: str) -> Iterator["ResumableFolder"]:
        """A new folder, or one with a job of this kind, locked during the `with` block."""
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
        """The JSON-lines file `name`, to append to; raises CheckpointError as `claim` does."""
        file = RecordFile(self.path / name)
        self.claim(name, cache_key, has_content=bool(file.records))
        return file

    def claim(self, name: str, cache_key: CacheKey, *, has_content: bool) -> None:
        """Note what `name` depends on; raises CheckpointError if its content depends on something else."""
        new = without_secrets(json.loads(json.dumps(to_plain(cache_key), sort_keys=True)))
        file = self.path / MANIFEST
        try:
            outputs: dict[str, Any] = json.loads(file.read_bytes())["outputs"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged: {error}; give another --out") from error
        old = outputs.get(name) or {}
        if old == new:
            return
        if has_content:
            differing = sorted(k for k in {**new, **old} if new.get(k) != old.get(k))
            raise CheckpointError(
                f"{self.path / name} was made with other settings (different: {', '.join(differing)}): "
                "give another --out, or remove that file to make it again"
            )
        self._write({**outputs, name: new})

    def _write(self, outputs: Mapping[str, Any]) -> None:
        content = {"kind": self.kind, "outputs": outputs, "process": describe_process()}
        atomic_write(self.path / MANIFEST, json.dumps(content, indent=1) + "\n")

    def _check_is_ours(self) -> None:
        if not self.path.exists() or (self.path.is_dir() and is_unused(self.path)):
            return
        try:
            kind = json.loads((self.path / MANIFEST).read_bytes()).get("kind")
        except (OSError, ValueError, AttributeError, RecursionError):
            kind = None
        if kind != self.kind:
            problem = f"is not empty and holds no job of this kind ({self.kind})"
            raise CheckpointError(f"{self.path} {problem}: give another --out")
