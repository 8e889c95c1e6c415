"""`hafrm score` on input and directories that cannot be scored: refused or listed, no number made up."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

from export_faults import FAULTS
from exports_for_tests import export_both
from hafrm import atomic
from hafrm.bulk import bulk_job
from hafrm.bulk.bulk_job import BulkOptions, score_files
from hafrm.errors import CheckpointError, DataError, ModelError
from hafrm.scoring.reward_model import RewardModel

SMALL = BulkOptions(rows_per_shard=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    export_both(folder)
    return folder / "reward"


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def good(i):
    return {"prompt": f"Say sun {i}.", "response": "sun"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "missing column"),
        ({"response": "sun"}, "missing column"),
        ({"prompt": "Say sun."}, "missing column"),
        ({"question": "Say sun.", "answer": "sun"}, "missing column"),
        ({"prompt": "Say sun.", "responses": []}, "empty"),
        ({"prompt": "Say sun.", "responses": [""]}, "empty response"),
        ({"prompt": "Say sun.", "responses": ["sun", None]}, "not a string"),
        ({"prompt": "Say sun.", "chosen": "sun", "rejected": " "}, "empty response"),
        ({"prompt": "", "response": "sun"}, "empty prompt"),
        ({"prompt": 3, "response": "sun"}, "not a string"),
        ({"prompt": "Say " + "sun " * 300, "response": "sun"}, "too long"),
        ({"prompt": "Say sun.", "response": "sun " * 300}, "too long"),
        ({"prompt": "Say \ud800.", "response": "sun"}, "surrogate"),
        (["Say sun.", "sun"], "unreadable row"),
    ],
)
def test_a_bad_row_gets_null_and_a_reason_and_its_neighbours_their_scores(
    model, tmp_path, row, said
):
    source = write(tmp_path / "in.jsonl", [good(0), row, good(1)])
    result = score_files(model, [source], tmp_path / "out.jsonl")
    first, bad, last = read(tmp_path / "out.jsonl")
    assert result.num_bad == 1
    assert said in bad["error"]
    assert all(value is None for name, value in bad.items() if name.endswith(("reward", "rewards")))
    rm = RewardModel.from_pretrained(model)
    for i, scored in enumerate((first, last)):
        assert scored["reward"] == pytest.approx(rm.score(f"Say sun {i}.", "sun"), abs=1e-5)


def test_a_table_without_the_columns_lists_every_row(model, tmp_path):
    (tmp_path / "in.csv").write_text("question,answer\nSay sun.,sun\nSay sea.,sea\n")
    result = score_files(model, [str(tmp_path / "in.csv")], tmp_path / "out.jsonl")
    assert (result.num_rows, result.num_bad, result.num_responses) == (2, 2, 0)
    assert result.bad_rows is not None


def test_a_file_that_is_no_data_stops_the_job_before_anything_is_written(model, tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"in\.parquet"):
        score_files(model, [str(tmp_path / "in.parquet")], tmp_path / "out")
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        score_files(model, [str(tmp_path / "missing.jsonl")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def headless(folder, kind):
    """A model directory without a trained reward head, of the kinds that people point at."""
    export_both(folder)
    reward = folder / "reward"
    if kind == "policy":
        return folder / "policy"
    if kind == "bare backbone":
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        LlamaModel(LlamaConfig(num_attention_heads=4, vocab_size=600, **size)).save_pretrained(
            reward
        )
    elif kind == "head lost":
        FAULTS["no head"][1](reward)
    elif kind == "head of two":
        FAULTS["a head of two rows"][1](reward)
    elif kind == "value head beside":
        FAULTS["a value head beside it"][1](folder / "policy")
        return folder / "policy"
    elif kind == "backbone weight lost":
        FAULTS["a weight lost"][1](reward)
    elif kind == "pickle only":
        torch.save(load_file(reward / "model.safetensors"), reward / "pytorch_model.bin")
        (reward / "model.safetensors").unlink()
    elif kind == "weights cut short":
        file = reward / "model.safetensors"
        file.write_bytes(file.read_bytes()[:2000])
    elif kind == "other shapes":
        weights = load_file(reward / "model.safetensors")
        weights["score.weight"] = weights["score.weight"][:, :-1].clone()
        save_file(weights, reward / "model.safetensors", metadata={"format": "pt"})
    else:
        (reward / "model.safetensors").unlink()
    return reward


@pytest.mark.parametrize(
    "kind",
    [
        "policy",
        "bare backbone",
        "head lost",
        "head of two",
        "value head beside",
        "backbone weight lost",
        "pickle only",
        "weights cut short",
        "other shapes",
        "no weights",
    ],
)
def test_a_directory_without_a_whole_reward_model_is_refused_and_nothing_is_scored(tmp_path, kind):
    """Never with a fresh head: two loads would give two scores for one text."""
    folder = headless(tmp_path / "model", kind)
    source = write(tmp_path / "in.jsonl", [good(0)])
    with pytest.raises(ModelError):
        score_files(folder, [source], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone"])
def test_a_half_written_shard_is_scored_again_and_no_other(model, tmp_path, monkeypatch, damage):
    source = write(tmp_path / "in.jsonl", [good(i) for i in range(12)])
    score_files(model, [source], tmp_path / "out", SMALL)
    shard = tmp_path / "out" / "in-00001-of-00003.jsonl"
    before = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(before[:50] if damage == "cut" else b"")
    scored = []
    score_rows = bulk_job.score_rows
    monkeypatch.setattr(bulk_job, "score_rows", lambda *a: scored.append(a) or score_rows(*a))
    result = score_files(model, [source], tmp_path / "out", SMALL)
    assert (len(scored), result.num_resumed) == (1, 2)
    assert shard.read_bytes() == before


@pytest.mark.parametrize("form", ["out", "out.jsonl"])
def test_a_full_disk_ends_the_job_by_name_and_the_next_call_goes_on(
    model, tmp_path, monkeypatch, form
):
    """ENOSPC, as the kernel tells it, when the second shard is synced."""
    source = write(tmp_path / "in.jsonl", [good(i) for i in range(12)])
    synced = atomic.os.fsync
    left = 12  # up to the second shard

    def filling(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return synced(descriptor)

    out = tmp_path / form
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", filling)
        with pytest.raises(CheckpointError, match="No space left on device; fix that"):
            score_files(model, [source], out, SMALL)
    assert not list(tmp_path.rglob(".*.tmp"))
    assert not (tmp_path / "out.jsonl").exists()
    result = score_files(model, [source], out, SMALL)
    assert result.num_bad == 0
    assert result.num_resumed >= 1
    whole = score_files(model, [source], tmp_path / "again" / form, SMALL)
    assert whole.num_responses == result.num_responses
