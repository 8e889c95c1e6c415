"""The card beside an exported model: its code runs, its scores hold, its numbers are those of the files."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from hafrm.export.model_card import write_cards
from hafrm.preferences import Group, Message
from hafrm.recipe_file import dump_recipe
from support.exports import export_both, record_golden
from support.tiny_runs import tiny_recipe

SESSION = {
    "versions": {"python": "3.12.3", "hafrm": "0.1.0", "torch": "2.13.0"},
    "counts": {"train_comparisons": 6400, "bad_rows": 3},
    "template_sha256": "cd" * 32,
}
CONVERSATION = Group("g", (Message("user", "Say sun."),), ("Here you are: sun.", "no " * 300))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with exported models and golden scores, without the training."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    export_both(folder / "model")
    record_golden(folder / "model" / "reward", CONVERSATION)
    (folder / "recipe.yaml").write_text(dump_recipe(tiny_recipe(folder)))
    (folder / "provenance.json").write_text(json.dumps({"sessions": [SESSION]}))
    write_cards(folder)
    return folder


def card_of(directory: Path) -> tuple[dict, str]:
    """The front matter and the text."""
    _, head, text = (directory / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return YAML(typ="safe").load(head), text


def test_the_code_in_the_card_prints_the_score_that_it_promises(run, monkeypatch):
    """The stock model in float32, of the plain conversation that is always recorded."""
    _, text = card_of(run / "model" / "reward")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    promised = float(re.findall(r"# (-?\d+\.\d+)", code)[0])
    assert "The capital of France is Paris." in code
    monkeypatch.chdir(run / "model" / "reward")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})  # noqa: S102 - our own card
    assert float(out.getvalue()) == pytest.approx(promised, abs=6e-4)


def test_a_card_before_any_test_says_so_and_afterwards_has_the_numbers(run):
    _, text = card_of(run / "model" / "reward")
    assert "Not evaluated on a test set yet" in text
    accuracy = {"value": 0.625, "low": 0.47, "high": 0.76, "num": 40, "method": "wilson"}
    metrics = {
        "accuracy": accuracy,
        "calibration": {"log_loss": 0.61},
        "length": {"pick_longer": accuracy | {"value": 0.525}},
    }
    implicit = metrics | {"accuracy": accuracy | {"value": 0.6}}
    sets = [{"name": "held-out", **metrics, "implicit": implicit}]
    result = {"scored_with": "reward", "sets": sets}
    (run / "evaluation.json").write_text(json.dumps(result | {"trained_on": ["train.jsonl"]}))
    write_cards(run)
    assert "Not evaluated on a test set yet" in card_of(run / "model" / "reward")[1]
    (run / "test.json").write_text(json.dumps(result))
    write_cards(run)
    _, text = card_of(run / "model" / "reward")
    numbers = "40 | 62.5 % [47.0, 76.0] | 52.5 % [47.0, 76.0] | 0.610 |"
    assert f"| held-out | {numbers}" in text
    _, policy = card_of(run / "model" / "policy")
    assert "| held-out | 40 | 60.0 % [" in policy  # its implicit reward


def test_a_card_tells_what_was_trained_without_the_folders_of_this_machine(run):
    head, text = card_of(run / "model" / "reward")
    assert head["library_name"] == "transformers"
    assert head["tags"] == ["reward-model", "hafrm", "haf"]
    assert "base_model" not in head  # a directory, not a hub id
    assert "6400 comparisons" in text
    assert "cd" * 32 in text
    assert str(run.parent) not in text
    assert "at most 64 tokens" in text


def test_a_hub_id_is_the_base_model_and_text_cannot_end_the_code_block(run):
    recipe = YAML(typ="safe").load((run / "recipe.yaml").read_text())
    recipe["model"]["path"] = "someone/some-base"
    YAML().dump(recipe, run / "recipe.yaml")
    golden = run / "model" / "reward" / "golden_scores.jsonl"
    line = json.loads(golden.read_text().splitlines()[0])
    line["messages"][-1]["content"] = "```\nend"
    golden.write_text(json.dumps(line) + "\n")
    write_cards(run)
    head, text = card_of(run / "model" / "reward")
    assert head["base_model"] == "someone/some-base"
    assert len(re.findall("```", text)) == 2
