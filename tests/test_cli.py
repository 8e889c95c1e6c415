"""The command line, as a user meets it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hafrm.cli import app, main
from hafrm.data.reader import read_preferences
from hafrm.errors import DataError, ModelError
from hafrm.evaluation import evaluate
from hafrm.scoring.fused import FusedRule, write_fused_rule
from hafrm.scoring.loading import find_heads
from hafrm.scoring.reward_model import RewardModel
from hafrm.training import run_export
from hafrm.training.loop import run_training
from support.exports import export_both
from support.tiny_runs import tiny_recipe, write_preferences


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    export_both(folder)
    return folder


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def failing(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["hafrm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), capsys.readouterr().err


def test_every_verb_explains_itself():
    verbs = "train plan evaluate compare score export verify rlhf report best-of-n data demo"
    for verb in verbs.split():
        assert "Usage" in invoke(verb, "--help")


def test_wrong_usage_exits_with_2_and_refused_input_with_1_and_no_traceback(
    monkeypatch, capsys, tmp_path
):
    assert failing(monkeypatch, capsys, "trian")[0] == 2
    code, error = failing(monkeypatch, capsys, "evaluate", tmp_path, "missing.jsonl")
    assert code == 1
    assert "missing.jsonl" in error
    assert "Traceback" not in error
    code, error = failing(monkeypatch, capsys, "train")
    assert (code, "needs a recipe" in error) == (1, True)


def test_the_module_form_works_for_launchers():
    command = [sys.executable, "-m", "hafrm", "--help"]
    assert "train" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_scores_of_the_command_equal_plain_transformers_alone_and_in_a_batch(model, tmp_path):
    """float32, 1e-5; rows of every shape, in their order, the bad one in its place."""
    rows = [
        {"prompt": "Say sun.", "response": "sun", "id": 7},
        {"prompt": "Say sea.", "responses": ["sea", "no", "sea"]},
        {"prompt": "Say sun.", "chosen": "sun sun", "rejected": "I would say sea"},
        {"prompt": "Say sun.", "response": "   "},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    output = invoke("score", model / "reward", tmp_path / "in.jsonl", "--out", tmp_path / "out")
    assert "6 responses in 4 rows, 1 of them not scored" in output
    found = [json.loads(line) for line in (tmp_path / "out" / "in.jsonl").read_text().splitlines()]
    assert found[3]["reward"] is None
    assert "empty response" in found[3]["error"]
    assert found[0]["id"] == 7
    ours = [found[0]["reward"], *found[1]["rewards"]]
    ours += [found[2]["chosen_reward"], found[2]["rejected_reward"]]
    pairs = [("Say sun.", "sun"), ("Say sea.", "sea"), ("Say sea.", "no"), ("Say sea.", "sea")]
    pairs += [("Say sun.", "sun sun"), ("Say sun.", "I would say sea")]
    tokenizer = AutoTokenizer.from_pretrained(model / "reward")
    stock = AutoModelForSequenceClassification.from_pretrained(model / "reward").eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": r}], tokenize=False
        )
        for p, r in pairs
    ]
    with torch.no_grad():
        alone = [stock(**tokenizer(t, return_tensors="pt")).logits.item() for t in texts]
        batch = stock(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0].tolist()
    assert ours == pytest.approx(alone, abs=1e-5)
    assert ours == pytest.approx(batch, abs=1e-5)


def test_a_resumed_run_takes_a_smaller_token_budget_from_the_command_line(
    tmp_path, monkeypatch, capsys
):
    """The run is finished, so nothing is trained any more: what counts is what may be said."""
    monkeypatch.setattr(run_export, "check_golden", lambda _: {})
    run_training(tiny_recipe(tmp_path, method={"name": "bt"}), tmp_path / "run")
    output = invoke("train", "--resume", tmp_path / "run", "training.max_tokens=128")
    assert "trained 6 steps" in output
    given = ("train", "--resume", tmp_path / "run", "training.max_tokens=128", "training.seed=5")
    code, error = failing(monkeypatch, capsys, *given)
    assert (code, "recipe differs" in error) == (1, True)


def test_score_takes_folders_in_parts_and_says_what_is_listed(model, tmp_path):
    rows = [{"prompt": "Say sun.", "response": "sun"}, {"prompt": "Say sea."}]
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "in" / f"{name}.jsonl").write_text(text)
    command = ("score", model / "reward", tmp_path / "in", "--out", tmp_path / "out", "--shard")
    assert "1 responses in 2 rows, 1 of them not scored" in invoke(*command, "1/2")
    assert [p.name for p in (tmp_path / "out").glob("*.jsonl")] == ["b.jsonl"]
    output = invoke(*command, "0/1")
    assert "2 responses in 4 rows, 2 of them not scored" in output
    assert "1 shards were already finished" in output
    assert f"listed with reasons: {tmp_path / 'out' / '_score'}" in output.replace("\n", "")


@pytest.mark.parametrize("option", [("--shard", "2/2"), ("--dtype", "int8"), ("--device", "gpu")])
def test_score_refuses_options_that_make_no_sense(monkeypatch, capsys, model, tmp_path, option):
    source = write_preferences(tmp_path / "in.jsonl", num=2)
    out = tmp_path / "out"
    code, error = failing(monkeypatch, capsys, "score", model, source, "--out", out, *option)
    assert (code, "ConfigError" in error) == (1, True)
    assert not out.exists()


@pytest.mark.parametrize("verb", ["score", "evaluate", "also", "diagnose", "best-of-n"])
def test_every_verb_that_loads_a_model_takes_its_dtype_and_device(
    model, tmp_path, monkeypatch, verb
):
    loaded = []
    load = RewardModel.from_pretrained

    def spy(path, **options):
        loaded.append((str(options["dtype"]).removeprefix("torch."), options["device"]))
        return load(path, **options)

    monkeypatch.setattr(RewardModel, "from_pretrained", spy)
    reward, out = model / "reward", tmp_path / "out"
    data = write_preferences(tmp_path / "data.jsonl", num=8)
    rows = [{"prompt": f"Say {word}.", "responses": ["sun", "sea"]} for word in ("sun", "sea")]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {
        "score": ("score", reward, data, "--out", out),
        "evaluate": ("evaluate", reward, data),
        "also": ("evaluate", reward, data, "--also", model),
        "diagnose": ("evaluate", reward, data, "--diagnose", "--json", out),
        "best-of-n": ("best-of-n", reward, "--prompts", answers, "-n", "2", "--out", out),
    }[verb]
    options = ("--dtype", "bfloat16", "--device", "cpu")
    if verb == "best-of-n":
        options = ("--set", "pick.dtype=bfloat16", "--set", "pick.device=cpu")
    invoke(*arguments, *options)
    assert loaded == [("bfloat16", "cpu")] * (2 if verb == "also" else 1)


def test_evaluate_measures_every_source_and_both_heads(model, tmp_path):
    one = write_preferences(tmp_path / "one.jsonl", num=8)
    two = write_preferences(tmp_path / "two.jsonl", num=5, start=100)
    output = invoke("evaluate", model, one, two, "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert [s["name"] for s in result["sets"]] == ["one", "two", "all"]
    assert result["sets"][2]["accuracy"]["num"] == 13
    assert result["sets"][0]["implicit"]["accuracy"]["num"] == 8
    assert "pick longer" in output
    correct = [s["accuracy"]["num_correct"] for s in result["sets"]]
    assert correct[0] + correct[1] == correct[2]


def test_evaluate_shows_the_fused_score_beside_both_heads(tmp_path):
    """A factor of 0 is the reward itself, so that it gains nothing, and a huge one the policy alone."""
    export_both(tmp_path / "model")
    data = write_preferences(tmp_path / "one.jsonl", num=12)
    for factor in (0.0, 1e6):
        write_fused_rule(tmp_path / "model", FusedRule(factor))
        output = invoke("evaluate", tmp_path, data, "--json", tmp_path / "out.json")
        result = json.loads((tmp_path / "out.json").read_text())
        (found,) = result["sets"]
        same = found if factor == 0 else found["implicit"]
        assert found["fused"]["accuracy"] == same["accuracy"]
        assert found["fused_gain"]["num"] == 12
        assert result["fused_rule"].startswith(f"reward + {factor:.3g} x")
        assert re.search(r"fused +\d+\.\d % \[", output)
        assert "fused score, fitted on the run's validation data: reward + " in output


def test_a_run_its_model_folder_and_its_heads_are_all_understood(model, tmp_path):
    assert find_heads(model.parent) == find_heads(model)
    assert find_heads(model / "reward").policy is None
    assert find_heads(model / "policy").reward is None
    with pytest.raises(ModelError, match="holds no model"):
        find_heads(tmp_path)
    (tmp_path / "plain.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError):
        evaluate(model, [str(tmp_path / "plain.jsonl")])


def test_data_describes_and_split_parts_by_prompt_and_loses_no_id_or_response(tmp_path):
    file = write_preferences(tmp_path / "all.jsonl", num=10)
    assert "longer is chosen" in invoke("data", file, "--json", tmp_path / "data.json")
    assert json.loads((tmp_path / "data.json").read_text())["facts"]["comparisons"] == 10
    unlabelled = [{"id": f"u{i}", "prompt": f"other {i}", "response": "a"} for i in range(50)]
    with file.open("a") as lines:
        rows = [*unlabelled, {"prompt": "", "response": "b"}]
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    output = invoke("data", file, "--split", "0.3", "--out", tmp_path / "parts")
    assert "1 bad rows are left out" in output and "rows of unlabelled responses" in output
    files = [tmp_path / f"parts/{name}.jsonl" for name in ("train", "test")]
    parts = [read_preferences([file], need_comparisons=False).groups for file in files]
    ids = {group.id for groups in parts for group in groups}
    assert len(ids) == 60 and {f"u{i}" for i in range(50)} <= ids
    assert not {g.prompt for g in parts[0]} & {g.prompt for g in parts[1]}
