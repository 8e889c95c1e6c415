"""A cached start trains on what reading and encoding give, to the bit, and never on something stale."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from hafrm.atomic import cache_folder
from hafrm.data import store
from hafrm.preferences import TokenizedGroup
from hafrm.recipe import Recipe
from hafrm.training import parallel, prepared_data, setup
from hafrm.training.loop import run_training
from hafrm.training.prepared_data import PreparedData, prepare_data
from hafrm.training.step_batches import ComparisonOrder
from support.tiny_runs import WORDS, tiny_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Of rows that lie on disk, with ties, votes, tags, a shared prompt and bad ones."""
    monkeypatch.setenv("HAFRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "IN_MEMORY", 1000)
    rows: list[dict[str, Any]] = []
    for i in range(60):
        row: dict[str, Any] = {"prompt": f"Say {WORDS[i % 10]} {i // 2}.", "chosen": f"It is {i}."}
        row |= {"rejected": "é" * (i % 7 + 1), "margin": i / 3, "subset": "ab"[i % 2]}
        row |= [{}, {"tie": True}, {"votes": [2, 1, 0]}, {"chosen": " "} if i == 3 else {}][i % 4]
        rows.append(row)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_recipe(tmp_path, data={"train": [str(file)], "validation_fraction": 0.3})


def contents(data: PreparedData) -> list[object]:
    def content(group: TokenizedGroup) -> list[object]:
        ids = [(part.tolist(), part.dtype) for part in (group.prompt_ids, *group.response_ids)]
        return [ids, group.comparisons, group.id, group.source, group.tags]

    groups = [[content(group) for group in part] for part in (data.train, data.validation)]
    return [groups, data.golden, data.counts, data.token_digest, data.file_digests]


def folders() -> list[Path]:
    root = cache_folder("data")
    return sorted(root.iterdir()) if root.is_dir() else []


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """The calls that read rows from now on."""
    calls: list[Path | None] = []
    read = setup.read_splits

    def counted(recipe: Recipe, bad: Path | None = None) -> Any:
        calls.append(bad)
        return read(recipe, bad)

    monkeypatch.setattr(setup, "read_splits", counted)
    return calls


def test_a_cached_start_has_the_same_groups_counts_bad_rows_and_order_and_reads_no_row(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prepare_data(recipe)
    assert folders() == []  # without a place for its bad rows, nothing is kept
    first = prepare_data(recipe, tmp_path / "first.jsonl")
    calls = reads(monkeypatch)
    again = prepare_data(recipe, tmp_path / "again.jsonl")
    assert calls == [] and len(folders()) == 1 and plain.counts["bad_rows"] > 0
    assert contents(plain) == contents(first) == contents(again)
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    assert not again.train[0].prompt_ids.flags.writeable


def test_the_order_leaves_out_exactly_the_ties(recipe: Recipe) -> None:
    groups = prepare_data(recipe).train
    order = ComparisonOrder(groups, per_prompt=4, seed=0)
    decided = [
        (i, c)
        for i, group in enumerate(groups)
        for c, p in enumerate(group.comparisons)
        if not p.tie
    ]
    listed = zip(order._owners.tolist(), order._comparisons.tolist(), strict=True)
    assert list(listed) == decided and order.num_comparisons == len(decided)


def test_a_run_from_the_cache_logs_the_losses_of_one_that_reads(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(name: str) -> list[list[object]]:
        run_training(recipe, tmp_path / name, finish=lambda _: None)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [[v for k, v in json.loads(line).items() if "second" not in k] for line in lines]

    first = losses("first")
    calls = reads(monkeypatch)
    assert losses("again") == first and calls == []
    sessions = [
        json.loads((tmp_path / name / "provenance.json").read_text())["sessions"][0]
        for name in ("first", "again")
    ]
    for part in ("data", "inputs", "counts"):
        assert sessions[0][part] == sessions[1][part]


def test_other_content_of_the_same_size_and_time_limits_and_seeds_are_read_anew(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.jsonl"
    first = prepare_data(recipe, bad)
    calls = reads(monkeypatch)
    file = Path(recipe.data.train[0])
    state = file.stat()
    file.write_bytes(file.read_bytes().replace(b"It is 7.", b"It is 8."))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    other = prepare_data(recipe, bad)
    assert contents(other)[0] != contents(first)[0]
    data = recipe.data.model_copy(update={"max_length": 40})
    prepare_data(recipe.model_copy(update={"data": data}), bad)
    prepare_data(setup.with_training(recipe, seed=3), bad)
    assert len(calls) == 3 and len(folders()) == 4
    prepare_data(setup.with_training(recipe, seed=4), bad)
    assert len(folders()) == prepared_data.NUM_CACHED == 4


def test_a_damaged_cache_is_written_anew_and_one_that_cannot_be_written_is_a_warning(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    bad = tmp_path / "bad.jsonl"
    first = contents(prepare_data(recipe, bad))
    (folder,) = folders()
    with (folder / "train").open("r+b") as file:
        file.truncate(100)
    calls = reads(monkeypatch)
    assert contents(prepare_data(recipe, bad)) == first and len(calls) == 1
    assert contents(prepare_data(recipe, bad)) == first and len(calls) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("HAFRM_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert contents(prepare_data(recipe, bad)) == first
    assert "nothing is cached" in caplog.text


def test_all_ranks_read_where_the_main_rank_found_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_data(recipe, tmp_path / "bad.jsonl")
    calls, (folder,) = reads(monkeypatch), folders()
    monkeypatch.setattr(parallel, "from_main", lambda _: (first.file_digests, folder, False))
    assert contents(prepare_data(recipe)) == contents(first) and calls == [None]


def test_what_may_change_under_its_name_or_changes_while_it_is_read_is_not_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = setup.build_encoder(recipe)

    def cached(*train: str) -> bool:
        data = recipe.data.model_copy(update={"train": train})
        changed = recipe.model_copy(update={"data": data})
        return prepared_data._cache_of(changed, encoder, {}) is not None

    commit = "0123456789" * 4
    assert cached(f"hub:org/set@{commit}:train", "a.jsonl") and not cached("hub:org/set:train")
    assert not cached("hub:org/set@main:train") and not cached("a.jsonl", "set:skywork-80k")
    read = setup.read_splits

    def appended(recipe: Recipe, bad: Path | None = None) -> Any:
        splits = read(recipe, bad)
        with Path(recipe.data.train[0]).open("a") as file:
            file.write("\n")
        return splits

    monkeypatch.setattr(setup, "read_splits", appended)
    assert prepare_data(recipe, tmp_path / "bad.jsonl").counts and folders() == []
