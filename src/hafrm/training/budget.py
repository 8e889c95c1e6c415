"""The plan of a run on this machine: its token budget, and what to change where it does not fit."""

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from hafrm.errors import ConfigError, ModelError
from hafrm.recipe import LoraSection, Recipe
from hafrm.recipe_file import build_recipe
from hafrm.training import parallel
from hafrm.training.methods import Method
from hafrm.training.plan import Plan, Planner, Target
from hafrm.training.shadow import load_config
from hafrm.training.start import with_precision

MOST_RANKS = 64
"""As far as more ranks are tried to make a recipe fit."""

log = logging.getLogger("hafrm")


def with_token_budget(recipe: Recipe, method: Method, ranks: parallel.Ranks) -> Recipe:
    """The recipe with training.max_tokens as a number and, for adapters, training.parallel chosen, the
    same on all ranks; call before anything is loaded. Logs the plan in a line.

    Raises ConfigError where it is auto and not even the smallest budget fits, ModelError where it is
    auto and the model cannot be traced. A number is taken as it is, with a warning.
    """
    auto = recipe.training.max_tokens == "auto"
    target, config = target_here(ranks), load_config(recipe)
    for choice in _choices(recipe, target):
        try:
            plan = Planner(choice, method, config).plan(target)
        except ModelError as error:
            if auto:
                raise
            log.warning("no plan: %s", error)
            return recipe
        budget = parallel.smallest(plan.max_tokens if plan.fits else 0)
        if budget:
            break
    if auto and budget == 0:
        raise ConfigError(
            f"training.max_tokens is auto, but not even 2 x data.max_length tokens fit: {plan}. "
            "`hafrm plan` says what to change; a number is taken unchecked"
        )
    if parallel.is_main():
        log.log(logging.INFO if budget else logging.WARNING, "plan: %s", plan)
    return _changed(choice, {"training.max_tokens": budget}) if auto else choice


def _choices(recipe: Recipe, target: Target) -> list[Recipe]:
    """The recipe, and before it one that keeps copies, if adapters are trained on several GPUs and the
    recipe leaves it open: copies exchange the adapters' gradients once a step, shards gather the whole
    model twice for each micro-batch."""
    is_open = recipe.training.parallel == "auto" and target.device == "cuda" and target.ranks > 1
    copies = [_changed(recipe, {"training.parallel": "ddp"})] if recipe.lora and is_open else []
    return [*copies, recipe]


def target_here(ranks: parallel.Ranks) -> Target:
    """This process's device and its memory: what is free of a GPU, this process's share of RAM."""
    if ranks.device.type == "cuda":
        return Target("cuda", torch.cuda.mem_get_info(ranks.device)[0], ranks.size)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    return Target("cpu", _ram() // beside, ranks.size)


def _ram() -> int:
    """Bytes of the machine's memory, or of the container's where that is less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        sizes.append(int(text))
    return min(sizes)


def plan_recipe(
    recipe: Recipe, method: Method, *, memory: float | None = None, ranks: int = 1
) -> tuple[Plan, list[tuple[str, Plan]]]:
    """The plan of one of `ranks` ranks on a GPU of `memory` GiB, by default on this machine's device, and
    what to change where it does not fit.

    Raises ModelError for a model that cannot be found, or cannot be traced.
    """
    if memory is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        target = target_here(parallel.Ranks(0, ranks, device))
    else:
        target = Target("cuda", int(memory * 2**30), ranks)
    recipe, config = with_precision(recipe, target.device), load_config(recipe)
    plan = _plan(recipe, method, config, target)
    return plan, [] if plan.fits else list(_remedies(recipe, method, config, target))


def _plan(recipe: Recipe, method: Method, config: PretrainedConfig, target: Target) -> Plan:
    """As `with_token_budget` would choose it."""
    for choice in _choices(recipe, target):
        plan = Planner(choice, method, config).plan(target)
        if plan.fits:
            break
    return plan


def _remedies(
    recipe: Recipe, method: Method, config: PretrainedConfig, target: Target
) -> Iterator[tuple[str, Plan]]:
    """Changes to a recipe that does not fit, from the harmless to the far-reaching, each with its plan
    at the largest token budget that fits; at last ranks, where they could hold their shards."""
    changes: dict[str, Any] = {"training.max_tokens": "auto"}
    done = recipe.model_dump()
    for key, value in (
        ("training.max_tokens", "auto"),
        ("training.gradient_checkpointing", True),
        ("training.precision", "bf16"),
    ):
        section, name = key.split(".")
        if done[section][name] != value:
            changes[key] = value
            yield _words(changes), _plan(_changed(recipe, changes), method, config, target)
    if recipe.lora is None:
        adapted = {**changes, "lora.rank": LoraSection().rank}
        yield _words(adapted), _plan(_changed(recipe, adapted), method, config, target)
    changes["training.parallel"] = "fsdp"
    planner = Planner(_changed(recipe, changes), method, config)
    ranks = target.ranks
    while (ranks := 2 * ranks) <= MOST_RANKS:
        place = replace(target, ranks=ranks)
        if planner.least(place) <= place.usable:
            plan = planner.plan(place)
            yield f"{ranks} ranks {_words(changes)}", plan
            if plan.fits:
                return


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.split(".")
        values[section] = {**(values[section] or {}), name: value}
    return build_recipe(values)


def _words(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
