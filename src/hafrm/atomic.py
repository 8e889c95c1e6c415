"""Files and directories that are complete or absent, whatever kills the process that writes them.

Content is written beside its place under a hidden name (`.<name>.<random>.tmp`), synced and renamed.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from hafrm.errors import CheckpointError, HafrmError

log = logging.getLogger("hafrm")
LOCK = ".lock"
MANIFEST = "manifest.json"
HASHED_BYTES = 16 * 2**20  # larger files are not hashed: tens of gigabytes would delay a resume
SAMPLE_BYTES, NUM_SAMPLES = 2**16, 256  # what `quick_fingerprint` reads of larger files


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a CheckpointError that names `path`."""
    try:
        yield
    except HafrmError:  # some are OSErrors too
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {path}: {reason}; fix that, run it again") from error


def check_writable(path: Path) -> None:
    """Raise CheckpointError now if `path` cannot be written later, after hours of work."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        probe = _aside(folder / path.name)
        probe.touch()
        probe.unlink()


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`, and create its folder if it is missing: after any kill it is the old file
    or the new one, never a mix."""
    with atomic_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` if the block ends without an error."""
    aside = _aside(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # before the rename: the power may fail between them
            aside.replace(path)
        finally:
            with contextlib.suppress(OSError):  # the error above says more
                aside.unlink(missing_ok=True)
        _sync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty directory to fill, which becomes `path` if the block ends without an error."""
    if path.exists() and not replace:
        raise CheckpointError(f"{path} exists already: remove it or choose another place")
    aside = _aside(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        try:
            yield aside
            for directory, _, files in os.walk(aside):
                for name in files:
                    _sync(Path(directory, name))
                _sync(Path(directory))
            if path.exists():  # a kill right here leaves neither: replace only what can be remade
                remove_directory(path)
            aside.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_directory(path: Path) -> None:
    """Remove a directory; a kill half-way never leaves part of it under its name."""
    aside = _aside(path)
    path.rename(aside)
    shutil.rmtree(aside)


def _is_leftover(path: Path) -> bool:
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name) is not None


def is_unused(directory: Path, but: Collection[str] = ()) -> bool:
    """Whether the directory holds nothing but a lock, what killed writers left, and files `but`."""
    return all(entry.name in (LOCK, *but) or _is_leftover(entry) for entry in directory.iterdir())


def clear_leftovers(directory: Path, names: Collection[str] | None = None) -> None:
    """Remove what killed writers left in `directory`; with `names`, only of these files."""
    for leftover in [path for path in directory.glob(".*.tmp") if _is_leftover(path)]:
        if names is not None and leftover.name[1:].rsplit(".", 2)[0] not in names:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


@contextlib.contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold the lock of `directory`; raises CheckpointError when another process does."""
    import fcntl  # noqa: PLC0415 - absent on Windows, where run folders can still be read

    with write_errors(directory / LOCK):
        file = (directory / LOCK).open("a+b", buffering=0)
    with file:
        try:
            # the kernel's lock counts, not the file's existence: a killed holder blocks nobody
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(32).decode("ascii", "replace") or "(unknown)"
            raise CheckpointError(f"{directory} is in use by process {holder}") from None
        except OSError as error:  # some network file systems have no locks; a run is still possible
            log.warning("%s cannot be locked (%s): start no second run in it", directory, error)
        with write_errors(directory / LOCK):
            file.truncate(0)
            file.write(str(os.getpid()).encode("ascii"))
        yield


def fingerprint(path: Path) -> str:
    """Digest of a file's content, as "sha256:<hexadecimal>"."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def quick_fingerprint(path: Path) -> str:
    """Like `fingerprint`, but in less than a second for any size: for files above HASHED_BYTES, the digest
    of the size and of NUM_SAMPLES pieces at equal distances, including the first and the last."""
    size = path.stat().st_size
    if size <= HASHED_BYTES:
        return fingerprint(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(NUM_SAMPLES):
            file.seek((size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return "sampled sha256:" + digest.hexdigest()


def write_manifest(directory: Path) -> None:
    """Write the manifest of `directory`: every file with its size, and its digest if it is small."""
    content = json.dumps({"files": _list_files(directory)}, indent=1)
    atomic_write(directory / MANIFEST, content + "\n")


def check_manifest(directory: Path) -> None:
    """Pass if `directory` holds exactly what its manifest lists; else CheckpointError names the file."""
    try:
        listed = dict(json.loads((directory / MANIFEST).read_bytes())["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{directory / MANIFEST} is damaged: {error}") from error
    present = _list_files(directory)
    for name in sorted({*present, *listed}):
        path = directory / name
        if name not in present or name not in listed:
            state = "missing" if name in listed else "not in the manifest"
            raise CheckpointError(f"{path} is {state}: the checkpoint is incomplete")
        if present[name] != listed[name]:
            raise CheckpointError(f"{path} was changed after it was written")


def _list_files(directory: Path) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        size, name = path.stat().st_size, path.relative_to(directory).as_posix()
        digest = {"digest": fingerprint(path)} if size <= HASHED_BYTES else {}
        files[name] = {"size": size, **digest}
    files.pop(MANIFEST, None)
    return files


def cache_folder(kind: str) -> Path:
    """The folder of results that can be recomputed: $HAFRM_CACHE/kind, or in the user's cache."""
    if "HAFRM_CACHE" in os.environ:
        return Path(os.environ["HAFRM_CACHE"]) / kind
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():  # a container's user may have none
        home = Path(tempfile.gettempdir(), f"home-{os.getuid()}")
    return Path(os.environ.get("XDG_CACHE_HOME", home / ".cache")) / "hafrm" / kind


def write_cache(file: Path, content: bytes | str) -> bool:
    """Write a file of the cache; if that fails, warn and return False: it costs time, not the run."""
    try:
        atomic_write(file, content)
    except CheckpointError as error:
        log.warning("nothing is cached: %s (HAFRM_CACHE names the folder)", error)
        return False
    return True
