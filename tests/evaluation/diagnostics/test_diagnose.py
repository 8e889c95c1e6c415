"""The verb as a whole: one model or several on real files, its JSON and its tables."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from exports_for_tests import export_both
from hafrm.cli import app
from hafrm.errors import ConfigError, DataError, ModelError, NumericsError
from hafrm.evaluation.diagnostics.decided import Decided
from hafrm.evaluation.diagnostics.diagnose import Diagnosis, diagnose
from hafrm.evaluation.diagnostics.worst import MAX_CHARS, WRONG, cut_text, shown_prompt, worst
from hafrm.preferences import Comparison, Group, Message, Votes
from hafrm.tables.diagnostics import diagnosis_tables
from tiny_runs import WORDS

ESTIMATE = {"value", "low", "high", "num", "method", "confidence"}


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
    for renderable in diagnosis_tables(found):
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_json_has_what_its_readers_expect(found, folder) -> None:
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["scored_with"] == "reward"
    assert [each["name"] for each in written["sets"]] == ["plain", "voted", "all"]
    assert [each["num"] for each in written["sets"]] == [20, 29, 49]
    one = written["sets"][0]
    assert len(one["temperature"]["log_loss"]) == len(one["temperature"]["ece"]) == 2
    assert {"log_loss", "brier", "ece", "bins"} <= set(one["calibration"])
    margins = one["margins"]
    assert len(margins["edges"]) == len(margins["right"]) + 1 == len(margins["wrong"]) + 1
    assert sum(margins["right"]) + sum(margins["wrong"]) == 20
    for name in ("accuracy_more", "accuracy_less", "picks_more", "people_pick_more"):
        assert set(one["style"][0][name]) >= ESTIMATE
    assert set(one["slices"][0]) == {"tag", "value", "accuracy"}
    assert {"same_sign", "pearson", "spearman"} <= set(one["agreement"])
    noise = written["label_noise"]
    assert noise["num"] == 49
    assert noise["models"] == [str(folder / "run"), str(folder / "other")]
    assert {"disagreement", "num", "vote_split", "accuracy"} <= set(noise["by_disagreement"][0])
    assert 0 <= noise["auc"] <= 1
    assert list(noise["by_set"]) == ["voted"]
    seen = written["representation"]
    assert {"effective_rank", "top_share", "spectrum"} <= set(seen) & set(seen["base"])
    assert set(seen["distance"]) == {"cka", "cosine"}
    assert seen["also"][0]["distance"]["cka"] == pytest.approx(1.0)
    assert {"set", "prompt", "chosen", "rejected", "margin", "votes", "why"} == set(
        written["worst"][0]
    )
    contest = written["consistency"]
    assert [p["name"] for p in contest["policies"]] == [*noise["models"], "base model"]
    assert len(contest["wins"]) == 6  # two judges, three pairs of policies


def test_no_number_of_the_tables_is_cut_off_and_shares_have_intervals(printed) -> None:
    assert "…" not in printed
    assert len(re.findall(r"\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]", printed)) > 60
    for title in ("calibration", "by |margin|", "slice", "label audit", "hidden states", "judge"):
        assert title in printed


def test_slices_follow_votes_turns_and_tags_where_these_differ(found) -> None:
    tags = {each.name: {part.tag for part in each.slices} for each in found.sets}
    assert "votes" in tags["voted"]
    assert "votes" not in tags["plain"]
    assert "prompt length" in tags["plain"]
    assert "label" not in tags["voted"]  # all of them are "human"


def test_a_single_model_without_votes_has_no_label_audit_and_no_base(folder) -> None:
    found = diagnose(folder / "run" / "model" / "reward", [str(folder / "plain.jsonl")])
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["label_noise"] is None
    assert written["consistency"] is None
    assert written["sets"][0]["agreement"] is None
    assert written["representation"]["base"] is None
    assert written["representation"]["distance"] is None
    assert [each["name"] for each in written["sets"]] == ["plain"]


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


def test_options_that_would_do_nothing_are_refused(folder) -> None:
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


def test_margins_that_are_not_finite_are_an_error_that_names_a_group() -> None:
    groups = [group("g0", ["a", "b"]), group("g1", ["c", "d"])]
    decided = Decided.of(groups)
    with pytest.raises(NumericsError, match=r"1 of 2 margins .* group 'g1'"):
        decided.margins(np.array([1.0, 2.0, np.nan, 0.0]))
    with pytest.raises(NumericsError, match="2 of 2"):
        decided.margins(np.array([np.inf, np.inf, -np.inf, 0.0]))


# The flat table and the examples.


def group(name: str, responses: list[str], **comparison: object) -> Group:
    pair = Comparison(1, 0, **comparison)  # type: ignore[arg-type]
    return Group(
        name, (Message("user", f"prompt {name}"),), tuple(responses), (pair,), source=name[0]
    )


def test_margins_follow_indices_and_ties_are_left_out() -> None:
    """Scores 0..5 of three groups; the second is a tie; chosen is response 1."""
    groups = [group("a", ["x", "y"]), group("b", ["x", "y"], tie=True), group("c", ["p", "q"])]
    decided = Decided.of(groups)
    assert len(decided) == 2
    assert decided.margins(np.array([0.0, 3, 2, 9, 7, 5])).tolist() == [3.0, -2.0]
    assert (decided.chosen, decided.rejected) == (["y", "q"], ["x", "p"])
    assert {name: rows.tolist() for name, rows in decided.of_set().items()} == {
        "a": [0],
        "b": [],
        "c": [1],
        "all": [0, 1],
    }
    assert np.isnan(decided.votes).all()


def test_examples_are_the_clearest_mistakes_each_rejected_response_once() -> None:
    """Margins -1, -3, -2, 1; the second and third differ in nothing but the chosen response."""
    many = Group(
        "m",
        (Message("user", "prompt"),),
        ("good", "better", "bad"),
        (Comparison(0, 2), Comparison(1, 2)),
        source="m",
    )
    voted = group("v", ["r", "c"], votes=Votes(2, 1, 0))
    decided = Decided.of([voted, many, group("w", ["r", "c"])])
    found = worst(decided, np.array([[-1.0, -3.0, -2.0, 1.0]]))
    assert [(each.set, each.margin, each.chosen) for each in found] == [
        ("m", -3.0, "good"),
        ("v", -1.0, "c"),
    ]
    assert found[1].votes == (2, 1, 0)
    assert found[0].votes is None


def test_doubtful_labels_need_all_models_and_say_so() -> None:
    """Margins of four comparisons by two models, which divide them by 1 and 2: wrong in the first's eyes
    are a, b, d, all models are against a, b and d, most clearly d; each is shown once."""
    decided = Decided.of([group(name, ["r", "c"]) for name in "abcd"])
    margins = np.array([[-1.2, -1.1, 0.9, -0.7], [-1.0, -1.0, -1.0, -3.6055]])
    assert np.sqrt((margins**2).mean(1)) == pytest.approx([0.9937, 2.0], abs=1e-3)
    found = worst(decided, margins, num=2)
    assert [each.set for each in found] == ["a", "b", "d"]
    assert found[0].why.startswith(f"{WRONG}; all models are against the label, 0.9 times")
    assert found[2].why.startswith("all models are against the label, 1.3 times as clearly")
    alone = worst(decided, np.array([[-1.0, 1, 1, 1], [1.0, 1, 1, 1]]))
    assert [each.why for each in alone] == [WRONG]


def test_texts_are_cut_and_say_how_much_is_missing() -> None:
    text = "a" * MAX_CHARS + "bcd"
    assert cut_text(text) == "a" * MAX_CHARS + " [3 more characters]"
    assert cut_text(text, end=True) == "[3 more characters] " + text[3:]
    assert cut_text(" short ") == "short"
    turns = (Message("user", "hi"), Message("assistant", "yes?"), Message("user", "go"))
    assert shown_prompt(turns) == "user: hi\nassistant: yes?\nuser: go"


def test_a_base_that_does_not_fit_is_refused(folder, tmp_path) -> None:
    from tiny_runs import write_base

    other = write_base(tmp_path)
    config = json.loads((other / "config.json").read_text())
    assert config["hidden_size"] == 32  # the same size, so it is a base for all we know
    found = diagnose(folder / "run", [str(folder / "plain.jsonl")], base=other)
    assert found.base is not None
    with pytest.raises(ModelError, match="no model directory"):
        diagnose(folder / "run", [str(folder / "plain.jsonl")], base=tmp_path / "none")
