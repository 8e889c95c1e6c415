"""The recipes, their reference and the launch files: all load, name what exists, and are complete."""

import ast
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from hafrm.recipe import Recipe, Section, describe_keys
from hafrm.recipe_file import dump_recipe, load_as, load_recipe
from hafrm.rlhf.rlhf_recipe import RlhfRecipe

ROOT = Path(__file__).resolve().parents[1]
EVERY_RECIPE = sorted((ROOT / "recipes").glob("*.yaml"))
KINDS = {p: RlhfRecipe if "\nreward:" in p.read_text() else Recipe for p in EVERY_RECIPE}
RECIPES = [path for path, kind in KINDS.items() if kind is Recipe]
LAUNCH = ROOT / "examples" / "launch"


def reference_tables(root: type[Section] = Recipe) -> str:
    """What docs/recipes.md must hold: a table for each section, a row for each key."""
    lines: list[str] = []
    section = ""
    for key in describe_keys(root):
        if key.name.split(".")[0] != section:
            section = key.name.split(".")[0]
            lines += ["", f"### {section}", "", "| key | allowed | default | meaning |"]
            lines += ["|---|---|---|---|"]
        lines.append(f"| `{key.name}` | {key.allowed} | `{key.default}` | {key.meaning} |")
    return "\n".join(lines)


@pytest.mark.parametrize("path", EVERY_RECIPE, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_being_written_out(path: Path, tmp_path: Path):
    recipe = load_as(KINDS[path], path)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_as(KINDS[path], tmp_path / "again.yaml") == recipe


def test_there_is_a_small_a_full_and_a_lora_recipe_and_two_for_rlhf():
    assert {path.stem for path in RECIPES} >= {"tiny-cpu", "phi2-full", "mistral-7b-lora"}
    rlhf = {path.stem for path, kind in KINDS.items() if kind is RlhfRecipe}
    assert rlhf >= {"ppo-paper", "rlhf-tiny-cpu"}


def test_the_ppo_recipe_holds_the_numbers_of_the_paper_s_script_and_of_trl_s_old_defaults():
    """facts: 30,000 episodes of 2, lr 1e-6, 384/128 tokens, T 0.5, top-p 0.8, penalty 1.2, clip 3;
    TRL: adaptive KL from 0.2 to 6 over 10,000, 4 epochs, lambda 0.95, value weight 0.1."""
    recipe = load_as(RlhfRecipe, ROOT / "recipes/ppo-paper.yaml")
    training, sampling, algorithm = recipe.training, recipe.sampling, recipe.algorithm
    assert training.steps * training.batch_size == 30_000
    assert (training.batch_size, training.learning_rate) == (2, 1e-6)
    assert (recipe.data.max_prompt_length, sampling.max_new_tokens) == (384, 128)
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.5, 0.8, 1.2)
    assert (recipe.reward.scale, recipe.reward.center, recipe.reward.clip) == (True, True, 3.0)
    assert (algorithm.kl_coefficient, algorithm.kl_target, algorithm.kl_horizon) == (
        0.2,
        6.0,
        10_000,
    )
    assert (algorithm.epochs, algorithm.mini_batches, algorithm.clip) == (4, 1, 0.2)
    assert (algorithm.gamma, algorithm.lam) == (1.0, 0.95)
    assert (algorithm.value_weight, algorithm.value_clip) == (0.1, 0.2)
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha) == (64, 16)
    assert training.steps // recipe.evaluation.every == 40


def test_the_paper_recipes_hold_the_numbers_of_its_released_code():
    """facts: 3200 steps of 16, 512/128 tokens, linear without warm-up, eps 1e-5, r 64, alpha 16."""
    full = load_recipe(ROOT / "recipes/phi2-full.yaml")
    lora = load_recipe(ROOT / "recipes/mistral-7b-lora.yaml")
    for recipe in (full, lora):
        training = recipe.training
        assert (training.steps, training.batch_size) == (3200, 16)
        assert (training.schedule, training.warmup_fraction) == ("linear", 0.0)
        assert (training.eps, training.max_grad_norm, training.weight_decay) == (1e-5, 1.0, 0.0)
        assert (recipe.data.max_length, recipe.data.max_prompt_length) == (512, 128)
        assert (recipe.evaluation.every, recipe.checkpoint.keep) == (80, 2)
        assert recipe.method.name == "haf"
    assert full.training.learning_rate == 1e-5
    assert full.lora is None
    assert lora.training.learning_rate == 3e-5
    assert lora.lora is not None
    assert (lora.lora.rank, lora.lora.alpha) == (64, 16)


@pytest.mark.parametrize("path", EVERY_RECIPE, ids=lambda path: path.stem)
def test_every_value_in_a_shipped_recipe_is_explained_or_obvious(path: Path):
    """A newcomer learns from the comments, so at least half of the values carry one."""
    values = [x for x in path.read_text().splitlines() if re.match(r"\s+\w+: \S", x)]
    assert sum("#" in line for line in values) >= len(values) / 2


@pytest.mark.parametrize(("page", "root"), [("recipes", Recipe), ("rlhf-recipes", RlhfRecipe)])
def test_the_reference_lists_exactly_the_keys_with_their_bounds_and_defaults(page, root):
    document = (ROOT / "docs" / f"{page}.md").read_text()
    rows = [line for line in document.splitlines() if line.startswith("| `")]
    expected = [line for line in reference_tables(root).splitlines() if line.startswith("| `")]
    assert rows == expected, f"docs/{page}.md needs these tables:\n{reference_tables(root)}"


def test_the_method_section_offers_what_methods_take():
    from dataclasses import fields

    from hafrm.training.methods import Method, get_method

    offered = {key.name.split(".")[1] for key in describe_keys() if key.name.startswith("method.")}
    assert offered == {field.name for field in fields(Method)}
    for path in RECIPES:
        section = load_recipe(path).method.model_dump()
        assert get_method(section.pop("name"), **section).name == "haf"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s[hb]*")), ids=lambda path: path.name)
def test_every_launch_script_parses_and_names_recipes_that_exist(path: Path):
    assert shutil.which("bash")
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)  # noqa: S607
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr == ""
    text = path.read_text()
    named = re.findall(r"recipes/[\w-]+\.yaml", text)
    assert named
    assert all((ROOT / name).is_file() for name in named)
    assert "set -euo pipefail" in text
    assert "--resume" in text
    if path.suffix == ".sh":
        assert path.stat().st_mode & stat.S_IXUSR


def run_with_recorder(script: Path, folder: Path, *arguments: str) -> list[str]:
    """The command line that a launch script ends in, seen by a stand-in for its launcher."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("python", "torchrun", "accelerate"):
        (tools / name).write_text(f'#!/bin/sh\necho {name}\nfor a in "$@"; do echo "$a"; done\n')
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(script), *arguments],  # noqa: S607
        cwd=folder,
        env={"PATH": f"{tools}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["one-gpu.sh", "torchrun-8gpu-fsdp.sh", "accelerate.sh"])
def test_a_launch_script_starts_a_run_the_first_time_and_resumes_it_after(
    name: str, tmp_path: Path
):
    first = run_with_recorder(LAUNCH / name, tmp_path, "r.yaml", "my run", "training.seed=1")
    start = first.index("train")
    assert first[start - 2 : start + 4] == ["-m", "hafrm", "train", "r.yaml", "--out", "my run"]
    assert first[-1] == "training.seed=1"
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "recipe.yaml").touch()
    again = run_with_recorder(LAUNCH / name, tmp_path, "r.yaml", "my run", "training.seed=1")
    assert again[-3:] == ["train", "--resume", "my run"]


def test_the_slurm_script_queues_again_only_after_a_stop_by_signal(tmp_path: Path):
    """srun ends with 143 when the run saved its state after SIGTERM, with 1 when it failed."""
    for status, queued in (("143", True), ("1", False), ("0", False)):
        tools = tmp_path / status
        tools.mkdir()
        (tools / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
        (tools / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
        for tool in tools.iterdir():
            tool.chmod(0o755)
        done = subprocess.run(
            ["bash", str(LAUNCH / "slurm.sbatch")],  # noqa: S607
            cwd=tmp_path,
            env={
                "PATH": f"{tools}:/usr/bin:/bin",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n[1-2]",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == int(status), done.stderr
        assert ("requeue 7" in done.stdout) == queued


def test_the_slurm_script_gives_every_task_its_rank_and_the_signal(tmp_path: Path):
    """Run with a stand-in srun that is one task: its Python must replace the shell (exec)."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(
        '#!/bin/sh\nshift\nexport SLURM_PROCID=3 SLURM_NTASKS=8 SLURM_LOCALID=1\nexec "$@"\n'
    )
    (tools / "scontrol").write_text("#!/bin/sh\necho node-one\n")
    (tools / "python").write_text(
        '#!/bin/sh\necho "$PPID $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $*"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "a.yaml", "out dir", "x.y=1"],  # noqa: S607
        cwd=tmp_path,
        env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split(maxsplit=1)[1].strip() == (
        "3 8 1 node-one 20007 -m hafrm train a.yaml --out out dir x.y=1"
    )


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_every_launch_yaml_loads_and_names_recipes_that_exist(path: Path):
    values = YAML(typ="safe").load(path.read_text())
    assert isinstance(values, dict)
    named = re.findall(r"recipes/[\w-]+\.yaml", path.read_text())
    assert all((ROOT / name).is_file() for name in named)


def test_the_accelerate_file_only_starts_processes():
    """accelerate's own sharding and casting would be a second, untested engine."""
    values = YAML(typ="safe").load((LAUNCH / "accelerate.yaml").read_text())
    assert values["distributed_type"] == "MULTI_GPU"
    assert values["mixed_precision"] == "no"
    assert not [key for key in values if "fsdp" in key or "deepspeed" in key]


def test_the_skypilot_commands_parse_as_shell():
    values = YAML(typ="safe").load((LAUNCH / "skypilot.yaml").read_text())
    for part in ("setup", "run"):
        checked = subprocess.run(
            ["bash", "-n"],  # noqa: S607
            input=values[part],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stderr


def test_the_ray_file_calls_the_training_function_with_arguments_that_it_has():
    """Ray is not installed here, so the call is compared with the function's signature as text."""
    calls = {
        node.func.id: node
        for node in ast.walk(ast.parse((LAUNCH / "ray_train.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.keywords
    }
    loop = ast.parse((ROOT / "src/hafrm/training/loop.py").read_text())
    function = next(
        n for n in loop.body if isinstance(n, ast.FunctionDef) and n.name == "run_training"
    )
    assert len(calls["run_training"].args) == len(function.args.args)
    known = {argument.arg for argument in function.args.kwonlyargs}
    assert {keyword.arg for keyword in calls["run_training"].keywords} <= known


def test_the_list_of_launch_files_is_complete():
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or f"({path.name})" in text, path.name


if __name__ == "__main__":
    sys.stdout.write(reference_tables() + "\n")
