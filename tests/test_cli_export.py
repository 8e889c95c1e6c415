"""The verbs `export` and `verify`, as a user meets them."""

import json
import shutil
import sys

import pytest
from typer.testing import CliRunner

from hafrm.cli import app, main
from hafrm.export.checklist import replay_directory
from hafrm.training import run_export
from hafrm.training.loop import run_training
from support.export_faults import FAULTS
from support.reward_servers import openrlhf, serving
from support.tiny_runs import tiny_recipe


@pytest.fixture(scope="module")
def reward(exported):
    return exported / "reward"


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def refused(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["hafrm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def test_verify_shows_every_clause_and_exits_with_0(reward, tmp_path):
    output = invoke("verify", reward, "--json", tmp_path / "out.json")
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["ok"]
    assert all(clause["name"] in output for clause in told["clauses"])
    assert f"{len(told['clauses'])} of {len(told['clauses'])} clauses hold" in output
    assert "fix:" not in output


def test_verify_exits_with_1_and_says_how_to_fix_what_does_not_hold(reward, tmp_path):
    broken = shutil.copytree(reward, tmp_path / "run" / "model" / "reward")
    FAULTS["no problem type"][1](broken)
    output = invoke("verify", tmp_path / "run", code=1)
    assert "FAIL" in output
    assert '"problem_type": "regression"' in output
    assert "1 do not" in output


def test_verify_replays_golden_scores_on_a_server(reward, tmp_path):
    lines = (reward / "golden_scores.jsonl").read_text().splitlines()
    known = {row["text"]: row["reward"] for row in map(json.loads, lines)}
    with serving(openrlhf(lambda texts: [known[t] for t in texts])) as url:
        output = invoke("verify", url, "--golden", reward, "--json", tmp_path / "out.json")
        assert "openrlhf" in output
        assert "the server gives the exported scores" in output
    assert json.loads((tmp_path / "out.json").read_text())["num"] == 5
    with serving(openrlhf(lambda texts: [known[t] + 1 for t in texts])) as url:
        output = invoke("verify", url, "--golden", reward / "golden_scores.jsonl", code=1)
        assert "does NOT give the exported scores" in output
        assert "instead of" in output


def test_verify_refuses_what_cannot_be_meant(reward, tmp_path, monkeypatch, capsys):
    url = "http://127.0.0.1:9"
    assert "give --golden" in refused(monkeypatch, capsys, "verify", url)
    error = refused(monkeypatch, capsys, "verify", url, "--golden", reward)
    assert "ServerError" in error
    assert "gives no answer" in error
    assert "no config.json" in refused(monkeypatch, capsys, "verify", tmp_path)


def test_export_says_what_it_wrote_and_how_it_was_proved(tmp_path, monkeypatch, capsys):
    for module in (run_export,):
        monkeypatch.setattr(module, "check_golden", lambda path: replay_directory(path).differences)
    run_training(tiny_recipe(tmp_path, method={"name": "bt"}), tmp_path / "run")
    output = invoke("export", tmp_path / "run", "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert "exported the reward model from step-6 in bfloat16" in output
    assert "plain transformers gives the same" in output
    assert "clauses hold" in invoke("verify", tmp_path / "out")
    error = refused(monkeypatch, capsys, "export", tmp_path / "run", "--out", tmp_path / "out")
    assert "exists already" in error
    given = ("export", tmp_path / "run", "--out", tmp_path / "p", "--policy")
    assert "trains no policy head" in refused(monkeypatch, capsys, *given)
