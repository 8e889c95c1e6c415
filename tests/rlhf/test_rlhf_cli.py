"""The verbs `rlhf` and `rlhf-compare` as a user meets them: what they print, and how they end."""

import json
from pathlib import Path

from typer.testing import CliRunner

from hafrm.cli import app
from hafrm.recipe_file import dump_recipe
from tiny_rlhf import tiny_rlhf, write_prompts


def recipe_file(folder: Path, **sections) -> str:
    sections = {"training": {"steps": 1}} | sections
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(tiny_rlhf(folder, **sections)))
    return str(file)


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_rlhf_trains_says_what_it_kept_and_finds_a_finished_run_done(tmp_path):
    code, said = invoke("rlhf", recipe_file(tmp_path), "training.seed=3", "--out", tmp_path / "run")
    assert code == 0, said
    assert "1 of 1 steps; exported step" in said
    assert "best by its held-out penalised measure" in said
    assert json.loads((tmp_path / "run/provenance.json").read_text())["sessions"][0]["seed"] == 3
    code, again = invoke("rlhf", "--resume", tmp_path / "run")
    assert (code, again) == (0, said)


def test_a_run_that_was_stopped_for_its_own_good_ends_with_1_and_exports(tmp_path):
    wild = {
        "training": {"steps": 20, "learning_rate": 3.0},
        "watch": {"max_kl": 1.0, "patience": 1, "min_entropy_fraction": 0.0},
    }
    code, said = invoke("rlhf", recipe_file(tmp_path, **wild), "--out", tmp_path / "run")
    assert code == 1
    assert "stopped early: the KL from the start policy" in said
    assert (tmp_path / "run/model/policy").is_dir()


def test_rlhf_compare_prints_standings_and_wins(tmp_path):
    file = recipe_file(tmp_path)
    test = write_prompts(tmp_path / "test.jsonl", 4)
    judge = f"evaluation.judge={tmp_path / 'reward'}"
    options = ("--model", f"one={tmp_path / 'reward'}", "--test", test, "--seeds", 1)
    code, said = invoke("rlhf-compare", file, judge, "--out", tmp_path / "out", *options)
    assert code == 0, said
    assert "test answers, scored by" in said
    assert "answers against each other" in said
    assert (tmp_path / "out/rlhf_comparison.json").is_file()


def test_rlhf_compare_refuses_what_it_cannot_understand(tmp_path):
    file = recipe_file(tmp_path)
    common = ("rlhf-compare", file, "--out", tmp_path / "out", "--test", "x", "--model")
    for options, told in (
        (("no-name",), "NAME=PATH"),
        (("a=b", "--gold", "silver"), "--gold is 'silver'"),
    ):
        result = CliRunner().invoke(app, [str(a) for a in (*common, *options)])
        assert told in str(result.exception)
