"""The recipes load, their reference is complete, and launch scripts start and resume runs."""

import subprocess
from pathlib import Path

import pytest

from hafrm.recipe import Recipe, describe_keys
from hafrm.recipe_file import dump_recipe, load_as, load_recipe
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from support.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
EVERY_RECIPE = sorted((ROOT / "recipes").glob("*.yaml"))
KINDS = {p: RlhfRecipe if "\nreward:" in p.read_text() else Recipe for p in EVERY_RECIPE}
RECIPES = [path for path, kind in KINDS.items() if kind is Recipe]
LAUNCH = ROOT / "examples" / "launch"


@pytest.mark.parametrize("path", EVERY_RECIPE, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_being_written_out(path: Path, tmp_path: Path):
    recipe = load_as(KINDS[path], path)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_as(KINDS[path], tmp_path / "again.yaml") == recipe


def test_the_schemas_for_editors_are_those_of_the_recipes():
    """After a change of a key: python tools/recipe_schema.py."""
    schemas = load_script("tools/recipe_schema").SCHEMAS
    assert {file: file.read_text() for file in schemas} == schemas


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
    kl = (algorithm.kl_coefficient, algorithm.kl_target, algorithm.kl_horizon)
    assert kl == (0.2, 6.0, 10_000)
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


@pytest.mark.parametrize(("page", "root"), [("recipes", Recipe), ("rlhf-recipes", RlhfRecipe)])
def test_the_reference_lists_exactly_the_keys_with_their_bounds_and_defaults(page, root):
    document = (ROOT / "docs" / f"{page}.md").read_text()
    rows = [line for line in document.splitlines() if line.startswith("| `")]
    expected = [
        f"| `{key.name}` | {key.allowed} | `{key.default}` | {key.meaning} |"
        for key in describe_keys(root).values()
    ]
    assert rows == expected


def test_the_method_section_offers_what_methods_take():
    from dataclasses import fields

    from hafrm.training.methods import Method, get_method

    offered = {key.split(".")[1] for key in describe_keys() if key.startswith("method.")}
    assert offered == {field.name for field in fields(Method)}
    for path in RECIPES:
        section = load_recipe(path).method.model_dump()
        name = section.pop("name")
        assert get_method(name, **section).name == name


def run_script(
    name: str, folder: Path, tools: dict[str, str], *arguments: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """A launch script run in a folder, with shell stand-ins for the programs that it starts."""
    bin_folder = folder / "tools"
    bin_folder.mkdir(parents=True, exist_ok=True)
    for tool, script in tools.items():
        (bin_folder / tool).write_text(f"#!/bin/sh\n{script}\n")
        (bin_folder / tool).chmod(0o755)
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],  # noqa: S607
        cwd=folder,
        env={"PATH": f"{bin_folder}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["one-gpu.sh", "torchrun-8gpu-fsdp.sh", "accelerate.sh"])
def test_a_launch_script_starts_a_run_the_first_time_and_resumes_it_after(
    name: str, tmp_path: Path
):
    tools = dict.fromkeys(("python", "torchrun", "accelerate"), 'for a in "$@"; do echo "$a"; done')
    command = (name, tmp_path, tools, "r.yaml", "my run", "training.seed=1")
    first = run_script(*command).stdout.splitlines()
    start = first.index("train")
    assert first[start - 2 : start + 4] == ["-m", "hafrm", "train", "r.yaml", "--out", "my run"]
    assert first[-1] == "training.seed=1"
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "recipe.yaml").touch()
    again = run_script(*command).stdout.splitlines()
    assert again[-3:] == ["train", "--resume", "my run"]


@pytest.mark.parametrize(("status", "queued"), [(143, True), (1, False), (0, False)])
def test_the_slurm_script_queues_again_only_after_a_stop_by_signal(tmp_path, status, queued):
    """srun ends with 143 when the run saved its state after SIGTERM, with 1 when it failed."""
    tools = {"srun": f"exit {status}", "scontrol": 'echo "$@"'}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = run_script("slurm.sbatch", tmp_path, tools, **job)
    assert done.returncode == status, done.stderr
    assert ("requeue 7" in done.stdout) == queued
