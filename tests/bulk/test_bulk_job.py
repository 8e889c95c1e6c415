"""Bulk jobs from files to files: the right scores in the right places, whatever interrupts them."""

import gzip
import json
import os
import shutil
import signal
import time

import pytest

from exports_for_tests import export_both
from hafrm import atomic
from hafrm.bulk import bulk_job
from hafrm.bulk.bulk_job import BulkOptions, parse_part, score_files
from hafrm.errors import CheckpointError, ConfigError, DataError, ModelError, NumericsError
from hafrm.resumable import RecordFile
from hafrm.scoring.reward_model import RewardModel

WORDS = ("sun", "sea", "tree", "boat", "bird", "rain")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    export_both(folder)
    return folder / "reward"


@pytest.fixture(scope="module")
def rm(model):
    return RewardModel.from_pretrained(model)


def a_row(i):
    word, other = WORDS[i % 6], WORDS[(i * 5 + 1) % 6]
    kinds = (
        {"response": word},
        {"responses": [f"{word} {k}" for k in range(i % 4 + 1)] + [word]},
        {"chosen": f"{word} {word}", "rejected": f"I would say {other}"},
        {"response": "  "},
    )
    return {"id": i, "prompt": f"Say {word}." + " Please." * (i % 3), **kinds[i % 4]}


def write(file, numbers):
    file.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(a_row(i)) + "\n" for i in numbers)
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return str(file)


def read_lines(file):
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    return [json.loads(line) for line in data.splitlines()]


def outputs(folder):
    """What a job made, but for times and the like."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    bad = sorted(line for p in folder.glob("_score/*/bad_rows.jsonl") for line in p.open())
    return {name: (folder / name).read_bytes() for name in names} | {"bad rows": bad}


SMALL = BulkOptions(rows_per_shard=5)


def test_every_row_keeps_its_place_and_gets_the_scores_it_gets_alone(model, rm, tmp_path):
    sources = [
        write(tmp_path / "a.jsonl", range(12)),
        write(tmp_path / "b.jsonl.gz", range(12, 15)),
    ]
    result = score_files(model, sources, tmp_path / "out", SMALL)
    files = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file())
    assert files == [f"a-0000{k}-of-00003.jsonl" for k in range(3)] + ["b.jsonl.gz"]
    rows = [row for file in files for row in read_lines(tmp_path / "out" / file)]
    assert [row["id"] for row in rows] == list(range(15))
    for row in rows:
        if row["id"] % 4 == 3:
            assert row["reward"] is None
            assert "empty response" in row["error"]
        elif "responses" in row:
            assert row["rewards"] == pytest.approx(
                rm.score(row["prompt"], row["responses"]), abs=1e-5
            )
        elif "chosen" in row:
            both = rm.score(row["prompt"], [row["chosen"], row["rejected"]])
            assert [row["chosen_reward"], row["rejected_reward"]] == pytest.approx(both, abs=1e-5)
        else:
            assert row["reward"] == pytest.approx(
                rm.score(row["prompt"], row["response"]), abs=1e-5
            )
    assert (result.num_rows, result.num_bad, result.num_resumed) == (15, 3, 0)
    listed = [
        json.loads(line) for p in result.bad_rows.glob("*/bad_rows.jsonl") for line in p.open()
    ]
    assert sorted((os.path.basename(bad["source"]), bad["row"]) for bad in listed) == [
        ("a.jsonl", 3),
        ("a.jsonl", 7),
        ("a.jsonl", 11),
    ]


def test_one_file_becomes_one_file_whatever_its_shards(model, tmp_path):
    source = write(tmp_path / "a.jsonl", range(12))
    whole = score_files(model, [source], tmp_path / "whole.jsonl")
    cut = score_files(model, [source], tmp_path / "cut.jsonl.gz", SMALL)
    found, expected = (read_lines(tmp_path / name) for name in ("cut.jsonl.gz", "whole.jsonl"))
    assert [row["id"] for row in found] == list(range(12))
    for row, same in zip(found, expected, strict=True):
        assert row.keys() == same.keys()
        assert row.get("reward") == pytest.approx(same.get("reward"), abs=1e-5)
    assert (cut.num_rows, cut.num_bad, cut.num_responses) == (12, 3, whole.num_responses)
    assert len((tmp_path / "cut.bad_rows.jsonl").read_text().splitlines()) == 3
    manifest = json.loads((tmp_path / "cut.manifest.json").read_text())
    assert manifest["cache_key"]["dtype"] == "float32"
    assert manifest["num_shards"] == 3
    assert not (tmp_path / "cut.jsonl.gz.parts").exists()


def test_parquet_goes_in_and_comes_out(model, rm, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "prompt": ["Say sun.", "Say sea.", "Say sun."],
            "responses": [["sun", "no"], [], ["rain"]],
            "n": pa.array([1, 2, 3], pa.int16()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    options = BulkOptions(rows_per_shard=2)
    score_files(model, [str(tmp_path / "a.parquet")], tmp_path / "out.parquet", options)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(["prompt", "responses", "n"]).equals(table)
    rewards = found.column("rewards").to_pylist()
    assert rewards[0] == pytest.approx(rm.score("Say sun.", ["sun", "no"]), abs=1e-5)
    assert rewards[1] is None
    assert "list of responses is empty" in found.column("error").to_pylist()[1]


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


@pytest.mark.parametrize("form", ["out", "out.jsonl"])
def test_a_job_killed_anywhere_resumes_and_ends_in_the_same_bytes(
    model, tmp_path, monkeypatch, form
):
    """Killed before every single write, in turn; no finished shard is scored twice."""
    source = write(tmp_path / "a.jsonl", range(13))  # 3 shards, 3 lists of bad rows
    score_files(model, [source], tmp_path / "plain" / form, SMALL)
    expected = outputs(tmp_path / "plain" / form if form == "out" else tmp_path / "plain")
    scored = []
    score_rows = bulk_job.score_rows
    monkeypatch.setattr(
        bulk_job, "score_rows", lambda *a: scored.append(a[1].rows) or score_rows(*a)
    )
    for at in range(1, 100):
        place = tmp_path / f"killed-{at}"
        out = place / form
        scored.clear()
        killed = run_and_kill(lambda out=out: score_files(model, [source], out, SMALL), at)
        folder = out if form == "out" else place / "out.jsonl.parts"
        lists = (folder / "_score").glob("part-*/shards.jsonl")
        finished = sum(file.read_text().count("\n") for file in lists)
        result = score_files(model, [source], out, SMALL)
        if killed:
            assert len(scored) == 3 - finished
            assert result.num_resumed == finished
        found = outputs(out if form == "out" else place)
        for name in found:  # times differ
            if not name.endswith(".manifest.json"):
                assert found[name] == expected[name], name
        assert found.keys() == expected.keys()
        shutil.rmtree(place)
        if not killed:
            break
    assert at > 9  # the manifest, and for each shard its file, bad rows and record


def test_a_finished_job_is_not_scored_again(model, tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", range(6))
    first = [score_files(model, [source], tmp_path / out, SMALL) for out in ("out", "out.jsonl")]
    monkeypatch.setattr(bulk_job, "RewardModel", None)
    again = [score_files(model, [source], tmp_path / out, SMALL) for out in ("out", "out.jsonl")]
    for before, after in zip(first, again, strict=True):
        assert (after.num_resumed, after.num_rows, after.num_bad) == (2, 6, before.num_bad)
        assert after.bad_rows == before.bad_rows


def test_changed_input_and_another_model_are_told_from_the_job_that_was_begun(model, tmp_path):
    source = write(tmp_path / "a.jsonl", range(6))
    score_files(model, [source], tmp_path / "out", SMALL)
    write(tmp_path / "a.jsonl", range(1, 7))
    with pytest.raises(CheckpointError, match=r"different: inputs\)"):
        score_files(model, [source], tmp_path / "out", SMALL)
    write(tmp_path / "a.jsonl", range(6))
    with pytest.raises(CheckpointError, match=r"different: max_length, tokenizer\)|tokenizer"):
        score_files(model, [source], tmp_path / "out", BulkOptions(5, max_length=64))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"different: model\)"):
        score_files(other, [source], tmp_path / "out", SMALL)
    # one file is simply written anew, as it always was
    score_files(model, [source], tmp_path / "out.jsonl", SMALL)
    assert score_files(other, [source], tmp_path / "out.jsonl", SMALL).num_resumed == 0


def test_the_parts_of_a_job_array_are_together_the_whole(model, tmp_path):
    source = write(tmp_path / "a.jsonl", range(17))
    score_files(model, [source], tmp_path / "whole", SMALL)
    for i in (2, 0, 1):
        options = BulkOptions(5, part=parse_part(f"{i}/3"))
        result = score_files(model, [source], tmp_path / "parts", options)
        assert result.num_rows == {0: 7, 1: 5, 2: 5}[i]
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")


def test_all_parts_of_a_job_have_the_same_settings(model, tmp_path):
    """Part 1 is another folder than part 0, but their shards lie side by side."""
    source = write(tmp_path / "a.jsonl", range(17))
    score_files(model, [source], tmp_path / "out", BulkOptions(5, part=(0, 2)))
    with pytest.raises(CheckpointError, match=r"different: max_length"):
        score_files(model, [source], tmp_path / "out", BulkOptions(5, max_length=64, part=(1, 2)))
    # another division of the same job finds the finished shards
    assert score_files(model, [source], tmp_path / "out", SMALL).num_resumed == 2


def test_a_folder_with_other_things_in_it_is_left_alone(model, tmp_path):
    source = write(tmp_path / "a.jsonl", range(3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not empty \(mine.txt\)"):
        score_files(model, [source], tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_too_long_rows_are_refused_or_cut_as_asked_and_counted(model, tmp_path):
    long, short = "word " * 300, {"prompt": "Say sun.", "response": "sun"}
    rows = [{"prompt": long, "response": "x"}, short, {"prompt": "a", "responses": ["x", long]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = str(tmp_path / "a.jsonl")
    refused = score_files(model, [source], tmp_path / "refused.jsonl")
    found = read_lines(tmp_path / "refused.jsonl")
    assert [row.get("reward") is None for row in found] == [True, False, True]
    assert "more than 128 tokens" in found[0]["error"]
    assert (refused.num_bad, refused.num_cut) == (2, 0)
    cut = score_files(model, [source], tmp_path / "cut.jsonl", BulkOptions(cut=True))
    found = read_lines(tmp_path / "cut.jsonl")
    assert found[0]["reward"] is not None
    assert None not in found[2]["rewards"]
    assert (cut.num_bad, cut.num_cut) == (0, 2)


def test_a_row_that_the_chat_template_refuses_costs_no_other_row(model, tmp_path):
    folder = tmp_path / "picky"
    shutil.copytree(model, folder)
    template = (folder / "chat_template.jinja").read_text()
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(guard + template)
    rows = [{"prompt": "Say sun.", "response": f"sun {i}"} for i in range(5)]
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows.insert(2, {"prompt": system, "response": "x"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = score_files(folder, [str(tmp_path / "a.jsonl")], tmp_path / "out.jsonl")
    found = read_lines(tmp_path / "out.jsonl")
    assert result.num_bad == 1
    assert "not encodable: The chat template refuses group 'row 2'" in found[2]["error"]
    assert all(row["reward"] is not None for row in found[:2] + found[3:])


def test_a_directory_without_a_reward_head_is_refused_before_anything_is_written(model, tmp_path):
    source = write(tmp_path / "a.jsonl", range(3))
    with pytest.raises(ModelError, match="would be random"):
        score_files(model.parent / "policy", [source], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_that_gives_no_numbers_or_cannot_share_stops_the_job(model, tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", range(3))

    def broken(*_):
        raise NumericsError("differ")

    monkeypatch.setattr(bulk_job, "self_check", broken)
    with pytest.raises(NumericsError, match="score it with plain transformers"):
        score_files(model, [source], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_outputs_never_replace_inputs_and_several_inputs_need_a_folder(model, tmp_path):
    sources = [write(tmp_path / f"{name}.jsonl", range(2)) for name in "ab"]
    with pytest.raises(DataError, match="is an input too"):
        score_files(model, sources[:1], tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="2 inputs cannot all become"):
        score_files(model, sources, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"cannot write out\.csv"):
        score_files(model, sources[:1], tmp_path / "out.csv")
    with pytest.raises(ConfigError, match="needs a folder"):
        score_files(model, sources[:1], tmp_path / "out.jsonl", BulkOptions(part=(0, 2)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"part": (2, 2)}, "i from 0 to n - 1"),
        ({"dtype": "int8"}, "one of auto, float32"),
        ({"processes": 0}, "1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        BulkOptions(**options)


def test_a_part_is_written_i_of_n():
    assert parse_part("3/8") == (3, 8)
    for text in ("3", "a/b", "-1/2", "1/"):
        with pytest.raises(ConfigError, match="i/n"):
            parse_part(text)


def test_the_next_shard_is_encoded_while_the_last_is_scored(model, tmp_path, monkeypatch):
    """Both sides tell when they begin and end; the second encoding begins before the first scoring ends."""
    source = write(tmp_path / "a.jsonl", range(8))
    events = []

    def spy(name):
        function = getattr(bulk_job, name)

        def spied(*arguments):
            events.append((name, "begins"))
            result = function(*arguments)
            if name == "score_rows":
                deadline = time.monotonic() + 20
                while events.count(("encode_rows", "begins")) < 2 and time.monotonic() < deadline:
                    time.sleep(0.001)
            events.append((name, "ends"))
            return result

        monkeypatch.setattr(bulk_job, name, spied)

    spy("encode_rows")
    spy("score_rows")
    score_files(model, [source], tmp_path / "out", BulkOptions(rows_per_shard=4))
    second_encoding = [i for i, e in enumerate(events) if e == ("encode_rows", "begins")][1]
    assert second_encoding < events.index(("score_rows", "ends"))


def test_progress_counts_rows_up_to_all_of_them(model, tmp_path):
    source = write(tmp_path / "a.jsonl", range(8))
    heard = []
    score_files(
        model,
        [source],
        tmp_path / "out",
        SMALL,
        lambda *counts: heard.append(counts),
    )
    assert heard[-1] == (8, 8)
    assert heard == sorted(heard)


@pytest.mark.slow
def test_two_processes_make_the_same_files_as_one(model, tmp_path):
    source = write(tmp_path / "a.jsonl", range(17))
    score_files(model, [source], tmp_path / "one", SMALL)
    heard = []
    options = BulkOptions(5, processes=2)
    score_files(model, [source], tmp_path / "two", options, lambda *counts: heard.append(counts))
    assert outputs(tmp_path / "two") == outputs(tmp_path / "one")
    assert heard[-1] == (17, 17)


@pytest.mark.slow
def test_an_error_in_a_process_is_the_jobs_error(model, tmp_path):
    source = write(tmp_path / "a.jsonl", range(17))
    with pytest.raises(ModelError, match="would be random"):
        score_files(
            model.parent / "policy", [source], tmp_path / "out", BulkOptions(5, processes=2)
        )
