"""Folders of runs and jobs under kills, torn files, damage and two writers; atomic files, manifests."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from hafrm import atomic
from hafrm.atomic import atomic_directory, atomic_write, check_manifest, write_cache, write_manifest
from hafrm.errors import CheckpointError
from hafrm.run_folder import (
    RecordFile,
    ResumableFolder,
    RunFolder,
    describe_process,
    hide_secrets,
    read_json_lines,
    step_of,
)

SOURCE = Path(__file__).resolve().parents[1] / "src"


def python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    """Another process that runs `code` and has said its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def save(run: RunFolder, step: int) -> Path:
    with atomic_directory(run.checkpoint_path(step)) as aside:
        (aside / "model.safetensors").write_bytes(bytes(step % 256 for _ in range(100)))
        (aside / "state.json").write_text(json.dumps({"step": step}))
        write_manifest(aside)
    return run.checkpoint_path(step)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "x: 1\n")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_atomic_write_that_fails_at_any_step_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    atomic_write(tmp_path / "a", "old")
    monkeypatch.setattr(os if broken == "fsync" else Path, broken, fail)
    with pytest.raises(CheckpointError, match="No space"):
        atomic_write(tmp_path / "a", "new")
    monkeypatch.undo()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_content_is_on_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Power may fail at any time: each rename comes between the content's syncs and its directory's."""
    events: list[str] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append("RENAME"), rename(a, b)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("RENAME"), replace(a, b)))
    with atomic_directory(tmp_path / "out") as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "deep").write_text("x")
        (aside / "top").write_text("x")
    before, after = events[: events.index("RENAME")], events[events.index("RENAME") + 1 :]
    assert (set(before), after) == ({"deep", "sub", "top", aside.name}, [tmp_path.name])
    events.clear()
    atomic_write(tmp_path / "a", "x")
    assert events[0].startswith(".a.") and events[1:] == ["RENAME", tmp_path.name]


def test_a_directory_is_replaced_only_when_asked_and_not_after_an_error(tmp_path: Path):
    with atomic_directory(tmp_path / "deep" / "out") as aside:
        (aside / "old").touch()
        assert names(tmp_path / "deep") == {aside.name}
    out = tmp_path / "deep" / "out"

    def save_and_fail() -> None:
        with atomic_directory(out, replace=True) as aside:
            (aside / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_and_fail()
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(out):
        pass
    assert (names(out), names(out.parent)) == ({"old"}, {"out"})
    with atomic_directory(out, replace=True) as aside:
        (aside / "new").touch()
    assert (names(out), names(out.parent)) == ({"new"}, {"out"})


KILLED_WHILE_SAVING = """
import sys
from hafrm.atomic import atomic_directory, write_manifest
from hafrm.run_folder import RunFolder
run = RunFolder.open(sys.argv[1])
with run.lock():
    print("ready", flush=True)
    step = 1
    while True:
        step += 1
        with atomic_directory(run.checkpoint_path(step)) as aside:
            for part in range(3):
                (aside / f"part-{part}").write_bytes(bytes([step % 256]) * 100_000)
            write_manifest(aside)
        run.append_metrics({"step": step, "loss": 1.0 / step})
        run.prune(keep=2)
"""


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.11])
def test_a_run_killed_while_saving_is_complete_or_absent_and_can_go_on(
    tmp_path: Path, delay: float
):
    """SIGKILL at an arbitrary moment of a loop that does nothing but save, log and prune."""
    run = RunFolder.create(tmp_path / "run", "seed: 0\n")
    save(run, 1)
    process = python(KILLED_WHILE_SAVING, str(run.path))
    time.sleep(delay)
    kill(process)
    assert process.returncode == -signal.SIGKILL

    for checkpoint in run.checkpoints_path.glob("step-*"):
        check_manifest(checkpoint)
    latest = run.latest_checkpoint()
    assert latest is not None
    step = step_of(latest)
    with run.lock():
        assert all(re.fullmatch(r"step-\d+", name) for name in names(run.checkpoints_path))
        run.truncate_after(step)
        logged = [record["step"] for record in read_json_lines(run.metrics_path)]
        # the metrics of a step are written after its checkpoint, so the last may be missing
        assert logged in (list(range(2, step + 1)), list(range(2, step)))
        save(run, step + 1)
    assert run.latest_checkpoint() == run.checkpoint_path(step + 1)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("large", lambda path: path.write_bytes(b"1234")),
        ("sub/b", lambda path: path.write_bytes(b"abd")),
        ("sub/b", Path.unlink),
        ("c", Path.touch),
    ],
    ids=["shorter", "changed", "gone", "added"],
)
def test_damage_of_any_kind_is_noticed_and_the_file_named(tmp_path: Path, monkeypatch, name, harm):
    """Large files are known by their size: hashing tens of gigabytes at every resume takes minutes."""
    monkeypatch.setattr(atomic, "HASHED_BYTES", 4)
    (tmp_path / "sub").mkdir()
    (tmp_path / "large").write_bytes(b"12345")
    (tmp_path / "sub" / "b").write_bytes(b"abc")
    write_manifest(tmp_path)
    # sha256 of "abc" is FIPS 180-2's first example
    digest = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert json.loads((tmp_path / "manifest.json").read_text())["files"] == {
        "large": {"size": 5},
        "sub/b": {"size": 3, "digest": digest},
    }
    check_manifest(tmp_path)
    harm(tmp_path / name)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
        check_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}'])
def test_a_damaged_or_missing_manifest_is_an_incomplete_checkpoint(tmp_path: Path, text: str):
    with pytest.raises(CheckpointError, match="never finished"):
        check_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        check_manifest(tmp_path)


def test_a_new_run_folder_holds_its_recipe_and_what_a_kill_left_counts_as_nothing(tmp_path: Path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".recipe.yaml.0123abcd.tmp").touch()
    run = RunFolder.create(tmp_path, "seed: 0\n")
    assert names(tmp_path) == {".lock", "recipe.yaml"}
    assert RunFolder.open(str(run.path)).recipe_path.read_text() == "seed: 0\n"
    assert run.latest_checkpoint() is None
    assert read_json_lines(run.metrics_path) == []


def test_a_folder_that_holds_something_is_never_overwritten_unasked(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / ".notes.tmp").touch()
    with pytest.raises(CheckpointError, match="empty"):
        RunFolder.create(tmp_path, "x: 1\n")
    assert names(tmp_path) == {"thesis.tex", ".notes.tmp"}
    run = RunFolder.create(tmp_path / "run", "x: 1\n")
    run.append_metrics({"step": 1})
    with pytest.raises(CheckpointError, match="--resume"):
        RunFolder.create(run.path, "x: 2\n")
    assert run.recipe_path.read_text() == "x: 1\n"
    with pytest.raises(CheckpointError, match=r"cannot write .*thesis\.tex: File exists"):
        RunFolder.create(tmp_path / "thesis.tex", "x: 1\n")


def test_a_run_that_took_no_step_can_be_started_again_and_a_users_recipe_stays(run: RunFolder):
    run.record_provenance(seed=0, data={"a": "1"})
    (run.path / "bad_rows.jsonl").touch()
    with run.lock():
        pass
    again = RunFolder.create(run.path, "x: 2\n")
    assert names(run.path) == {".lock", "recipe.yaml"}
    assert again.recipe_path.read_text() == "x: 2\n"
    (run.path / ".lock").unlink()  # nothing of ours was ever here
    with pytest.raises(CheckpointError, match="is not empty"):
        RunFolder.create(run.path, "x: 3\n")


def test_a_resume_names_the_inputs_that_changed_once_a_step_was_taken(run: RunFolder):
    run.record_provenance(seed=0, data={"a": "1"}, inputs={"base": "1"})
    run.record_provenance(seed=0, data={"a": "2", "b": "1"}, inputs={"base": "2"})
    save(run, 1)
    run.record_provenance(seed=0, data={"a": "2", "b": "1"}, inputs={"base": "2"})
    with pytest.raises(CheckpointError, match=r"took its steps: b, base, c\. Put back"):
        run.record_provenance(seed=0, data={"a": "2", "c": "1"}, inputs={"base": "1"})
    assert len(json.loads(run.provenance_path.read_text())["sessions"]) == 3


@pytest.mark.parametrize(
    "content", [b"\xff", b"[]", b"{}", b'{"sessions": 3}', b'{"sessions": [3]}', b"[" * 100_000]
)
def test_a_damaged_provenance_says_how_to_resume_all_the_same(run: RunFolder, content: bytes):
    run.provenance_path.write_bytes(content)
    with pytest.raises(CheckpointError, match="or remove it to resume without"):
        run.record_provenance(seed=0, data={})


@pytest.mark.parametrize("line", ['{"step": "x"}', "[" * 100_000, '{"step": NULL}'])
def test_a_damaged_line_of_metrics_is_named(run: RunFolder, line: str):
    run.metrics_path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
        run.truncate_after(1)


def test_large_files_are_known_by_size_and_samples_of_their_content(tmp_path: Path, monkeypatch):
    """8 pieces of 2 bytes of 100 lie at (100 - 2) * i // 7: 0, 14, ..., 98."""
    monkeypatch.setattr(atomic, "HASHED_BYTES", 4)
    monkeypatch.setattr(atomic, "SAMPLE_BYTES", 2)
    monkeypatch.setattr(atomic, "NUM_SAMPLES", 8)
    file, content = tmp_path / "a", bytearray(range(100))

    def digest() -> str:
        file.write_bytes(content)
        return atomic.quick_fingerprint(file)

    first = digest()
    for place, is_seen in ((99, True), (14, True), (50, False), (0, True)):
        content[place] ^= 1
        assert (digest() != first) == is_seen
        content[place] ^= 1
    content.append(1)
    assert digest() != first


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), SafetensorError("I/O error: full")]
)
def test_a_full_disk_is_one_clear_error_that_leaves_nothing(tmp_path: Path, error: Exception):
    with pytest.raises(CheckpointError, match=r"cannot write .*out: .*(space|full)"):  # noqa: SIM117
        with atomic_directory(tmp_path / "out"):
            raise error
    assert names(tmp_path) == set()


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog):
    (tmp_path / "cache").touch()
    assert not write_cache(tmp_path / "cache" / "reference" / "a", b"x")
    assert "nothing is cached: cannot write" in caplog.text
    assert write_cache(tmp_path / "b" / "a", b"x")


def test_opening_what_is_no_run_folder_says_what_would_be_one(run: RunFolder, tmp_path: Path):
    with pytest.raises(CheckpointError, match="give the folder of a run"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=re.escape(f"did you mean {run.path}?")):
        RunFolder.open(save(run, 3))


HOLDS_THE_LOCK = """
import sys
from hafrm.run_folder import RunFolder
with RunFolder.open(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_kept_out_until_the_first_ends(run: RunFolder):
    holder = python(HOLDS_THE_LOCK, str(run.path))
    message = f"in use by process {holder.pid}"
    with pytest.raises(CheckpointError, match=message), run.lock():
        pass
    holder.communicate("done\n")
    with run.lock():
        pass
    holder = python(HOLDS_THE_LOCK, str(run.path))
    kill(holder)
    assert (run.path / ".lock").read_text() == str(holder.pid), "the stale file is still there"
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_metrics_are_read_back_numbers_that_json_lacks_as_null_and_those_of_numpy_plain(
    run: RunFolder,
):
    run.append_metrics({"step": 1, "kind": "train", "by_source": {"\u00e9": [1, 2.5]}})
    run.append_metrics(
        {"step": 2, "a": math.nan, "b": [math.inf, np.float32(0.5)], "c": np.int64(3)}
    )
    assert read_json_lines(run.metrics_path) == [
        {"step": 1, "kind": "train", "by_source": {"\u00e9": [1, 2.5]}},
        {"step": 2, "a": None, "b": [None, 0.5], "c": 3},
    ]


@pytest.mark.parametrize("cut", [1, 11, 21])
def test_a_last_line_torn_anywhere_is_dropped_and_the_next_one_stands_alone(
    run: RunFolder, cut: int
):
    """The second record is {"step": 2, "x": 2.5} and a line end, 22 bytes: torn after 1 to 21."""
    for step in (1, 2):
        run.append_metrics({"step": step, "x": 2.5})
    whole = run.metrics_path.read_bytes()
    assert len(whole) == 44
    run.metrics_path.write_bytes(whole[: 22 + cut])
    assert read_json_lines(run.metrics_path) == [{"step": 1, "x": 2.5}]
    with run.lock():
        run.append_metrics({"step": 2, "x": 3.5})
    assert read_json_lines(run.metrics_path) == [{"step": 1, "x": 2.5}, {"step": 2, "x": 3.5}]


def test_truncation_drops_later_steps_of_every_kind_and_keeps_the_bytes_of_the_rest(run: RunFolder):
    for step in (10, 20, 30):
        run.append_metrics({"step": step, "kind": "train", "x": 1e-5})
        run.append_metrics({"step": step, "kind": "validation"})
    whole = run.metrics_path.read_bytes()
    run.truncate_after(20)
    assert run.metrics_path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    run.truncate_after(5)
    assert run.metrics_path.read_bytes() == b""
    run.metrics_path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        read_json_lines(run.metrics_path)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_its_step_written_again(
    run: RunFolder, caplog: pytest.LogCaptureFixture
):
    save(run, 10)
    (save(run, 20) / "state.json").write_text("{}")
    assert run.latest_checkpoint() == run.checkpoint_path(10)
    assert "step-20 is not used" in caplog.text
    for _ in range(2):
        with run.lock():
            assert names(run.checkpoints_path) == {"step-10", "step-20.damaged"}
            (save(run, 20) / "state.json").unlink()
    with run.lock():
        save(run, 20)
    assert run.latest_checkpoint() == run.checkpoint_path(20)


def test_pruning_keeps_the_newest_and_the_protected_and_counts_no_damaged_ones(run: RunFolder):
    """A damaged one must not count: pruning to one would delete the only checkpoint that works."""
    for step in (10, 100, 20, 30, 40):
        save(run, step)
    (run.checkpoints_path / "step-007").mkdir()
    assert step_of(run.latest_checkpoint()) == 100
    shutil.rmtree(run.checkpoint_path(100))
    (run.checkpoints_path / "step-007").rmdir()
    run.prune(keep=2, protect=[10, 999, -1])
    assert names(run.checkpoints_path) == {"step-10", "step-30", "step-40"}
    run.prune(keep=5)
    (run.checkpoint_path(40) / "state.json").unlink()
    run.prune(keep=1)
    assert run.latest_checkpoint() == run.checkpoint_path(30)
    assert names(run.checkpoints_path) == {"step-30", "step-40"}


def test_a_checkpoint_half_deleted_by_a_kill_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pruning renames before it deletes, so the half that a kill leaves has no checkpoint's name."""

    def killed(path: Path) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    run = RunFolder.create(tmp_path / "run", "x: 1\n")
    save(run, 10)
    save(run, 20)
    monkeypatch.setattr(atomic.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.prune(keep=1)
    monkeypatch.undo()
    assert run.checkpoints() == [run.checkpoint_path(20)]
    with run.lock():
        assert names(run.checkpoints_path) == {"step-20"}


def test_taking_the_lock_clears_what_a_kill_left_and_nothing_of_the_users(run: RunFolder):
    save(run, 10)
    (run.checkpoints_path / ".step-20.0a1b2c3d.tmp").mkdir()
    (run.checkpoints_path / ".step-20.0a1b2c3d.tmp" / "model.safetensors").touch()
    (run.path / ".metrics.jsonl.0a1b2c3d.tmp").touch()
    (run.path / ".mine.tmp").touch()
    (run.path / "notes.txt").touch()
    with run.lock():
        assert names(run.checkpoints_path) == {"step-10"}
        assert names(run.path) == {".lock", ".mine.tmp", "checkpoints", "notes.txt", "recipe.yaml"}


def test_provenance_says_what_a_number_depends_on_and_grows_with_every_resume(run: RunFolder):
    run.record_provenance(seed=3, data={"data": "sha256:1"}, details={"device": "cpu"})
    run.record_provenance(seed=3, data={})
    first, second = json.loads(run.provenance_path.read_text())["sessions"]
    assert (first["seed"], first["data"], first["device"]) == (3, {"data": "sha256:1"}, "cpu")
    assert first["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "numpy"} <= set(first["versions"])
    assert second["started"] >= first["started"]
    assert set(first) >= {"command", "git", "platform"}


def test_provenance_names_the_commit_and_neither_the_host_nor_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(sys, "argv", ["/opt/bin/hafrm", "train", "/home/someone/a b.yaml", "x.y=1"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    process = describe_process()
    assert process["command"] == "hafrm train '~/a b.yaml' x.y=1"
    monkeypatch.setattr(
        sys, "argv", ["/lib/hafrm/__main__.py", "data"]
    )  # python -m hafrm, torchrun
    assert describe_process()["command"] == "hafrm data"
    assert not {"someone", os.uname().nodename} & set(re.findall(r"[\w.-]+", json.dumps(process)))
    assert process["git"] is None
    git("init", "--quiet")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "-m", "x")
    assert describe_process()["git"] == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "a").write_text("2")
    assert describe_process()["git"]["changed"] is True
    monkeypatch.setenv("PATH", "")
    assert describe_process()["git"] is None


def test_records_come_back_and_a_line_that_a_kill_cut_short_is_removed(tmp_path: Path):
    file = tmp_path / "x.jsonl"
    RecordFile(file).add([{"id": "a", "n": 1}, {"id": "b", "n": 2}])
    with file.open("ab") as open_file:
        open_file.write(b'{"id": "c", "n"')
    records = RecordFile(file)
    assert list(records.records) == ["a", "b"]
    records.add([{"id": "c", "n": 3}])
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "b", "c"]


def test_an_output_made_with_other_settings_is_refused_and_what_differs_is_named(tmp_path: Path):
    out = tmp_path / "out"
    with ResumableFolder.open(out, "best-of-n") as folder:
        folder.records("a.jsonl", {"seed": 0, "num": 4}).add([{"id": "x"}])
        folder.records("empty.jsonl", {"seed": 0})
    with ResumableFolder.open(out, "best-of-n") as folder:
        assert list(folder.records("a.jsonl", {"num": 4, "seed": 0}).records) == ["x"]
        with pytest.raises(CheckpointError, match=r"different: seed\).*another --out"):
            folder.records("a.jsonl", {"seed": 1, "num": 4})
        folder.records("empty.jsonl", {"seed": 1})  # nothing depends on it yet


def test_jobs_refuse_folders_of_something_else_files_and_folders_in_use(
    run: RunFolder, tmp_path: Path
):
    def refused(path: Path, kind: str, message: str) -> None:
        with pytest.raises(CheckpointError, match=message), ResumableFolder.open(path, kind):
            pass

    refused(run.path, "b", "not empty")
    refused(run.recipe_path, "b", "not empty")
    with ResumableFolder.open(tmp_path / "out", "b"):
        refused(tmp_path / "out", "b", "in use")
    refused(tmp_path / "out", "other", "no job of this kind")


@pytest.mark.parametrize(
    "typed",
    [
        "--judge http://me:SECRET@host:80/v1",
        "--judge http://me:p@SECRET@host/v1",
        "--api-key SECRET",
        "judge.request='{api_key: SECRET, top_p: 1}'",
        '\'policy.request={"headers": {"Authorization": "Bearer SECRET"}}\'',
        "--policy-request api_key=SECRET",
        "judge.request='{top_p: 1, extra_headers: {X-Token: SECRET, X-Org: SECRET}}'",
        "--policy 'https://host/v1?token=SECRET&x=1'",
    ],
)
def test_passwords_and_keys_reach_neither_provenance_nor_manifests(
    tmp_path: Path, monkeypatch, typed: str
):
    monkeypatch.setattr(sys, "argv", ["hafrm", "best-of-n", *shlex.split(typed), "draw.num=4"])
    command = describe_process()["command"]
    assert "SECRET" not in command
    assert command.endswith("draw.num=4")
    key = {"judge": {"url": typed, "request": {"api_key": "SECRET", "max_tokens": 5}}}
    with ResumableFolder.open(tmp_path / "job", "a job") as folder:
        folder.claim("x.jsonl", key, has_content=False)
        folder.claim("x.jsonl", key, has_content=True)
    written = (tmp_path / "job/manifest.json").read_text()
    assert "SECRET" not in written
    assert '"max_tokens": 5' in written


def test_what_is_no_secret_is_not_hidden():
    for text in ("max_tokens: 512", "the password is wrong", "http://host/a@b", "eos_token=x"):
        assert hide_secrets(text) == text
