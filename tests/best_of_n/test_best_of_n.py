"""Best of n from the command line on: files, numbers, kills, and what is refused."""

import json
import math
import re
import shutil
import sys

import pytest
from typer.testing import CliRunner

from hafrm.best_of_n import candidates as candidates_module
from hafrm.best_of_n.picks import BestOfN
from hafrm.best_of_n.run_best_of_n import BestOfNOptions, best_of_n
from hafrm.cli import app, main
from hafrm.errors import DataError
from hafrm.recipe_file import build_as
from hafrm.results import read_result
from support.chat_endpoint import fails, says, serving
from support.exports import export_both
from support.tiny_runs import write_base


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


ROWS = [
    {"prompt": f"Say {i}.", "responses": [f"{c * (1 + (i + k) % 4)}" for k, c in enumerate("abcd")]}
    for i in range(6)
]
GOLDS = {
    "length": lambda _, response: float(len(response)),
    "truth": lambda _, response: float(len(response)),
    "letter": lambda _, response: -float(ord(response[0])),
    "middling": lambda _, response: 3.0 * (len(response) == 2),
}


@pytest.fixture
def candidates(tmp_path):
    return str(write(tmp_path / "candidates.jsonl", ROWS))


@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    """A run folder with a reward model and a policy."""
    folder = tmp_path_factory.mktemp("runs") / "rm"
    export_both(folder / "model")
    return folder


def pick(out, rows, models, golds=GOLDS, **options):
    """A job whose models are rewards that are known."""
    prompts = str(write(out.parent / f"{out.name}-rows.jsonl", rows))
    values = {"pick": {"models": models, "prompts": [prompts], **options}}
    return best_of_n(build_as(BestOfNOptions, values), out, golds=golds)


def read_json(file):
    return json.loads(file.read_text())


def invoke(*arguments):
    result = CliRunner().invoke(app, ["best-of-n", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["hafrm", "best-of-n", *map(str, arguments)])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().err


def test_curves_and_wins_by_hand(tmp_path):
    """Two prompts with candidates "a", "bb" and "ccc", "d".

    By letter the picks are "a" and "ccc", by length "bb" and "ccc". With length as gold: the letter's
    gold curve is (1.5 + 2) / 2 = 1.75, then (1 + 3) / 2 = 2; the length's ends in 2.5. Letter against
    length: a loss and a tie (the same pick)."""
    rows = [{"prompt": "x", "responses": ["a", "bb"]}, {"prompt": "y", "responses": ["ccc", "d"]}]
    result = pick(tmp_path / "out", rows, ["letter", "long=length"], gold="truth")
    letter, length = result.models
    assert (letter.name, length.name) == ("letter", "long")
    assert [point.gold.value for point in letter.curve] == [1.75, 2.0]
    assert [point.gold.value for point in length.curve] == [1.75, 2.5]
    assert [point.proxy.value for point in length.curve] == [1.75, 2.5]
    assert [point.kl for point in length.curve] == [0.0, math.log(2) - 0.5]
    assert (letter.peak, letter.since_peak.value) == (2, 0.0)
    (wins,) = result.wins
    assert (wins.win.value, wins.tie.value, wins.lose.value) == (0.0, 0.5, 0.5)
    assert (wins.difference.value, wins.same, wins.judge) == (-0.5, 0.5, "truth")
    assert [baseline.curve[-1].gold.value for baseline in result.baselines] == [2.5, 2.5]
    assert read_result(tmp_path / "out" / "best_of_n.json", BestOfN) == result
    picks = [json.loads(line) for line in (tmp_path / "out/picks.jsonl").read_text().splitlines()]
    assert [p["response"] for p in picks] == ["a", "ccc", "bb", "ccc"]
    assert (picks[0]["reward"], picks[0]["gold"]) == (-97.0, 1.0)


def test_a_gold_score_that_falls_while_the_own_score_rises_is_reported(tmp_path):
    """Candidates of lengths 1, 2 and 3 with gold 0, 3 and 0. Of two random ones the longer is the second
    once and the third twice: gold 1. So n = 1 gives 1, n = 2 gives 1, n = 3 gives 0: the peak is at 1, and
    1 is lost since."""
    rows = [{"prompt": str(i), "responses": ["a", "bb", "ccc"]} for i in range(3)]
    (model,) = pick(tmp_path / "out", rows, ["length"], gold="middling").models
    assert [point.gold.value for point in model.curve] == pytest.approx([1, 1, 0])
    assert [point.proxy.value for point in model.curve] == pytest.approx([2, 8 / 3, 3])
    assert (model.peak, model.since_peak.value, model.gain.value) == (1, -1.0, -1.0)


def test_prompts_that_cannot_be_used_are_left_out_for_all_and_counted(tmp_path):
    def some(prompt, response):
        if prompt[-1].content == "Say 3.":
            raise DataError("unknown")
        return float(len(response))

    def nobody(*_):
        raise DataError("unknown")

    golds = GOLDS | {"some": some, "nobody": nobody}
    rows = [*ROWS, {"prompt": "alone", "response": "x"}]
    result = pick(tmp_path / "out", rows, ["some", "length"], golds)
    assert result.num_prompts == 5
    assert result.left_out == {
        "fewer than two different candidates": 1,
        "not scored by some: unknown prompt": 1,
    }
    assert result.wins == ()
    assert result.models[0].curve[0].gold is None
    with pytest.raises(DataError, match="not scored by nobody: unknown prompt"):
        pick(tmp_path / "none", ROWS, ["nobody"], golds)
    with pytest.raises(DataError, match="none of 1 prompts has two different candidates"):
        pick(tmp_path / "alone", rows[-1:], ["length"])


def test_the_command_draws_scores_and_resumes_after_a_kill(tmp_path, rm, monkeypatch):
    base = write_base(tmp_path)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}."} for i in range(5)])
    models = (f"rm={rm}", f"own={rm / 'model' / 'policy'}")
    command = (*models, "--prompts", prompts, "--policy", base, "-n", 4)
    command += ("--set", "draw.max_new_tokens=6")
    out = tmp_path / "out"
    output = invoke(*command, "--out", out)
    assert "own score of the best of n" in output
    assert "candidates: 4.0 a prompt; prompts with fewer than 4: 0" in output
    first = read_json(out / "best_of_n.json")
    assert [model["name"] for model in first["models"]] == ["rm", "own"]
    drawn = [json.loads(line) for line in (out / "candidates.jsonl").read_text().splitlines()]
    assert [len(set(row["responses"])) for row in drawn] == [4] * 5
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [len(s) for row in scores for s in row["scores"].values()] == [4] * 10

    # a kill while models scored: nothing is drawn again
    (out / "best_of_n.json").unlink()
    with monkeypatch.context() as context:
        context.setattr(candidates_module.LocalPolicy, "write", None)
        invoke(*command, "--out", out)
    assert read_json(out / "best_of_n.json") == first

    # the same candidates once more, read from the file
    invoke(models[0], "--prompts", out / "candidates.jsonl", "-n", 4, "--out", tmp_path / "again")
    again = read_json(tmp_path / "again" / "best_of_n.json")
    values = [point["proxy"]["value"] for point in again["models"][0]["curve"]]
    assert values == pytest.approx([p["proxy"]["value"] for p in first["models"][0]["curve"]])


def test_an_endpoint_writes_and_another_judges(tmp_path, rm):
    texts = {"0": ["a", "bb", "cc"] * 2, "1": ["x", "yyy", "z"] * 2, "2": ["same"] * 6}

    def judge(body):
        text = body["messages"][0]["content"]
        a, b = re.findall(r"\[Reply \w+\]\n(.*?)\n\[End", text, re.DOTALL)
        return says("Verdict: " + ("tie" if len(a) == len(b) else "AB"[len(b) > len(a)]))

    prompts = write(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(3)])
    out = tmp_path / "out"
    with (
        serving(lambda body: says(texts[body["messages"][0]["content"]].pop(0))) as writer,
        serving(judge) as reader,
    ):
        command = (rm, "--prompts", prompts, "--policy", writer.url, "-n", 3)
        command += ("--judge", reader.url, "--set", "policy.request={seed: 5}", "--out", out)
        invoke(*command)
        assert all(body["seed"] == 5 for body in writer.asked)
        asked = len(reader.asked)
        (out / "best_of_n.json").unlink()
        invoke(*command)
        assert len(reader.asked) == asked
    result = read_json(out / "best_of_n.json")
    assert result["judge"] == "m"
    assert result["left_out"] == {"fewer than two different candidates": 1}
    (wins,) = result["wins"]
    assert (wins["first"], wins["second"]) == ("rm", "one sample")
    assert wins["reliability"]["num_pairs"] > 0


def test_a_reward_model_can_be_the_gold_score(tmp_path, candidates, rm):
    """Measured by its equal a model never loses and always picks the gold best."""
    out, gold = tmp_path / "out", shutil.copytree(rm, tmp_path / "gold")
    invoke(f"a={rm}", "--prompts", candidates, "--gold", gold, "--out", out)
    result = read_json(out / "best_of_n.json")
    (model,), (wins,) = result["models"], result["wins"]
    curve = [p["proxy"]["value"] for p in model["curve"]]
    assert [p["gold"]["value"] for p in model["curve"]] == pytest.approx(curve)
    assert (wins["lose"]["value"], wins["judge"]) == (0.0, f"gold ({gold})")


def test_a_judge_that_fails_half_way_resumes_and_pays_once(tmp_path, candidates, rm):
    down = [True]

    def judge(body):
        broken = down and "Say 4." in body["messages"][0]["content"]
        return fails(500, "down") if broken else says("Verdict: A")

    with serving(judge) as fake:
        command = (f"a={rm}", f"b={rm / 'model' / 'policy'}", "--prompts", candidates)
        command += ("--out", tmp_path / "out", "--judge", fake.url)
        command += ("--set", "pick.sample=true", "--set", "judge.retries=0")
        command += ("--set", "judge.concurrency=1")
        assert CliRunner().invoke(app, ["best-of-n", *map(str, command)]).exit_code != 0
        assert not (tmp_path / "out" / "best_of_n.json").exists()
        down.clear()
        asked = [json.dumps(body) for body in fake.asked]
        paid = {body for body in asked if "Say 4." not in body}
        fake.asked.clear()
        invoke(*command)
        assert paid
        assert not paid & {json.dumps(body) for body in fake.asked}
    for wins in read_json(tmp_path / "out" / "best_of_n.json")["wins"]:
        assert wins["reliability"] is None or wins["reliability"]["position_bias"] == 1.0
        assert wins["difference"]["value"] == 0.0


def test_options_that_do_not_go_together_are_refused_before_anything_is_loaded(
    monkeypatch, capsys, tmp_path, candidates, rm
):
    for options, message in (
        ((rm, "--set", "judge.model=x"), "need --judge URL"),
        ((rm, "--judge", rm), "is given as the URL of an endpoint"),
        ((f"gold={rm}",), "the name 'gold' is taken"),
        ((rm, rm), "the name 'rm' is taken"),
        ((rm, "--set", "draw.temprature=1"), "did you mean temperature"),
        ((tmp_path / "nothing",), "does not exist; give the directory"),
        ((rm, "--gold", "moon"), "moon"),
        ((rm, "--gold", rm / "model" / "reward"), "also picks, and would judge its own picks"),
        ((rm, "--policy", rm / "model" / "reward"), "cannot write"),
    ):
        command = (*options, "--prompts", candidates, "--out", tmp_path / "out")
        error = refused(monkeypatch, capsys, *command)
        assert message in " ".join(error.split()), message
    assert not (tmp_path / "out").exists()
    command = (rm, "--prompts", candidates, "--out", tmp_path / "out")
    invoke(*command)
    error = refused(monkeypatch, capsys, *command, "-n", 2)
    assert "was made with other settings (different: candidates)" in " ".join(error.split())
