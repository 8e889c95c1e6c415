"""A job's folder knows its finished shards, and no other job's; a full disk loses nothing."""

import errno
import json

import pytest

from hafrm import atomic
from hafrm.data.reader import BadRow
from hafrm.errors import CheckpointError
from hafrm.scoring.inputs import Shard
from hafrm.scoring.job_folder import JobFolder

DECIDES = {"model": "sha256:1", "inputs": [{"stem": "x", "num_rows": 6}]}
SHARDS = [Shard(f"x-{k}.jsonl", "x.jsonl", 3 * k, 3 * k + 3) for k in range(2)]
KNOWN = {
    "num_responses": 2,
    "num_cut": 0,
    "num_tokens": 20,
    "seconds": 0.1,
    "process": {"versions": {}},
}
BAD = [BadRow("x.jsonl", 1, "empty response", "`response` is ' '")]


@pytest.fixture
def job(tmp_path):
    return JobFolder.begin(tmp_path / "out", DECIDES, {"model": "m"})


def test_a_committed_shard_is_finished_and_its_bad_rows_are_listed(job):
    job.commit(SHARDS[0], b"scored\n", BAD, KNOWN)
    again = JobFolder.begin(job.path, DECIDES, {"model": "elsewhere"})
    record = again.record(SHARDS[0])
    assert (record.num_rows, record.num_bad, record.size) == (3, 1, 7)
    assert again.record(SHARDS[1]) is None
    (listed,) = again.bad_rows(SHARDS[0]).read_text().splitlines()
    assert json.loads(listed)["row"] == 1
    job.commit(SHARDS[0], b"scored\n", [], KNOWN)
    assert not job.bad_rows(SHARDS[0]).exists()


@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "no record", "another job's"])
def test_a_shard_that_is_not_as_it_was_written_is_scored_again(job, damage):
    job.commit(SHARDS[0], b"scored\n", [], KNOWN)
    file, record = job.path / SHARDS[0].file, job.records / f"{SHARDS[0].file}.json"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(b"scor")
    elif damage == "changed":
        file.write_bytes(b"SCORED\n")
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"key": "other"}))
    assert job.record(SHARDS[0]) is None


def test_another_job_is_refused_and_told_what_differs(job):
    job.commit(SHARDS[0], b"scored\n", [], KNOWN)
    with pytest.raises(CheckpointError, match=r"different: model\)"):
        JobFolder.begin(job.path, DECIDES | {"model": "sha256:2"}, {})


def test_a_job_that_finished_nothing_does_not_stand_in_the_way_of_another(job):
    other = JobFolder.begin(job.path, DECIDES | {"model": "sha256:2"}, {})
    other.commit(SHARDS[0], b"scored\n", [], KNOWN)
    assert job.record(SHARDS[0]) is None
    with pytest.raises(CheckpointError, match="another job"):
        JobFolder.begin(job.path, DECIDES, {})


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not empty \(mine.txt\)"):
        JobFolder.begin(tmp_path, DECIDES, {})
    with pytest.raises(CheckpointError, match="is a file"):
        JobFolder.begin(tmp_path / "mine.txt", DECIDES, {})
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_manifest_or_record_is_named(job):
    job.commit(SHARDS[0], b"scored\n", [], KNOWN)
    (job.records / f"{SHARDS[0].file}.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"x-0\.jsonl\.json is no record"):
        job.record(SHARDS[0])
    (job.records / "manifest.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        JobFolder.begin(job.path, DECIDES, {})


def test_a_full_disk_is_a_clear_error_and_what_was_finished_stays(job, monkeypatch):
    """ENOSPC as the kernel reports it, at the sync of the second shard's file."""
    job.commit(SHARDS[0], b"scored\n", [], KNOWN)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"x-1\.jsonl: No space left on device; once"):
            job.commit(SHARDS[1], b"scored\n", BAD, KNOWN)
    assert job.record(SHARDS[0]) is not None
    assert job.record(SHARDS[1]) is None
    assert sorted(p.name for p in job.path.iterdir()) == ["_score", "x-0.jsonl"]
    job.commit(SHARDS[1], b"scored\n", BAD, KNOWN)
    assert job.record(SHARDS[1]).num_bad == 1


def test_a_part_is_locked_and_cleared_of_its_own_leftovers_only(job):
    leftovers = [".x-0.jsonl.0123abcd.tmp", ".x-1.jsonl.0123abcd.tmp", ".mine.tmp"]
    for name in leftovers:
        (job.path / name).write_text("torn")
    (job.records / ".x-0.jsonl.json.0123abcd.tmp").write_text("torn")
    with job.lock((0, 2), SHARDS[:1]):
        with pytest.raises(CheckpointError, match="in use by process"):
            job.lock((0, 2), SHARDS[:1]).__enter__()
        with job.lock((1, 2), []):
            pass
    assert not (job.path / leftovers[0]).exists()
    assert all((job.path / name).exists() for name in leftovers[1:])
    assert not list(job.records.glob(".*.tmp"))
