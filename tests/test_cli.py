"""The command line, as a user meets it."""

import json
import logging
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hafrm.cli import app, data_verbs, main
from hafrm.data.reader import read_preferences
from hafrm.evaluation import evaluate, heads
from hafrm.export.checklist import replay_directory
from hafrm.recipe_file import load_recipe
from hafrm.results import write_result
from hafrm.scoring.reward_model import IMPLICIT_RULE, ImplicitRule, RewardModel
from hafrm.training import run_export
from hafrm.training.loop import run_training
from support.export_faults import FAULTS
from support.forked import on_ranks
from support.reward_servers import openrlhf, serving
from support.tiny_runs import tiny_recipe, write_preferences


@pytest.fixture
def refused(monkeypatch, capsys):
    """The error that a command ends in, on one line, with its exit code in front."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["hafrm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return f"{stopped.value.code} {' '.join(capsys.readouterr().err.split())}"

    return run


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_verb_explains_itself():
    verbs = list(typer.main.get_command(app).commands)
    assert verbs == [
        *("train", "plan", "compare", "rlhf", "evaluate", "score", "best-of-n"),
        *("export", "serve", "verify", "data", "report", "demo"),
    ]
    for verb in verbs:
        assert "Usage" in invoke(verb, "--help")


def test_wrong_usage_exits_with_2_and_refused_input_with_1_and_no_traceback(
    exported, refused, tmp_path
):
    assert refused("trian").startswith("2 ")
    assert refused("train").startswith("1 ConfigError: this needs a recipe")
    assert refused("train", "gone.yaml").startswith("1 run folder: runs/")
    error = refused("evaluate", exported, tmp_path / "missing.jsonl")
    assert error.startswith("1 ") and "missing.jsonl" in error and "Traceback" not in error
    source = write_preferences(tmp_path / "in.jsonl", num=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1, port {port} (Address" in refused("serve", exported, "--port", port)
    devices = [("--device", name) for name in ("gpu", "cuda:99")]
    for option in (("--shard", "2/2"), ("--dtype", "int8"), *devices):
        command = ("score", exported, source, "--out", tmp_path / "out", *option)
        assert refused(*command).startswith("1 ConfigError")
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_said_before_the_work_and_nothing_is_overwritten(
    tmp_path, refused, monkeypatch
):
    data = write_preferences(tmp_path / "in.jsonl", num=12)
    for place in (tmp_path, data / "x.json", "/proc/x.json"):
        error = refused("data", data, "--json", place)
        assert error.startswith(f"1 CheckpointError: cannot write {place}: ")
    run = tmp_path / "run"
    assert "leave out --out" in refused("train", "--resume", run, "--out", tmp_path)
    split = ("data", data, "--out", tmp_path, "--split")
    assert "--split must be between 0 and 1" in refused(*split, "1.5")
    invoke(*split, "0.5")
    assert "train.jsonl, " in (error := refused(*split, "0.5")) and "exists already" in error
    monkeypatch.setattr(data_verbs, "show_result", lambda *_: Path("/nowhere/x").read_bytes())
    assert refused("data", data) == "1 stopped: /nowhere/x: No such file or directory"


def test_the_version_and_those_of_the_libraries_are_shown():
    shown = dict(line.split(" ") for line in invoke("--version").splitlines())
    assert {"python", "torch", "transformers"} <= shown.keys()


def test_a_recipe_of_another_verb_is_named(refused):
    recipes = Path(__file__).resolve().parents[1] / "recipes"
    error = refused("plan", recipes / "rlhf-tiny-cpu.yaml")
    assert error.endswith("has the section `reward`: it is a recipe for hafrm rlhf")
    assert "recipe for hafrm train" in refused("rlhf", recipes / "tiny-cpu.yaml")


def test_the_module_form_works_for_launchers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hafrm", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("hafrm", run_name="__main__")
    assert "train" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a reward head only."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_export, "check_golden", lambda path: replay_directory(path).differences)
        run_training(tiny_recipe(folder, method={"name": "bt"}), folder / "run")
    return folder / "run"


def test_a_resumed_run_takes_a_smaller_token_budget_from_the_command_line(run, refused):
    """The run is finished, so nothing is trained any more: what counts is what may be said."""
    command = ("train", "--resume", run, "training.max_tokens=128")
    assert "trained 6 steps" in invoke(*command)
    assert "recipe differs" in refused(*command, "training.seed=5")


def test_export_says_what_it_wrote_and_how_it_was_proved(run, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(run_export, "check_golden", lambda path: replay_directory(path).differences)
    command = ("export", run, "--out", tmp_path / "out")
    output = invoke(*command, "--dtype", "bfloat16")
    assert "exported the reward model from step-6 in bfloat16" in output
    assert "plain transformers gives the same" in output
    assert "clauses hold" in invoke("verify", tmp_path / "out")
    assert "exists already" in refused(*command)
    assert "trains no policy head" in refused(*command[:-1], tmp_path / "policy", "--policy")


def test_verify_shows_every_clause_and_exits_with_1_where_one_does_not_hold(
    exported, tmp_path, refused
):
    output = invoke("verify", exported, "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["ok"]
    assert all(clause["name"] in output for clause in result["clauses"])
    assert f"{len(result['clauses'])} of {len(result['clauses'])} clauses hold" in output
    assert "fix:" not in output
    policy = shutil.copytree(exported / "policy", tmp_path / "policy")
    write_result(policy / IMPLICIT_RULE, ImplicitRule(None))
    assert "is a policy, but verify checks reward models" in refused("verify", policy)
    policy_run = shutil.copytree(
        exported / "policy", tmp_path / "rlhf" / "model" / "policy"
    ).parents[1]
    assert "is a policy, but verify checks reward models" in refused("verify", policy_run)
    broken = shutil.copytree(exported / "reward", tmp_path / "run" / "model" / "reward")
    FAULTS["no problem type"][1](broken)
    output = invoke("verify", tmp_path / "run", code=1)
    assert "fail" in output
    assert '"problem_type": "regression"' in output


def test_verify_replays_golden_scores_on_a_server(exported, tmp_path, refused):
    golden = exported / "reward" / "golden_scores.jsonl"
    rewards = {row["text"]: row["reward"] for row in map(json.loads, golden.open())}
    with serving(openrlhf(lambda texts: [rewards[t] for t in texts])) as url:
        output = invoke("verify", url, "--golden", exported, "--json", tmp_path / "out.json")
        assert "openrlhf" in output
        assert "the server gives the exported scores" in output
        assert "give --golden" in refused("verify", url)
    assert json.loads((tmp_path / "out.json").read_text())["num"] == 5
    with serving(openrlhf(lambda texts: [rewards[t] + 1 for t in texts])) as url:
        output = invoke("verify", url, "--golden", golden, code=1)
        assert "does NOT give the exported scores" in output
        assert "instead of" in output
    assert "ServerError" in refused("verify", "http://127.0.0.1:9", "--golden", golden)


def test_score_takes_folders_in_parts_and_says_what_is_listed(exported, tmp_path):
    rows = [{"prompt": "Say sun.", "response": "sun"}, {"prompt": "Say sea."}]
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(tmp_path / "in" / name, rows)
    command = ("score", exported, tmp_path / "in", "--out", tmp_path / "out", "--shard")
    assert "1 responses in 2 rows, 1 of the rows not scored" in invoke(*command, "1/2")
    assert [p.name for p in (tmp_path / "out").glob("*.jsonl")] == ["b.jsonl"]
    output = invoke(*command, "0/1")
    assert "2 responses in 4 rows, 2 of the rows not scored" in output
    assert "1 shards were already finished" in output
    assert f"listed with reasons: {tmp_path / 'out' / '_score'}" in output.replace("\n", "")


@pytest.mark.parametrize("verb", ["score", "also", "best-of-n"])
def test_every_verb_that_loads_a_model_takes_its_dtype_and_device(
    exported, tmp_path, monkeypatch, verb
):
    loaded = []
    load = RewardModel.from_pretrained

    def spy(path, **options):
        loaded.append((str(options["dtype"]).removeprefix("torch."), options["device"]))
        return load(path, **options)

    monkeypatch.setattr(RewardModel, "from_pretrained", spy)
    reward, out = exported / "reward", tmp_path / "out"
    data = write_preferences(tmp_path / "data.jsonl", num=8)
    rows = [{"prompt": f"Say {word}.", "responses": ["sun", "sea"]} for word in ("sun", "sea")]
    answers = write_lines(tmp_path / "answers.jsonl", rows)
    arguments = {
        "score": ("score", reward, data, "--out", out),
        "also": ("evaluate", reward, data, "--also", exported),
        "best-of-n": ("best-of-n", reward, "--prompts", answers, "-n", "2", "--out", out),
    }[verb]
    invoke(*arguments, "--dtype", "bfloat16", "--device", "cpu")
    assert loaded == [("bfloat16", "cpu")] * (2 if verb == "also" else 1)


def test_evaluate_measures_every_source_by_both_heads(exported, tmp_path):
    (tmp_path / "model").mkdir()
    for head in ("reward", "policy"):
        (tmp_path / "model" / head).symlink_to(exported / head)
    sources = [
        write_preferences(tmp_path / "one.jsonl", num=8),
        write_preferences(tmp_path / "two.jsonl", num=5, start=100),
    ]
    (tmp_path / "out.json").write_text("{}")
    output = invoke("evaluate", tmp_path, *sources, "--json", tmp_path / "out.json")
    assert f"{tmp_path / 'out.json'} replaced" in output.replace("\n", "")
    assert "out.json written" not in output
    sets = json.loads((tmp_path / "out.json").read_text())["sets"]
    assert [s["name"] for s in sets] == ["one", "two", "all"]
    correct = [s["accuracy"]["num_correct"] for s in sets]
    assert correct[0] + correct[1] == correct[2]
    assert (sets[2]["accuracy"]["num"], sets[0]["implicit"]["accuracy"]["num"]) == (13, 8)
    assert "pick longer" in output
    assert re.search(r"implicit reward +\d+\.\d % \[", output)


def test_evaluate_names_a_file_that_the_run_was_trained_on(run, tmp_path, caplog):
    """By its content and the rows selected: another name hides nothing, other rows are not accused."""
    trained_on = load_recipe(run / "recipe.yaml").data.train[0]
    copy = shutil.copy(trained_on, tmp_path / "held-out.jsonl")
    result = evaluate(run, [copy, write_preferences(tmp_path / "other.jsonl", num=8, start=500)])
    assert result.trained_on == (str(copy),)
    assert [line for line in caplog.messages if "was trained on" in line] == [
        f"{copy} was trained on: its accuracy says little about other data"
    ]
    selected = shutil.copytree(run, tmp_path / "selected")
    recipe = (run / "recipe.yaml").read_text()
    (selected / "recipe.yaml").write_text(
        recipe.replace(trained_on, f"{trained_on}#label=a&limit=5")
    )
    parts = [f"{copy}{selection}" for selection in ("", "#label=a", "#limit=3", "#label=b")]
    seen = [heads.training_data(heads.find_heads(selected), part) for part in parts]
    assert seen == [(str(copy),)] * 3 + [()]


@pytest.mark.parametrize("options", [(), ("--diagnose",)], ids=["plain", "diagnose"])
def test_two_processes_evaluate_to_the_result_of_one(exported, tmp_path, options):
    data = str(write_preferences(tmp_path / "data.jsonl", num=8))
    ours, theirs = (str(tmp_path / f"{num}.json") for num in ("one", "two"))
    invoke("evaluate", exported, data, *options, "--json", ours)
    on_ranks("evaluate", tmp_path, str(exported), data, *options, "--json", theirs)
    assert Path(ours).read_bytes() == Path(theirs).read_bytes()
    logs = [(tmp_path / f"evaluate-{rank}.log").read_text() for rank in "01"]
    assert "accuracy" in logs[0] and "accuracy" not in logs[1]


def test_data_describes_and_split_parts_by_prompt_and_keeps_what_has_no_label(tmp_path):
    file = write_preferences(tmp_path / "all.jsonl", num=30)
    output = invoke("data", file, "--json", tmp_path / "data.json")
    assert "longer is chosen" in output
    assert json.loads((tmp_path / "data.json").read_text())["facts"]["comparisons"] == 30
    with file.open("a") as lines:
        rows = [{"id": f"u{i}", "prompt": f"other {i}", "response": "a"} for i in range(50)]
        lines.writelines(json.dumps(row) + "\n" for row in [*rows, {"prompt": ""}])
    output = invoke("data", file, "--split", "0.3", "--out", tmp_path / "parts")
    assert "1 bad rows are left out" in output and "rows of unlabelled responses" in output
    files = [tmp_path / f"parts/{name}.jsonl" for name in ("train", "test")]
    parts = [read_preferences([part], need_comparisons=False).groups for part in files]
    assert sum(map(len, parts)) == 80
    assert not {g.prompt for g in parts[0]} & {g.prompt for g in parts[1]}
    assert {f"u{i}" for i in range(50)} <= {g.id for part in parts for g in part}


MISSPELT = "model: {pathh: base}\n"
GONE = "{model: {path: base}, data: {train: gone.jsonl}, training: {steps: 1}}\n"


@pytest.mark.parametrize(
    ("verb", "text", "message"),
    [
        ("train", MISSPELT, "did you mean path?"),
        ("plan", MISSPELT, "did you mean path?"),
        ("compare", MISSPELT, "did you mean path?"),
        ("train", GONE, "gone.jsonl: no such file"),
        ("compare", GONE, "gone.jsonl: no such file"),
    ],
)
def test_a_misspelt_recipe_and_a_missing_file_are_refused_before_torch_is_imported(
    verb, text, message, tmp_path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    code = (
        f"import sys; from hafrm.cli import main; sys.argv = ['hafrm', {verb!r}, {str(recipe)!r}]\n"
        "try: main()\nexcept SystemExit as stopped: sys.exit(3 if 'torch' in sys.modules else stopped.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr


def test_warnings_of_the_hub_are_left_to_its_own_handler_so_that_they_are_printed_once(refused):
    assert refused("plan", "nowhere.yaml").startswith("1 ConfigError")
    assert not any(logging.getLogger(name).propagate for name in ("huggingface_hub", "datasets"))
