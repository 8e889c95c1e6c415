"""The public API: train on rows in memory, evaluate the run, use its reward model."""

import json

import jaxtyping
import numpy as np
import pytest

import hafrm
from hafrm import api
from hafrm.export.checklist import replay_directory
from hafrm.training import run_export
from support.tiny_runs import WORDS, write_base

RECIPE = {
    "model.path": "",
    "method.name": "haf",
    "data": {"max_length": 64, "validation_fraction": 0.25},
    "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "max_tokens": 512},
}


def rows(num, start=0):
    return [
        {
            "prompt": f"Say {WORDS[i % 10]} number {i}.",
            "chosen": f"{WORDS[i % 10]} it is",
            "rejected": "no",
        }
        for i in range(start, start + num)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    recipe = RECIPE | {"model.path": str(write_base(folder))}
    with pytest.MonkeyPatch.context() as patch:  # as conftest sets it for each test
        patch.setenv("HAFRM_CACHE", str(tmp_path_factory.getbasetemp() / "hafrm-cache"))
        patch.setattr(run_export, "check_golden", lambda path: replay_directory(path).differences)
        return hafrm.train(recipe, data=rows(24), out=folder / "run")


def test_a_run_of_rows_in_memory_is_evaluated_and_used(run):
    result = hafrm.evaluate(run, rows(12, start=100))
    assert result.accuracy.low <= result.accuracy.value <= result.accuracy.high
    assert result.tables()[0].rows
    rm = hafrm.RewardModel.from_pretrained(run.folder / "model/reward")
    assert len(rm.score("Say bread.", ["bread it is", "no"])) == 2


def test_the_run_resumes_with_the_same_recipe_and_rows(run):
    recipe = RECIPE | {"model.path": str(run.folder.parent / "base")}
    again = hafrm.train(recipe, data=rows(24), out=run.folder, resume=True)
    assert (again.folder, again.best_step) == (run.folder, run.best_step)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (["x"], "row 0 of data must be a mapping"),
        ([{"prompt": {1, 2}}], "set is not a JSON type"),
        ("train.jsonl", "data must be rows in memory"),
        (3, "data must be rows in memory"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, data, part, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(hafrm.DataError, match=part):
        hafrm.train(RECIPE, data=data, out=tmp_path / "run")
    with pytest.raises(hafrm.ConfigError, match="out must be a folder's path"):
        hafrm.train(RECIPE, data=rows(2), out=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [None, 3, {"prompt": "x"}, [3], [None]])
def test_evaluate_says_what_its_data_may_be(run, data, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(hafrm.DataError, match=r"a list of (sources|rows)"):
        hafrm.evaluate(run, data)


def test_evaluate_takes_a_generator_of_rows_and_names_a_model_that_is_none(run, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    result = hafrm.evaluate(run, (row for row in rows(12, start=100)))
    assert result.accuracy == hafrm.evaluate(run, rows(12, start=100)).accuracy
    with pytest.raises(hafrm.ModelError, match="got None"):
        hafrm.evaluate(None, rows(4))
    with pytest.raises(hafrm.ConfigError, match="recipe must be a Recipe, a file or a mapping"):
        hafrm.train(3, data=rows(4))


def test_rows_lie_beside_the_run_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("HAFRM_CACHE", str(tmp_path / "cache"))
    data = [row | {"weight": np.float32(0.5)} for row in rows(2)]
    first = api._keep_rows(data, tmp_path / "run")
    (tmp_path / "cache").unlink()  # a resume reads the same path
    assert api._keep_rows(data, tmp_path / "run") == first
    assert [json.loads(line)["weight"] for line in first.open()] == [0.5, 0.5]


def test_other_rows_are_another_recipe_and_a_wrong_key_is_named(run):
    recipe = RECIPE | {"model.path": str(run.folder.parent / "base")}
    with pytest.raises(hafrm.CheckpointError):
        hafrm.train(recipe, data=rows(20), out=run.folder, resume=True)
    with pytest.raises(hafrm.ConfigError, match=r"model\.path"):
        hafrm.train({"model.pth": "x"}, data=rows(4), out=run.folder)
