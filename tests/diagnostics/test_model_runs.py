"""`diagnose` as a whole: one model or several on real files, its result on disk and its tables."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from exports_for_tests import export_both
from hafrm.cli import app
from hafrm.diagnostics.diagnosis import Diagnosis
from hafrm.diagnostics.model_runs import diagnose
from hafrm.errors import ConfigError, DataError, ModelError
from hafrm.report.terminal import print_tables
from hafrm.results import read_result, write_result
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
def found(folder) -> Diagnosis:
    """Everything at once, generations included; the base model is another model's policy."""
    return diagnose(
        folder / "run",
        [str(folder / "plain.jsonl"), str(folder / "voted.jsonl")],
        also=[str(folder / "other")],
        base=folder / "other" / "policy",
        num_generations=4,
        max_length=128,
    )


@pytest.fixture(scope="module")
def printed(found) -> str:
    console = Console(width=120, file=io.StringIO())
    print_tables(found.tables(), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_result_has_every_diagnostic_and_can_be_read_back(found, folder, tmp_path) -> None:
    write_result(tmp_path / "d.json", found)
    write_result(tmp_path / "again.json", read_result(tmp_path / "d.json", Diagnosis))
    assert (tmp_path / "again.json").read_text() == (tmp_path / "d.json").read_text()
    assert found.scored_with == "reward"
    assert [(part.name, part.num) for part in found.sets] == [
        ("plain", 20),
        ("voted", 29),
        ("all", 49),
    ]
    one, models = found.sets[0], (str(folder / "run"), str(folder / "other"))
    assert len(one.margins.edges) == len(one.margins.right) + 1 == len(one.margins.wrong) + 1
    assert sum(one.margins.right) + sum(one.margins.wrong) == 20
    assert one.agreement is not None
    noise = found.label_noise
    assert (noise.num, noise.models, list(noise.by_set)) == (49, models, ["voted"])
    assert 0 <= noise.predictors[0].auc.value <= 1
    own, other = found.representations
    assert (own.model, other.model) == models
    assert other.cka_to_base == pytest.approx(1.0)
    assert own.cka_to_base < 0.99
    policies = [policy.name for policy in found.own_policy.policies]
    assert policies == [*models, "base model"]
    assert len(found.own_policy.preferences) == 6  # two reward models, three pairs of policies


def test_no_number_of_the_tables_is_cut_off_and_fractions_have_intervals(printed) -> None:
    assert "…" not in printed
    assert len(re.findall(r"\[-?\d+\.\d, ?-?\d+\.\d\]", printed)) > 60
    for title in (
        "calibration",
        "by |margin|",
        "slice",
        "label audit",
        "hidden states",
        "preferred",
    ):
        assert title in printed


def test_slices_follow_votes_turns_and_tags_where_these_differ(found) -> None:
    tags = {each.name: {part.tag for part in each.slices} for each in found.sets}
    assert "votes" in tags["voted"]
    assert "votes" not in tags["plain"]
    assert "prompt length" in tags["plain"]
    assert "label" not in tags["voted"]  # all of them are "human"


def test_a_single_model_without_votes_has_no_label_audit_and_no_base(folder) -> None:
    found = diagnose(folder / "run" / "model" / "reward", [str(folder / "plain.jsonl")])
    assert found.label_noise is found.own_policy is found.base is None
    assert [(part.name, part.agreement) for part in found.sets] == [("plain", None)]
    found.tables()


def test_a_policy_alone_is_diagnosed_by_its_implicit_reward(folder) -> None:
    found = diagnose(folder / "run" / "model" / "policy", [str(folder / "voted.jsonl")])
    assert found.scored_with == "implicit reward"
    assert found.label_noise is not None


def test_the_verb_writes_into_a_run_folder_or_where_json_says(folder, tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folder / "run" / "model")
    recipe = {"model": {"path": "nowhere"}, "data": {"train": ["x"]}, "method": {"name": "haf"}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    command = ["diagnose", str(run), str(folder / "plain.jsonl")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads((run / "diagnostics.json").read_text())["model"] == str(run)
    (run / "diagnostics.json").unlink()
    result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "there.json")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "there.json").is_file()
    assert not (run / "diagnostics.json").exists()


# What is refused.


def test_a_source_without_a_decided_comparison_is_named(folder, tmp_path) -> None:
    write_rows(tmp_path / "ties.jsonl", 1)
    sources = [str(folder / "plain.jsonl"), str(tmp_path / "ties.jsonl")]
    with pytest.raises(DataError, match=r"ties holds no comparison .* leave it out"):
        diagnose(folder / "run", sources)


def test_options_that_would_be_ignored_are_refused(folder) -> None:
    data, model = [str(folder / "plain.jsonl")], folder / "run" / "model"
    with pytest.raises(ConfigError, match="given twice"):
        diagnose(model, data, also=[str(model)])
    with pytest.raises(ConfigError, match="is a policy itself"):
        diagnose(model / "policy", data, policy=model / "policy")
    with pytest.raises(ConfigError, match="give --policy too"):
        diagnose(model / "reward", data, reference=model / "policy")


def test_generations_need_both_heads_and_another_policy(folder) -> None:
    data = [str(folder / "plain.jsonl")]
    with pytest.raises(ConfigError, match="reward head and a policy"):
        diagnose(folder / "run" / "model" / "reward", data, num_generations=2)
    with pytest.raises(ConfigError, match="second policy"):
        diagnose(folder / "run", data, num_generations=2)


def test_a_base_that_does_not_fit_is_refused(folder, tmp_path) -> None:
    other = write_base(tmp_path)
    config = json.loads((other / "config.json").read_text())
    assert config["hidden_size"] == 32  # the same size, so it is a base for all we know
    found = diagnose(folder / "run", [str(folder / "plain.jsonl")], base=other)
    assert found.base is not None
    with pytest.raises(ModelError, match="no model directory"):
        diagnose(folder / "run", [str(folder / "plain.jsonl")], base=tmp_path / "none")
