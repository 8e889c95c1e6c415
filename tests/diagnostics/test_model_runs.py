"""`diagnose` as a whole: one model or several on real files, its result on disk and its tables."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hafrm.cli import app
from hafrm.diagnostics.diagnosis import Diagnosis
from hafrm.diagnostics.model_runs import diagnose
from hafrm.errors import ConfigError, ModelError
from hafrm.evaluation.heads import EvaluationOptions
from hafrm.results import read_result, write_result
from support.exports import export_both
from support.tiny_runs import WORDS, write_base


def write_rows(file: Path, num: int, *, start: int = 0, votes: bool = False) -> Path:
    rows = []
    for i in range(start, start + num):
        word, other = WORDS[i % 10], WORDS[(i * 7 + 3) % 10]
        row = {
            "prompt": f"Say {word} number {i // 2}." + " Please." * (i % 5),
            "chosen": f"Here you are: {word}." + "!" * (i % 3),
            "rejected": f"I can't say {other} " + "- and so on\n" * (1 + i % 4),
            "label": "tie" if i == start else "human",
        }
        if votes:
            row["votes"] = [3, i % 2, 0]
        rows.append(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run-like folder, a second model, and two files of which one has votes."""
    folder = tmp_path_factory.mktemp("diagnose")
    export_both(folder / "run" / "model")
    export_both(folder / "other", "mistral")
    write_rows(folder / "plain.jsonl", 21)
    write_rows(folder / "voted.jsonl", 30, start=40, votes=True)
    return folder


@pytest.fixture(scope="module")
def diagnosis(folder) -> Diagnosis:
    """Everything at once; the base model is another model's policy."""
    return diagnose(
        folder / "run",
        [str(folder / "plain.jsonl"), str(folder / "voted.jsonl")],
        also=[str(folder / "other")],
        base=folder / "other" / "policy",
        options=EvaluationOptions(max_length=128),
    )


def test_the_result_has_every_diagnostic_and_can_be_read_back(diagnosis, folder, tmp_path) -> None:
    write_result(tmp_path / "d.json", diagnosis)
    write_result(tmp_path / "again.json", read_result(tmp_path / "d.json", Diagnosis))
    assert (tmp_path / "again.json").read_text() == (tmp_path / "d.json").read_text()
    assert diagnosis.scored_with == "reward"
    sets = [(part.name, part.num) for part in diagnosis.sets]
    assert sets == [("plain", 20), ("voted", 29), ("all", 49)]  # one of each file is a tie
    models = (str(folder / "run"), str(folder / "other"))
    noise = diagnosis.label_noise
    assert (noise.num_with_votes, noise.models) == (29, models)
    own, other = diagnosis.representations
    assert (own.model, other.model) == models
    assert other.cka_to_base == pytest.approx(1.0)
    assert own.cka_to_base < 0.99


def test_slices_follow_votes_turns_and_tags_where_these_differ(diagnosis) -> None:
    tags = {part.name: {s.tag for s in part.slices} for part in diagnosis.sets}
    assert "votes" in tags["voted"] and "votes" not in tags["plain"]
    assert "prompt length" in tags["plain"]
    assert "label" not in tags["voted"]  # all of them are "human"


def test_a_table_of_slices_is_shown_only_where_there_are_some(diagnosis) -> None:
    sets = tuple(replace(part, slices=()) for part in diagnosis.sets)
    titles = [table.title for table in replace(diagnosis, sets=sets).tables()]
    assert titles == [t.title for t in diagnosis.tables() if "slice" not in t.title]
    assert len(titles) == len(diagnosis.tables()) - 1


def test_models_of_which_one_refuses_a_prompt_are_compared_on_the_same_responses(folder, tmp_path):
    """Two copies of one model are as far from their base, whichever responses are drawn."""
    picky = shutil.copytree(folder / "run" / "model" / "reward", tmp_path / "picky")
    template = (picky / "chat_template.jinja").read_text()
    guard = "{% if '5' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    (picky / "chat_template.jinja").write_text(guard + template)
    result = diagnose(
        folder / "run" / "model" / "reward",
        str(write_rows(tmp_path / "rows.jsonl", 20)),
        also=[picky],
        base=folder / "run" / "model" / "policy",
        options=EvaluationOptions(max_bad_fraction=0.2),
    )
    own, other = result.representations
    assert result.num_states == 36  # two pairs share each prompt
    assert own.cka_to_base == pytest.approx(1.0)
    assert replace(other, model=own.model) == own


def test_a_base_without_a_language_model_head_is_left_out(folder, tmp_path, caplog) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run" / "model" / "reward", run / "model" / "reward")
    base = shutil.copytree(run / "model" / "reward", tmp_path / "base")
    recipe = {"model": {"path": str(base)}, "data": {"train": ["x"]}, "method": {"name": "bt"}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    assert diagnose(run, str(folder / "plain.jsonl")).base is None
    assert "not compared with the base" in caplog.text


def test_a_single_head_is_diagnosed_by_itself(folder) -> None:
    model = folder / "run" / "model"
    reward = diagnose(model / "reward", [str(folder / "plain.jsonl")])
    assert reward.label_noise is reward.base is None
    reward.tables()
    policy = diagnose(model / "policy", [str(folder / "voted.jsonl")])
    assert (policy.scored_with, policy.label_noise is None) == ("implicit reward", False)


def test_the_verb_writes_into_a_run_folder_and_where_json_says(folder, tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folder / "run" / "model")
    recipe = {"model": {"path": "no/where"}, "data": {"train": ["x"]}, "method": {"name": "haf"}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    command = ["evaluate", str(run), str(folder / "plain.jsonl"), "--diagnose"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads((run / "diagnostics.json").read_text())["model"] == str(run)
    (run / "diagnostics.json").unlink()
    result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "there.json")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "there.json").is_file()
    assert (run / "diagnostics.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_a_policy_of_rlhf_is_diagnosed_without_its_base(folder, tmp_path) -> None:
    shutil.copytree(folder / "other" / "policy", tmp_path / "ppo" / "model" / "policy")
    (tmp_path / "ppo" / "recipe.yaml").write_text("reward: {model: run}\n")
    result = diagnose(tmp_path / "ppo", str(folder / "plain.jsonl"))
    assert result.scored_with == "implicit reward" and result.base is None


def test_a_model_given_twice_and_a_base_that_is_no_model_are_refused(folder, tmp_path) -> None:
    data, model = [str(folder / "plain.jsonl")], folder / "run" / "model"
    with pytest.raises(ConfigError, match="given twice"):
        diagnose(model, data, also=[str(model)])
    with pytest.raises(ModelError, match="none does not exist"):
        diagnose(model, data, base=tmp_path / "none")
    # the same hidden size and vocabulary, so it is a base for all we know
    seen: list[tuple[int, int]] = []
    base = write_base(tmp_path)
    result = diagnose(model, data, base=base, on_progress=lambda *numbers: seen.append(numbers))
    assert result.base is not None
    # 42 responses scored, and their states of the model and of its base
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (126, 126)
