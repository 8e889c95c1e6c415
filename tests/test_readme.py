"""The README's eight lines of Python run and print what they say; the pages' commands can be run."""

import contextlib
import io
import re
import shlex
from ast import literal_eval
from pathlib import Path

import pytest
import typer

from hafrm.cli import app
from hafrm.recipe import describe_keys

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MODEL = "demo-run/haf/model/reward"
PROMISED = re.findall(r"print\(.*\)  # (.*)", CODE)


def printed(model: Path) -> list[str]:
    """What the README's code prints with another model directory."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(CODE.replace(MODEL, str(model)), {})  # noqa: S102 - our own README
    return out.getvalue().splitlines()


def test_it_runs_on_any_reward_model_and_prints_what_it_promises_in_kind(exported):
    lines = [line for line in CODE.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 8
    assert MODEL in CODE
    rewards, preference, best = printed(exported / "reward")
    assert len(literal_eval(rewards)) == len(literal_eval(PROMISED[0])) == 2
    assert 0 < float(preference) < 1
    assert 0 < float(PROMISED[1]) < 1
    assert len(best) > 5


def test_commands_of_the_quickstart_have_options_that_exist_and_files_that_are_there_or_made():
    page, made = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8"), {"demo-run"}
    lines = re.findall(r"^    hafrm (.*)$", page.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) == 13
    group = typer.main.get_command(app)
    for line in lines:
        verb, *arguments = shlex.split(line, comments=True)
        group.commands[verb].make_context(verb, list(arguments))  # raises for an unknown option
        place = arguments[arguments.index("--out") + 1] if "--out" in arguments else None
        for word in arguments:
            path = word.rpartition("=")[2]
            if "/" in path and not re.fullmatch(r"\d/\d", path):
                assert (ROOT / path).is_file() or path.split("/")[0] in made, line
        assert not {"run", "reward.model=run"} & {*arguments} - {place} or "run" in made, line
        made |= {place} - {None}


def test_commands_of_the_how_to_pages_have_options_that_exist():
    group = typer.main.get_command(app)
    for page in sorted((ROOT / "docs/howto").glob("*.md")):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        commands = re.findall(r"^    (?:torchrun .* -m )?hafrm (.*)$", text, re.MULTILINE)
        commands += re.findall(r"`(?:torchrun [^`]* -m )?hafrm ([^`]* [^`]*)`", text)
        assert commands, page.name
        for line in commands:
            verb, *arguments = shlex.split(re.sub(r"\s#.*", "", line).replace("$", ""))
            # raises for an unknown option
            words = group.commands[verb].make_context(verb, arguments).params.get("overrides") or []
            keys = {word.partition("=")[0] for word in words if "=" in word}
            assert keys <= set(describe_keys()), line


@pytest.mark.slow
def test_on_the_demo_it_prints_these_numbers(tmp_path):
    """Training on another processor rounds otherwise: rewards to 1, what is preferred exactly."""
    from hafrm.demo.run_demo import run_demo

    run_demo(tmp_path / "demo-run", on_stage=lambda _: None)
    rewards, preference, best = printed(tmp_path / MODEL)
    assert literal_eval(rewards) == pytest.approx(literal_eval(PROMISED[0]), abs=1.0)
    assert float(preference) == pytest.approx(float(PROMISED[1]), abs=0.1)
    assert best == PROMISED[2]
