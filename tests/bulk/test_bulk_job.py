"""Bulk jobs from files to folders: the right scores in the right places, whatever interrupts them."""

import errno
import gzip
import json
import os
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafrm import atomic
from hafrm.bulk import bulk_job
from hafrm.bulk.bulk_job import BulkOptions, score_files
from hafrm.errors import CheckpointError, ConfigError, ModelError, NumericsError
from hafrm.run_folder import RecordFile
from hafrm.scoring.reward_model import RewardModel
from support.export_faults import FAULTS

WORDS = ("sun", "sea", "tree", "boat", "bird", "rain")
SMALL = BulkOptions(rows_per_shard=5)


@pytest.fixture(scope="module")
def model(exported):
    return exported / "reward"


@pytest.fixture(scope="module")
def rm(model):
    return RewardModel.from_pretrained(model)


@pytest.fixture
def scored(monkeypatch):
    """The shards that are scored from now on."""
    calls = []
    score_rows = bulk_job.score_rows
    monkeypatch.setattr(bulk_job, "score_rows", lambda *a: calls.append(a) or score_rows(*a))
    return calls


def a_row(i):
    """One of each shape in turn; every fourth cannot be scored."""
    word, other = WORDS[i % 6], WORDS[(i * 5 + 1) % 6]
    kinds = (
        {"response": word},
        {"responses": [f"{word} {k}" for k in range(i % 4 + 1)] + [word]},
        {"chosen": f"{word} {word}", "rejected": f"I would say {other}"},
        {"response": "  "},
    )
    return {"id": i, "prompt": f"Say {word}." + " Please." * (i % 3), **kinds[i % 4]}


def write_rows(file, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return str(file)


def write(file, numbers):
    return write_rows(file, map(a_row, numbers))


def read_lines(file):
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    return [json.loads(line) for line in data.splitlines()]


def outputs(folder):
    """What a job made, except for times and versions."""
    bad = sorted(line for p in folder.glob("_score/*/bad_rows.jsonl") for line in p.open())
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} | {"bad rows": bad}


def test_every_row_keeps_its_place_and_gets_the_scores_it_gets_alone(model, rm, tmp_path):
    sources = [
        write(tmp_path / "a.jsonl", range(12)),
        write(tmp_path / "b.jsonl.gz", range(12, 15)),
    ]
    progress = []
    result = score_files(
        model, sources, tmp_path / "out", SMALL, lambda *counts: progress.append(counts)
    )
    files = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file())
    assert files == [f"a-0000{k}-of-00003.jsonl" for k in range(3)] + ["b.jsonl.gz"]
    rows = [row for file in files for row in read_lines(tmp_path / "out" / file)]
    assert [row["id"] for row in rows] == list(range(15))
    for row in rows:
        if row["id"] % 4 == 3:
            assert row["reward"] is None and "empty response" in row["error"]
            continue
        scores = row.get("rewards") or [v for k, v in row.items() if k.endswith("reward")]
        texts = [row[k] for k in ("response", "chosen", "rejected") if k in row]
        expected = rm.score(row["prompt"], row.get("responses", texts))
        assert scores == pytest.approx(expected, abs=1e-5)
    assert (result.num_rows, result.num_bad, result.num_resumed) == (15, 3, 0)
    (file,) = (tmp_path / "out").glob("_score/*/bad_rows.jsonl")
    assert [(Path(b["source"]).name, b["row"]) for b in read_lines(file)] == [
        ("a.jsonl", row) for row in (3, 7, 11)
    ]
    assert progress[-1] == (15, 15)
    assert progress == sorted(progress)


def test_parquet_goes_in_and_comes_out(model, rm, tmp_path):
    prompts = ["Say sun.", "Say sea.", "Say sun."]
    table = pa.table({"prompt": prompts, "responses": [["sun", "no"], [], ["rain"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    score_files(model, [str(tmp_path / "a.parquet")], tmp_path / "out", BulkOptions(2))
    result = pq.read_table(tmp_path / "out")  # as readers of data folders do
    assert result.select(["prompt", "responses"]).equals(table)
    rewards = result.column("rewards").to_pylist()
    assert rewards[0] == pytest.approx(rm.score("Say sun.", ["sun", "no"]), abs=1e-5)
    assert rewards[1] is None
    assert "list of responses is empty" in result.column("error").to_pylist()[1]


def run_and_kill(action, at):
    """Run `action` in a process that is killed with -9 before its `at`-th write to the disk."""
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        count = 0

        def killing(function):
            def call(*arguments):
                nonlocal count
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return call

        atomic.Path.replace = killing(atomic.Path.replace)  # before each file is in place
        RecordFile.add = killing(RecordFile.add)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_job_killed_anywhere_resumes_and_ends_in_the_same_bytes(model, tmp_path, scored):
    """Killed before every single write, in turn; no finished shard is scored twice."""
    source = write(tmp_path / "a.jsonl", range(9))  # 2 shards, 2 lists of bad rows
    score_files(model, [source], tmp_path / "plain", SMALL)
    expected = outputs(tmp_path / "plain")
    for at in range(1, 100):
        out = tmp_path / f"killed-{at}"
        scored.clear()
        killed = run_and_kill(lambda out=out: score_files(model, [source], out, SMALL), at)
        lists = (out / "_score").glob("part-*/shards.jsonl")
        finished = sum(file.read_text().count("\n") for file in lists)
        result = score_files(model, [source], out, SMALL)
        assert result.num_resumed == finished
        assert len(scored) == 2 - finished
        assert outputs(out) == expected
        shutil.rmtree(out)
        if not killed:
            break
    assert at > 6  # the manifest, and for each shard its file, bad rows and record


def test_a_finished_job_is_not_scored_again_and_another_is_refused_by_what_differs(
    model, tmp_path, monkeypatch
):
    out, source = tmp_path / "out", write(tmp_path / "a.jsonl", range(6))
    first = score_files(model, [source], out, SMALL)
    other = shutil.copytree(model, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    changed = write(tmp_path / "other" / "a.jsonl", range(1, 7))
    monkeypatch.setattr(bulk_job, "ModelOutputs", None)  # nothing is scored any more
    for path, wanted, options, differs in (
        (model, source + "#limit=3", SMALL, r"inputs\)"),
        (model, changed, SMALL, r"inputs\)"),
        (model, source, BulkOptions(5, max_length=64), "max_length"),
        (other, source, SMALL, r"model\)"),
    ):
        with pytest.raises(CheckpointError, match=f"different: {differs}"):
            score_files(path, [wanted], out, options)
    moved = shutil.move(source, tmp_path / "other" / "a.jsonl")
    again = score_files(model, [str(moved)], out, SMALL)
    assert (again.num_resumed, again.num_rows) == (2, 6)
    assert (again.num_bad, again.num_responses) == (first.num_bad, first.num_responses)


def test_the_parts_of_a_job_array_are_together_the_whole_and_have_the_same_settings(
    model, tmp_path
):
    source = write(tmp_path / "a.jsonl", range(12))
    score_files(model, [source], tmp_path / "whole", SMALL)
    for i in (1, 0):
        options = BulkOptions(5, shard=f"{i}/2")
        result = score_files(model, [source], tmp_path / "parts", options)
        assert result.num_rows == {0: 7, 1: 5}[i]
        if i == 1:
            other = BulkOptions(5, max_length=64, shard="0/2")
            with pytest.raises(CheckpointError, match=r"different: max_length"):
                score_files(model, [source], tmp_path / "parts", other)
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")
    # another division of the same job finds the finished shards
    assert score_files(model, [source], tmp_path / "parts", SMALL).num_resumed == 3


def test_a_folder_with_other_things_and_a_file_are_no_output(model, tmp_path):
    """So an output never replaces an input, because that lies in a folder with other things."""
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in" / "a.jsonl", range(3))
    with pytest.raises(CheckpointError, match=r"not empty \(a.jsonl\)"):
        score_files(model, [source], tmp_path / "in")
    with pytest.raises(ConfigError, match="looks like a file"):
        score_files(model, [source], tmp_path / "out.jsonl")
    for shard in ("2/2", "3", "-1/2"):
        with pytest.raises(ConfigError, match="i/n"):
            score_files(model, [source], tmp_path / "out", BulkOptions(shard=shard))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


GOOD = {"prompt": "Say sun.", "response": "sun"}
SYSTEM = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
BAD_INPUT = [
    ({"prompt": "Say sun."}, "missing column"),
    ({"prompt": "Say sun.", "responses": []}, "empty"),
    ({"prompt": "Say sun.", "responses": ["sun", None]}, "not a string"),
    ({"prompt": "Say sun.", "chosen": "sun", "rejected": " "}, "empty response"),
    ({"prompt": "", "response": "sun"}, "empty prompt"),
    ({"prompt": "Say " + "sun " * 300, "response": "sun"}, "more than 128 tokens"),
    ({"prompt": "Say sun.", "response": "sun " * 300}, "more than 128 tokens"),
    ({"prompt": "Say \ud800.", "response": "sun"}, "unusable character"),
    (["Say sun.", "sun"], "unreadable row"),
    ({"prompt": SYSTEM, "response": "x"}, "not encodable: The chat template refuses group"),
]


def test_bad_rows_get_null_and_a_reason_and_their_neighbours_their_scores(model, rm, tmp_path):
    """A good row before each bad one; the template refuses system messages."""
    folder = shutil.copytree(model, tmp_path / "picky")
    template = (folder / "chat_template.jinja").read_text()
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(guard + template)
    source = write_rows(tmp_path / "in.jsonl", [r for bad, _ in BAD_INPUT for r in (GOOD, bad)])
    result = score_files(folder, [source], tmp_path / "out")
    rows = read_lines(tmp_path / "out" / "in.jsonl")
    assert result.num_bad == result.num_responses == len(BAD_INPUT)
    expected = rm.score("Say sun.", "sun")
    assert [row["reward"] for row in rows[::2]] == pytest.approx(
        [expected] * len(BAD_INPUT), abs=1e-5
    )
    for row, (_, reason) in zip(rows[1::2], BAD_INPUT, strict=True):
        assert reason in row["error"]
        assert all(v is None for name, v in row.items() if name.endswith(("reward", "rewards")))


def test_a_shard_without_a_row_to_score_has_no_scores_of_tokens(model, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [a_row(3)])
    options = BulkOptions(outputs=("implicit", "tokens"))
    sources = [bad, write(tmp_path / "none.jsonl", ())]
    result = score_files(model.parent / "policy", sources, tmp_path / "out", options)
    assert (result.num_bad, result.num_responses) == (1, 0)
    assert [len(read_lines(tmp_path / "out" / Path(file).name)) for file in sources] == [1, 0]


HEADLESS = {
    "policy": ("policy", lambda _: None),
    "value head beside": ("policy", FAULTS["a value head beside it"][1]),
    "head lost": ("reward", FAULTS["no head"][1]),
    "weights cut short": ("reward", FAULTS["weights cut short"][1]),
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_directory_without_a_whole_reward_model_scores_nothing(model, tmp_path, kind):
    """Never with a fresh head: two loads would give two scores for one text."""
    head, damage = HEADLESS[kind]
    folder = shutil.copytree(model.parent / head, tmp_path / "model")
    damage(folder)
    source = write_rows(tmp_path / "in.jsonl", [GOOD])
    with pytest.raises(ModelError):
        score_files(folder, [source], tmp_path / "out")
    assert not list((tmp_path / "out").glob("in*"))


def test_a_model_that_cannot_share_prompts_stops_the_job(model, tmp_path, monkeypatch):
    def broken(*_):
        raise NumericsError("differ")

    monkeypatch.setattr(bulk_job, "self_check", broken)
    with pytest.raises(NumericsError, match="differ"):
        score_files(model, [write(tmp_path / "a.jsonl", range(3))], tmp_path / "out")
    assert not (tmp_path / "out" / "a.jsonl").exists()


def test_a_damaged_or_lost_shard_is_scored_again_and_no_other(model, tmp_path, scored):
    source = write(tmp_path / "in.jsonl", range(11))
    score_files(model, [source], tmp_path / "out", SMALL)
    shards = sorted((tmp_path / "out").glob("in-*"))[1:]
    before = [shard.read_bytes() for shard in shards]
    shards[0].unlink()
    shards[1].write_bytes(before[1][:50])
    scored.clear()
    result = score_files(model, [source], tmp_path / "out", SMALL)
    assert (len(scored), result.num_resumed) == (2, 1)
    assert [shard.read_bytes() for shard in shards] == before


def test_a_full_disk_ends_the_job_by_name_and_the_next_call_resumes(model, tmp_path, monkeypatch):
    """ENOSPC, as the kernel reports it, when the second shard is synced."""
    source = write(tmp_path / "in.jsonl", range(12))
    synced = atomic.os.fsync
    left = 12  # up to the second shard

    def filling(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", filling)
        with pytest.raises(CheckpointError, match="No space left on device; fix that"):
            score_files(model, [source], tmp_path / "out", SMALL)
    assert not list(tmp_path.rglob(".*.tmp"))
    assert score_files(model, [source], tmp_path / "out", SMALL).num_resumed >= 1
