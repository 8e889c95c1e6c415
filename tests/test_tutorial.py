"""The tutorial's commands and keys exist; its notebook runs, cell by cell, on a tiny model."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from hafrm.cli import app
from hafrm.recipe_file import load_recipe
from support.tiny_runs import WORDS, write_base

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples/tutorial.ipynb"
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")


def run_notebook(overrides: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(variables, what the commands printed); `overrides` replaces variables of the first cell."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    first, *others = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    variables: dict[str, Any] = {}
    exec(first, variables)  # noqa: S102 - our own notebook
    assert overrides.keys() <= variables.keys()
    variables |= overrides
    printed = ""
    for cell in others:
        commands = [line[1:] for line in cell.splitlines() if line.startswith("!")]
        for command in commands:
            name, *arguments = command.split()
            assert name == "hafrm"
            done = subprocess.run(
                [sys.executable, "-m", "hafrm", *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            printed += done.stdout
        if not commands:
            exec(cell, variables)  # noqa: S102
    return variables, printed


def test_the_page_has_a_recipe_that_loads_and_commands_with_options_that_exist(tmp_path):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "ethics.yaml").write_text(recipe)
    assert load_recipe(tmp_path / "ethics.yaml").method.name == "bt"
    commands = re.findall(r"^    \$ hafrm (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 10
    for line in commands:
        verb, *arguments = shlex.split(line.replace(" & ", " "), comments=True)
        command = typer.main.get_command(app).commands[verb]
        command.make_context(verb, arguments)  # raises for an unknown option


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch):
    published = tmp_path / "published"
    published.mkdir()
    for part, start in (("train", 0), ("test", 100), ("test_hard", 200)):
        with (published / f"{part}.csv").open("w", newline="") as file:
            for i in range(start, start + 40):
                word = WORDS[i % 10]
                csv.writer(file).writerow(
                    [f"I saw {word} {i}, it was great.", f"I lost {word} {i}."]
                )
    model = write_base(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = {
        "MODEL": str(model),
        "DATA": str(published),
        "SIZES": {"train": 40, "test": 20, "test_hard": 20},
        "STEPS": 2,
    }
    variables, printed = run_notebook(overrides)
    assert variables["result"].sets[-1].accuracy.num == 40
    assert variables["rm"].best_of("a", ["b", "c"]).index in (0, 1)
    assert "longer is chosen" in printed
    assert os.path.getsize("report.html") > 10_000
