"""The memory that a run will need, before anything is loaded, and the token budget that fits.

Nothing is loaded and no data is read, so lengths are taken from `data.max_length`. It is an estimate: what
an allocator wastes is left to a spare part. Start at `plan_recipe` and `with_token_budget`.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from hafrm.engine.model import HybridModel
from hafrm.errors import ConfigError, ModelError
from hafrm.export.plain_model import proof_bytes
from hafrm.recipe import LoraSection, Recipe
from hafrm.recipe_file import build_recipe
from hafrm.table import Column, Table
from hafrm.training import parallel
from hafrm.training.memory_trace import (
    FLOAT32,
    HALF,
    Footprint,
    MemoryNeed,
    count_weights,
    logprob_bytes,
    meta_model,
    state_bytes,
    trace,
)
from hafrm.training.methods import Method
from hafrm.training.model_setup import with_precision
from hafrm.training.reference import REFERENCE_TOKENS

log = logging.getLogger("hafrm")

GIB = 2**30
LARGEST = 2**15
"""Tokens beyond which a micro-batch gains nothing: its matrix products cannot become more efficient."""
GRAIN = 256
"""Token budgets are multiples of this, so that a few bytes more or less do not change one."""
SPARE = {"cuda": 0.1, "cpu": 0.6}
"""Fraction of the memory left alone: on a GPU for the allocator's gaps; on a CPU, where glibc's heap has
been measured to hold up to 2.4 times what is alive (docs/scale.md)."""
MOST_RANKS = 64


@dataclass(frozen=True)
class Target:
    """The device of one rank, the bytes that it has before anything is loaded, the number of ranks."""

    device: Literal["cuda", "cpu"]
    memory: int
    ranks: int = 1

    @property
    def usable(self) -> int:
        """Bytes without the spare part."""
        return int(self.memory * (1 - SPARE[self.device]))


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank of a run needs, and whether it is there."""

    target: Target
    sharded: bool
    max_tokens: int
    """The budget; for auto, the largest that fits."""
    tokens: int
    """Of the largest micro-batch: the budget, or all of a step where that is less."""
    need: MemoryNeed
    host: int
    """Bytes of host memory that the main rank takes to write a checkpoint or the export."""
    proof: int
    """Bytes that a GPU must have free to replay the export's scores; otherwise a CPU does it."""
    remedies: tuple[tuple[str, "MemoryPlan"], ...] = ()
    """Changes to a recipe that does not fit, each with its plan."""

    @property
    def fits(self) -> bool:
        """Whether the need stays within the usable part."""
        return self.need.total <= self.target.usable

    def __str__(self) -> str:
        size = {name: f"{value / GIB:.3g}" for name, value in dataclasses.asdict(self.need).items()}
        parts = ", ".join(f"{name} {value}" for name, value in size.items() if value != "0")
        return (
            f"a step of micro-batches of {self.tokens} tokens takes {self.need.step / GIB:.3g} GiB "
            f"({parts}); {'fits' if self.fits else 'does not fit'} into the usable "
            f"{self.target.usable / GIB:.3g}; training.max_tokens {self.max_tokens}"
        )

    def tables(self) -> tuple[Table, ...]:
        """What a run needs and, where it does not fit, what would."""
        need, target = self.need, self.target
        place = f"{target.ranks} {'GPU' if target.device == 'cuda' else 'CPU'} rank(s), each"
        rows = (
            ("weights", need.weights, "in shards" if self.sharded else "whole"),
            ("gradients", need.gradients, "float32"),
            ("optimiser", need.optimiser, "AdamW's two moments, float32"),
            ("exchange between ranks", need.exchange, "FSDP2's gathered layers and gradients"),
            ("activations", need.activations, f"a micro-batch of {self.tokens:,} tokens"),
            ("working memory", need.working, "of the backward pass"),
            ("a step in all", need.step, f"of {target.usable / GIB:.4g} usable"),
            ("passes without gradients", need.passes, "reference (whole weights), validation"),
            ("host memory of the first rank", self.host, "a checkpoint or the export"),
            ("proof of the export", self.proof, "float32, after training, else on the CPU"),
        )
        verdict = "fits" if self.fits else "does NOT fit"
        table = Table(
            f"memory of {place}",
            (Column("what"), Column("GiB", "general"), Column("note")),
            tuple((name, size / GIB, note) for name, size, note in rows if size),
            (f"{verdict} with training.max_tokens {self.max_tokens}",),
        )
        changes = tuple(
            (change, "yes" if plan.fits else "no", plan.need.total / GIB, plan.max_tokens)
            for change, plan in self.remedies
        )
        columns = (
            Column("with"),
            Column("fits"),
            Column("GiB", "general"),
            Column("tokens", "count"),
        )
        return (table, Table("what would fit", columns, changes)) if changes else (table,)


class Planner:
    """Plans one recipe for any target; each size of micro-batch is traced once."""

    def __init__(self, recipe: Recipe, method: Method, config: PretrainedConfig) -> None:
        """Raises ModelError for a config that is no causal LM's."""
        self.recipe, self._method, self._config = recipe, method, config
        self._half = recipe.training.precision == "bf16"
        self._models: dict[bool, HybridModel] = {}
        self._footprints: dict[tuple[int, bool, bool], Footprint] = {}
        self.weights = count_weights(self._model(sharded=False))

    def plan(self, target: Target) -> MemoryPlan:
        """The need at the recipe's token budget; for auto, at the largest that fits, or at the smallest
        allowed if none does. Raises ModelError where the model cannot be traced."""
        budget = self.recipe.training.max_tokens
        budget = self._largest(target) if budget == "auto" else budget
        weights, sharded, tokens = self.weights, self._sharded(target), self._tokens(budget)
        # A checkpoint with AdamW's moments; or gathered weights, merged with adapters in float32, cast.
        export = FLOAT32 * weights.trainable + weights.frozen_bytes
        export += weights.total * (FLOAT32 * weights.adapters + HALF * self._half)
        host = max(3 * FLOAT32 * weights.trainable, export)
        need, proof = self.need(target, budget), proof_bytes(weights.total)
        return MemoryPlan(target, sharded, budget, tokens, need, host, proof)

    def need(self, target: Target, budget: int) -> MemoryNeed:
        """The need with micro-batches of up to this many tokens."""
        tokens, sharded = self._tokens(budget), self._sharded(target)
        states = state_bytes(
            self.weights,
            shards=target.ranks if sharded else 1,
            gathered=HALF if self._half else FLOAT32,
            accumulates=tokens < self._one_micro_batch(target),
        )
        step = self._footprint(tokens, sharded)
        reference = self._footprint(REFERENCE_TOKENS * budget, False, train=False).working
        head = self._logprobs(REFERENCE_TOKENS * budget, target, train=False)
        whole, *_ = state_bytes(self.weights)
        return MemoryNeed(
            *states,
            activations=step.kept,
            working=max(step.working, self._logprobs(tokens, target, train=True)),
            passes=max(whole, states[0] + states[2]) + max(reference, head),
        )

    def _largest(self, target: Target) -> int:
        """The largest budget that fits, within an eighth; the smallest allowed where none does."""
        least = 2 * self.recipe.data.max_length
        most, one = self._tokens(max(LARGEST, least)), self._one_micro_batch(target)
        ranges = [(least, most)]
        if self._sharded(target) and least < one <= most:
            ranges = [(one, most), (least, one - 1)]  # below, the need jumps by whole gradients

        def fits(budget: int) -> bool:
            return self.need(target, budget).total <= target.usable

        for least, most in ranges:
            if fits(most):
                return most
            if fits(least):
                break
        else:
            return 2 * self.recipe.data.max_length
        while most - least > max(GRAIN, least // 8):
            middle = (least + most) // 2 // GRAIN * GRAIN
            if middle <= least:
                break
            least, most = (middle, most) if fits(middle) else (least, middle)
        return least

    def _logprobs(self, tokens: int, target: Target, *, train: bool) -> int:
        half_head = self._half and (self.weights.adapters or (train and self._sharded(target)))
        return logprob_bytes(
            self.weights,
            self.shape(tokens),
            device=target.device,
            product=HALF if self._half and target.device == "cuda" else FLOAT32,
            stored=HALF if half_head else FLOAT32,
            train=train,
        )

    def _footprint(self, tokens: int, sharded: bool, *, train: bool = True) -> Footprint:
        key = (tokens, sharded, train)
        if key not in self._footprints:
            model, shape = self._model(sharded), self.shape(tokens)
            self._footprints[key] = trace(model, shape, half=self._half, train=train)
        return self._footprints[key]

    def _model(self, sharded: bool) -> HybridModel:
        if sharded not in self._models:
            model = meta_model(self._config, self.recipe, self._method)
            if sharded and self._half:
                nn.Module.to(model.backbone, torch.bfloat16)  # as FSDP2 gathers it
            self._models[sharded] = model
        return self._models[sharded]

    def _tokens(self, budget: int) -> int:
        """Of the largest micro-batch that a step can fill."""
        return min(budget, self.recipe.training.batch_size * 2 * self.recipe.data.max_length)

    def shape(self, tokens: int) -> list[tuple[int, tuple[int, int]]]:
        """Comparisons that make up `tokens`, with two fifths of each in the prompt and in one response.

        Memory follows tokens, so few groups are enough; more where scores are soft-capped, which makes a
        matrix that grows with the square of a group.
        """
        group = 5 * max(4, self.recipe.data.max_length) // 4
        text = self._config.get_text_config()
        most = 16 if getattr(text, "attn_logit_softcapping", None) is not None else 4
        groups = max(1, min(most, tokens // group))
        sizes = [tokens * (i + 1) // groups - tokens * i // groups for i in range(groups)]
        return [(2 * n // 5, (n - 2 * n // 5 - n // 5, n // 5)) for n in sizes]

    def _one_micro_batch(self, target: Target) -> int:
        """Tokens that hold a rank's part of a step at once, were all its comparisons as in `shape`."""
        training, length = self.recipe.training, self.recipe.data.max_length
        return -(-training.batch_size * 5 * length // (4 * target.ranks))

    def _sharded(self, target: Target) -> bool:
        mode = self.recipe.training.parallel
        return target.ranks > 1 and (mode == "fsdp" or (mode == "auto" and target.device == "cuda"))


def plan_recipe(
    recipe: Recipe, method: Method, *, memory: float | None = None, ranks: int = 1
) -> MemoryPlan:
    """The plan of one of `ranks` ranks on a GPU of `memory` GiB, by default on this machine's device, with
    what to change where it does not fit.

    Raises ModelError for a model that cannot be found, or cannot be traced.
    """
    if memory is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        target = target_here(parallel.Ranks(0, ranks, device))
    else:
        target = Target("cuda", int(memory * GIB), ranks)
    recipe, config = with_precision(recipe, target.device), _load_config(recipe)
    plan = _plan(recipe, method, config, target)
    if plan.fits:
        return plan
    return replace(plan, remedies=tuple(_remedies(recipe, method, config, target)))


def with_token_budget(recipe: Recipe, method: Method, ranks: parallel.Ranks) -> Recipe:
    """The recipe with training.max_tokens as a number and, for adapters, training.parallel chosen, the
    same on all ranks; call before anything is loaded. Logs the plan in a line.

    Raises ConfigError where it is auto and not even the smallest budget fits, ModelError where it is
    auto and the model cannot be traced. A number is taken as it is, with a warning.
    """
    auto = recipe.training.max_tokens == "auto"
    target, config = target_here(ranks), _load_config(recipe)
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


def target_here(ranks: parallel.Ranks) -> Target:
    """This process's device and its memory: what is free of a GPU, this process's part of RAM."""
    if ranks.device.type == "cuda":
        return Target("cuda", torch.cuda.mem_get_info(ranks.device)[0], ranks.size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return Target("cpu", memory // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)), ranks.size)


def _load_config(recipe: Recipe) -> PretrainedConfig:
    path, revision = recipe.model.path, recipe.model.revision
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a config from model.path {path!r}: {error}") from error
    return config


def _choices(recipe: Recipe, target: Target) -> list[Recipe]:
    """The recipe; before it one with DDP, if adapters are trained on several GPUs and the recipe leaves it
    open: DDP exchanges the adapters' gradients once a step, FSDP gathers the whole model twice for each
    micro-batch."""
    is_open = recipe.training.parallel == "auto" and target.device == "cuda" and target.ranks > 1
    ddp = [_changed(recipe, {"training.parallel": "ddp"})] if recipe.lora and is_open else []
    return [*ddp, recipe]


def _plan(recipe: Recipe, method: Method, config: PretrainedConfig, target: Target) -> MemoryPlan:
    """As `with_token_budget` would choose it."""
    plans = (Planner(choice, method, config).plan(target) for choice in _choices(recipe, target))
    plan = next(plans)
    return plan if plan.fits else next(plans, plan)


def _remedies(
    recipe: Recipe, method: Method, config: PretrainedConfig, target: Target
) -> Iterator[tuple[str, MemoryPlan]]:
    """Changes to a recipe that does not fit, from harmless to far-reaching, each with its plan at the
    largest token budget that fits; at last more ranks, as far as they could hold their shards."""
    changes: dict[str, Any] = {"training.max_tokens": "auto"}
    yield _words(changes), _plan(_changed(recipe, changes), method, config, target)
    for key, value in (("gradient_checkpointing", True), ("precision", "bf16")):
        if getattr(recipe.training, key) != value:
            changes[f"training.{key}"] = value
            yield _words(changes), _plan(_changed(recipe, changes), method, config, target)
    if recipe.lora is None:
        adapted = {**changes, "lora.rank": LoraSection().rank}
        yield _words(adapted), _plan(_changed(recipe, adapted), method, config, target)
    planner = Planner(_changed(recipe, {**changes, "training.parallel": "fsdp"}), method, config)
    while target.ranks < MOST_RANKS:
        target = replace(target, ranks=2 * target.ranks)
        whole, *_ = state_bytes(planner.weights)
        if max(whole, sum(state_bytes(planner.weights, shards=target.ranks))) <= target.usable:
            plan = planner.plan(target)
            yield f"{target.ranks} ranks {_words(changes)} training.parallel=fsdp", plan
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
