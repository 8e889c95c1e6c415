"""Models taken out of run folders after the run, or before its end: `hafrm export`.

From a finished run's `model/`, in another dtype say, or from a checkpoint, LoRA merged. What comes out is
proved as at a run's end before it appears under its name, and kept as NAME.unverified where the proof
fails. The run folder is only read.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from hafrm.atomic import atomic_directory
from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel
from hafrm.errors import CheckpointError, ConfigError, DataError, ModelError
from hafrm.export.checklist import verify_directory
from hafrm.export.golden import GOLDEN, GoldenLine, read_golden
from hafrm.export.model_card import write_cards
from hafrm.export.proof import PLAIN, check_golden, check_policy, prove, write_golden
from hafrm.export.stock_export import (
    Base,
    export_adapter,
    export_policy,
    export_reward,
    gather_weights,
)
from hafrm.preferences import Group, Message
from hafrm.recipe import Recipe
from hafrm.recipe_file import load_recipe
from hafrm.run_folder import RunFolder, step_of
from hafrm.scoring.loading import load_config, load_encoder, load_policy, load_reward
from hafrm.scoring.reward_model import write_implicit_rule
from hafrm.training.checkpoint import STATE, load_weights
from hafrm.training.finish import export_dtype, implicit_rule
from hafrm.training.loop import resolve_method
from hafrm.training.methods import Method
from hafrm.training.parts import held_out
from hafrm.training.prepare import build_encoder, build_model

log = logging.getLogger("hafrm")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights can be stored in, by their short names."""
Head = Literal["reward", "policy"]


@dataclass(frozen=True)
class ExportOptions:
    """What is taken out, from where, and how it is stored."""

    head: Head = "reward"
    dtype: str | None = None
    """One of DTYPES; None: what the run computed in, as at its end."""
    merge_lora: bool | None = None
    """False: adapters beside the base checkpoint; None: merged, if there are any."""
    checkpoint: str | None = None
    """best, latest or a step; None: `model/` if the run has finished, else the best or latest."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.merge_lora is False and self.dtype not in (None, "fp32"):
            raise ConfigError(
                f"--dtype {self.dtype} cannot be had without merging: adapters stay in fp32, as they were "
                "trained; leave one of the two out"
            )
        if self.merge_lora is False and self.head == "policy":
            raise ConfigError(
                "--policy with --no-merge-lora is not possible: only reward models are written as "
                "adapters; merge it"
            )


@dataclass(frozen=True)
class Exported:
    """What was written, and the proof of it."""

    directory: Path
    head: Head
    source: str
    """`model` or the checkpoint's name."""
    dtype: str
    merged: bool | None
    """None where the run has no adapters."""
    num_golden: int
    """Conversations whose scores (or log-probs) plain transformers has replayed."""
    difference: float
    """The largest, relative to max(1, |score|)."""
    moved: float | None
    """How far rewards are from the run's own golden ones; None where it has none."""


class _Source(NamedTuple):
    """A model in memory with what its export needs."""

    name: str
    model: HybridModel
    encoder: Encoder
    golden: Sequence[Group]


def export_from_run(folder: Path, to: Path, options: ExportOptions | None = None) -> Exported:
    """Write one head of a run as a stock directory `to`, which appears once it is proved.

    Raises ConfigError for options that this run cannot follow, CheckpointError for a run without such a
    checkpoint or a `to` that exists, ModelError and NumericsError for a model that must not be used,
    VerificationError for one that is written but not proved.
    """
    options = options or ExportOptions()
    if to.exists():
        raise CheckpointError(f"{to} exists already: remove it or choose another place")
    run = RunFolder.open(folder)
    recipe = load_recipe(run.recipe_path)
    method = resolve_method(recipe)
    _check_possible(run, recipe, method, options)
    dtype = DTYPES[options.dtype] if options.dtype else export_dtype(recipe)
    checkpoint = _find_checkpoint(run, options, dtype)
    source = _from_model(run, options) if checkpoint is None else _load(run, recipe, checkpoint)
    merged = None if recipe.lora is None else options.merge_lora is not False
    unverified = to.with_name(f"{to.name}.unverified")
    with atomic_directory(unverified, replace=True) as aside:
        made = aside / options.head
        num_golden = 0
        if options.head == "reward":
            num_golden = _write_reward(source, recipe, made, dtype, merge=merged is not False)
        else:
            export_policy(gather_weights(source.model), source.encoder, made, dtype=dtype)
            write_implicit_rule(made, implicit_rule(recipe, method))
        # A card of an adapter would tell to load it as a whole model; test results are of `model/` alone.
        if merged is not False and (checkpoint is None or not (run.path / "test.json").is_file()):
            write_cards(run.path, aside)
        for file in list(made.iterdir()):
            file.rename(aside / file.name)
        made.rmdir()
    source.model.to("meta")  # its memory is the proof's

    def check(directory: Path) -> tuple[int, float]:
        if options.head == "policy":
            return check_policy(directory, source.golden)
        return num_golden, max(check_golden(directory).values())

    num, difference = prove(unverified, to, check, "the same command repeats it and its proof")
    moved = _moved(run, to) if options.head == "reward" else None
    kept = torch.float32 if merged is False else dtype
    name = next(short for short, known in DTYPES.items() if known == kept)
    return Exported(to, options.head, source.name, name, merged, num, difference, moved)


def _check_possible(run: RunFolder, recipe: Recipe, method: Method, options: ExportOptions) -> None:
    """Raises ConfigError for what this run can never give."""
    if recipe.lora is None and options.merge_lora is not None:
        raise ConfigError(
            f"{run.path} trained all weights and has no adapters: leave --merge-lora (or its opposite) out"
        )
    if options.head == "reward" and not method.trains_reward:
        raise ConfigError(f"method {method.name} trains no reward head; export its --policy")
    if options.head == "policy" and not method.trains_policy:
        raise ConfigError(f"method {method.name} trains no policy head; leave --policy out")


def _find_checkpoint(run: RunFolder, options: ExportOptions, dtype: torch.dtype) -> Path | None:
    """The checkpoint to take; None for the finished run's `model/`."""
    finished = run.model_path / options.head
    known = {step_of(path): path for path in run.checkpoints()}
    if options.checkpoint is None and finished.is_dir() and options.merge_lora is not False:
        stored = load_config(finished).dtype
        if stored in (dtype, torch.float32):
            return None
        best = known.get(_best_step(known))
        if best is None:
            raise ConfigError(
                f"{finished} is stored in {stored}, whose rounding no other dtype takes back, and the "
                f"checkpoint that it came from is gone: leave --dtype out"
            )
        log.info("taking %s, which is finer than %s", best, finished)
        return best
    if not known:
        raise CheckpointError(
            f"{run.path} has no complete checkpoint yet: wait for the first one (checkpoint.every steps), "
            "or set that lower"
        )
    return _chosen(known, options.checkpoint, run)


def _chosen(known: dict[int, Path], wanted: str | None, run: RunFolder) -> Path:
    best, latest = _best_step(known), max(known)
    steps = {"best": best, "latest": latest, None: best if best in known else latest}
    if wanted in steps:
        step = steps[wanted]
    elif wanted is not None and wanted.isdecimal():
        step = int(wanted)
    else:
        raise ConfigError(f"--checkpoint must be best, latest or a step, got {wanted!r}")
    if step not in known:
        reason = "nothing has been validated yet" if step < 0 else f"step {step} is not kept"
        raise CheckpointError(
            f"{run.path} has no such checkpoint ({reason}); it has those of steps {sorted(known)}"
        )
    return known[step]


def _best_step(known: dict[int, Path]) -> int:
    """The best step as the latest checkpoint knows it; -1 before the first validation."""
    if not known:
        return -1
    state = json.loads((known[max(known)] / STATE).read_text())
    return int(state["best_step"])


def _from_model(run: RunFolder, options: ExportOptions) -> _Source:
    path = run.model_path / options.head
    load = load_reward if options.head == "reward" else load_policy
    model = load(path, dtype=torch.float32, device="cpu")
    encoder = load_encoder(path, model.backbone.config, None)
    return _Source("model", model, encoder, _recorded(run) or [])


def _load(run: RunFolder, recipe: Recipe, checkpoint: Path) -> _Source:
    encoder = build_encoder(recipe)
    plain = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"compile": False})}
    )
    model = build_model(plain, resolve_method(plain), encoder, torch.device("cpu"))
    try:
        load_weights(checkpoint, model)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} has just been removed by its run, which keeps the newest ones only; try again"
        ) from error
    golden = _recorded(run)
    return _Source(checkpoint.name, model, encoder, _held_out(recipe) if golden is None else golden)


def _recorded(run: RunFolder) -> list[Group] | None:
    """The conversations of the run's own golden file, or None where it has none."""
    if not (run.model_path / "reward" / GOLDEN).is_file():
        return None
    lines = [line for line in read_golden(run.model_path / "reward") if line.messages]
    groups = [_group(line, number) for number, line in enumerate(lines)]
    return [g for g in groups if g.prompt != PLAIN.prompt]


def _group(line: GoldenLine, number: int) -> Group:
    assert line.messages is not None
    *prompt, answer = line.messages
    messages = tuple(Message(m["role"], m["content"]) for m in prompt)
    return Group(f"golden {number}", messages, (answer["content"],))


def _held_out(recipe: Recipe) -> list[Group]:
    try:
        return held_out(recipe)
    except DataError as error:
        log.warning("the run's data cannot be read, so fewer conversations are replayed: %s", error)
        return []


def _write_reward(
    source: _Source, recipe: Recipe, made: Path, dtype: torch.dtype, *, merge: bool
) -> int:
    """Write the reward model with its golden scores; how many these are."""
    whole = made if merge else made.with_name("whole")
    export_reward(
        gather_weights(source.model), source.encoder, whole, dtype=dtype if merge else torch.float32
    )
    num = write_golden(whole, source.golden)
    verification = verify_directory(whole, run_model=False)
    if not verification.ok:
        faults = "; ".join(f"{r.name}: {r.observed} ({r.fix})" for r in verification.failed)
        raise ModelError(f"the export would not serve every consumer: {faults}")
    if not merge:
        base = Base(recipe.model.path, recipe.model.revision)
        export_adapter(source.model, source.encoder, made, base)
        (whole / GOLDEN).rename(made / GOLDEN)
        _remove(whole)
    return num


def _remove(directory: Path) -> None:
    for file in list(directory.iterdir()):
        file.unlink()
    directory.rmdir()


def _moved(run: RunFolder, made: Path) -> float | None:
    """How far the new golden rewards are from the run's, over the conversations that both have."""
    if not (run.model_path / "reward" / GOLDEN).is_file():
        return None
    before = {line.input_ids: line.reward for line in read_golden(run.model_path / "reward")}
    after = {line.input_ids: line.reward for line in read_golden(made)}
    both = [(before[ids], after[ids]) for ids in before.keys() & after.keys()]
    return max((abs(b - a) / max(1.0, abs(b)) for b, a in both), default=None)
