"""Who is timed: hafrm's own steps, TRL's trainers, and the naive hybrid with its ladder of techniques.

Every contender takes a workload and returns the seconds of its optimiser steps over the same comparisons,
with AdamW and the same learning rate; loading, tokenising, preparing and a first untimed step stand outside
the clock.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from naive import PaddedHybrid, Rung, padded_batches, pairs_of
from transformers import TrainerCallback
from workload import BATCH, Workload, free_memory, synchronise

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel, split_causal_lm
from hafrm.recipe_file import build_recipe
from hafrm.scoring.forward import first_responses, run_forward
from hafrm.training.methods import Method, get_method
from hafrm.training.setup import assemble, starting_dtype
from hafrm.training.step import NonFiniteCheck, build_optimizer, take_step
from hafrm.training.step_batches import (
    ComparisonOrder,
    MicroBatch,
    References,
    build_micro_batch,
    plan_step,
)

RATE = 1e-5


@dataclass
class Marks:
    """What a contender notes besides its time."""

    loaded: float = 0.0
    """Bytes in use once the model is there; peak memory is counted from here."""
    reference: float = 0.0
    """Seconds of the reference pass, once per data set."""
    tokens: int = 0
    """Tokens that its forwards ran, padding included; 0 where the trainer does not say."""


def resident(what: str) -> float:
    """Bytes of this process on Linux: VmRSS, now, or VmHWM, the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def forget_peak() -> None:
    """Start counting VmHWM from zero."""
    Path("/proc/self/clear_refs").write_text("5")


def note_loaded(marks: Marks, w: Workload) -> None:
    """Memory from here on is the contender's own."""
    free_memory()
    if w.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(w.device)
        marks.loaded = torch.cuda.memory_allocated(w.device)
    else:
        forget_peak()
        marks.loaded = resident("VmRSS")


def peak_growth(marks: Marks, w: Workload) -> float:
    """Bytes that the process grew over its loaded model, at the peak."""
    if w.device.type == "cuda":
        return torch.cuda.max_memory_allocated(w.device) - marks.loaded
    return resident("VmHWM") - marks.loaded


def references_of(model: HybridModel, w: Workload, marks: Marks) -> References:
    """The frozen model's log-probs; the seconds go to `marks`. Random weights are worth no cache."""
    autocast = torch.bfloat16 if w.device.type == "cuda" else None
    synchronise(w.device)
    start = time.perf_counter()
    scores = run_forward(model, w.encoded, max_tokens=4 * w.max_tokens, autocast=autocast)
    marks.reference = time.perf_counter() - start
    assert scores.logps is not None
    return References(scores.logps, first_responses(w.encoded))


@dataclass(frozen=True)
class Ours:
    """hafrm's step, with techniques that can be switched off for the ablation."""

    method: str = "haf"
    sharing: bool = True
    """False: packed without padding, but every response brings its own copy of the prompt."""
    per_prompt: int = 4
    bf16: bool = False
    compiled: bool = False
    checkpointing: bool = False

    def __call__(self, w: Workload, marks: Marks) -> float:
        """Seconds of the steps; the reference pass, once per data set, goes to marks."""
        step, batches = self.prepared(w, marks)
        step(batches[0])  # kernels are loaded, and layers compiled, once a run
        synchronise(w.device)
        start = time.perf_counter()
        for step_batches in batches:
            step(step_batches)
        synchronise(w.device)
        return time.perf_counter() - start

    def prepared(
        self, w: Workload, marks: Marks
    ) -> tuple[Callable[[list[MicroBatch]], object], list[list[MicroBatch]]]:
        """What takes one step, and the micro-batches of all steps."""
        method = get_method(self.method)
        half = self.bf16 or w.device.type == "cuda"
        model = self._model(w, method, "bf16" if half else "fp32")
        note_loaded(marks, w)
        references = references_of(model, w, marks) if method.needs_reference else None
        optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        batches = [self._batches(w, references, step) for step in range(w.steps)]
        marks.tokens = sum(b.layout.num_tokens for step in batches for b in step)
        step = functools.partial(
            take_step,
            model,
            optimizer,
            method=method,
            num_comparisons=BATCH,
            max_grad_norm=1.0,
            autocast=torch.bfloat16 if half else None,
            nonfinite=NonFiniteCheck(w.device),
        )
        return step, batches

    def _model(self, w: Workload, method: Method, precision: str) -> HybridModel:
        training = {
            "precision": precision,
            "compile": self.compiled,
            "gradient_checkpointing": self.checkpointing,
        }
        sections = {"model": {"path": "-"}, "data": {"train": ["-"]}, "training": training}
        recipe = build_recipe(sections | ({"lora": {"rank": w.lora_rank}} if w.lora_rank else {}))
        backbone, head = split_causal_lm(w.causal_lm(starting_dtype(recipe)))
        model = assemble(backbone, head, recipe, method)
        if self.compiled:
            model.compile_layers()
        return model.to(w.device)

    def _batches(self, w: Workload, references: Any, step: int) -> list[MicroBatch]:
        order = ComparisonOrder(w.encoded, per_prompt=self.per_prompt, seed=0)
        (plan,) = plan_step(w.encoded, order.window(step * BATCH, BATCH), w.max_tokens)
        batches = [build_micro_batch(parts, references) for parts in plan]
        if not self.sharing:
            batches = [self._apart(b, parts) for b, parts in zip(batches, plan, strict=True)]
        return (
            [b.moved(torch.Tensor.pin_memory) for b in batches]
            if w.device.type == "cuda"
            else batches
        )

    @staticmethod
    def _apart(batch: MicroBatch, parts: Any) -> MicroBatch:
        """The same responses in the same order, each behind its own copy of the prompt."""
        singles = [_Single(p.prompt_ids, (ids,)) for p in parts for ids in p.response_ids]
        return dataclasses.replace(batch, layout=lay_out(singles))


@dataclass(frozen=True)
class _Single:
    prompt_ids: Any
    response_ids: Any


@dataclass(frozen=True)
class Naive:
    """The padded hybrid step of naive.py."""

    rung: Rung

    def __call__(self, w: Workload, marks: Marks) -> float:
        """Seconds of the steps."""
        references = None
        if self.rung.cached_reference:
            backbone, head = split_causal_lm(w.causal_lm())
            policy = HybridModel(backbone, policy_head=head)
            references = references_of(policy, w, marks)
            del policy, backbone, head
        half = w.lora_rank is not None and w.device.type == "cuda"
        model = PaddedHybrid(w, self.rung, torch.bfloat16 if half else torch.float32)
        note_loaded(marks, w)
        optimizer = torch.optim.AdamW(model.parameters, lr=RATE, fused=True)
        size = pairs_of(w, self.rung.checkpointing)
        batches = padded_batches(w, references, size)
        marks.tokens = sum(b.ids.numel() for b in batches)

        def run(batches: list[Any]) -> None:
            for number, batch in enumerate(batches):
                for term in model.terms:
                    with torch.autocast(w.device.type, torch.bfloat16, w.device.type == "cuda"):
                        loss = term(batch).sum() / BATCH
                    loss.backward()
                if (number + 1) % (BATCH // size) == 0:
                    torch.nn.utils.clip_grad_norm_(model.parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()

        run(batches[: BATCH // size])
        synchronise(w.device)
        start = time.perf_counter()
        run(batches)
        synchronise(w.device)
        return time.perf_counter() - start


class Clock(TrainerCallback):
    """Time from the first step to the end of training, after one micro-batch to warm up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **objects: Any) -> None:
        self.trainer.current_gradient_accumulation_steps = 1  # the loop sets it before each step
        self.trainer.training_step(objects["model"], next(iter(objects["train_dataloader"])))
        objects["optimizer"].step()
        objects["optimizer"].zero_grad()
        synchronise(self.device)
        self.start = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        synchronise(self.device)
        self.seconds = time.perf_counter() - self.start


@dataclass(frozen=True)
class Trl:
    """A trainer of TRL: as shipped (float32 on a CPU), or tuned: no checkpointing, length-grouped, and
    frozen weights in bfloat16 on a GPU."""

    kind: str
    tuned: bool

    def __call__(self, w: Workload, marks: Marks) -> float:
        """Seconds of the trainer's steps."""
        import trl
        from datasets import Dataset

        reward = self.kind == "reward"
        half = self.tuned and w.lora_rank is not None and w.device.type == "cuda"
        dtype = torch.bfloat16 if half else torch.float32
        model = w.classifier(dtype) if reward else w.causal_lm(dtype)
        rows = _reward_rows(w) if reward else _dpo_rows(w)
        extra = {} if reward else {"ref_model": None if w.lora_rank else w.causal_lm(dtype)}
        note_loaded(marks, w)
        clock = Clock(w.device)
        config = trl.RewardConfig if reward else trl.DPOConfig
        trainer = (trl.RewardTrainer if reward else trl.DPOTrainer)(
            model=model,
            args=config(**self._arguments(w)),
            train_dataset=Dataset.from_list(rows),
            processing_class=w.encoder.tokenizer,
            callbacks=[clock],
            peft_config=_peft(w, reward),
            **extra,
        )
        clock.trainer = trainer
        trainer.train()
        return clock.seconds

    def _arguments(self, w: Workload) -> dict[str, Any]:
        size = pairs_of(w, checkpointing=not self.tuned)
        arguments: dict[str, Any] = {
            "output_dir": tempfile.mkdtemp(),
            "max_steps": w.steps,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": BATCH // size,
            "learning_rate": RATE,
            "bf16": w.device.type == "cuda",
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": w.device.type == "cpu",
            "max_length": w.encoder.lengths.max_length,
        }
        if self.tuned:
            arguments |= {
                "gradient_checkpointing": False,
                "train_sampling_strategy": "group_by_length",
                "remove_unused_columns": False,  # the sampler needs the column of lengths
            }
        return arguments


def _peft(w: Workload, reward: bool) -> Any:
    if not w.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=w.lora_rank,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="SEQ_CLS" if reward else "CAUSAL_LM",
        modules_to_save=["score"] if reward else None,
    )


def _reward_rows(w: Workload) -> list[dict[str, Any]]:
    rows = []
    for g in w.encoded:
        for c in g.comparisons:
            sides = [
                [*g.prompt_ids.tolist(), *g.response_ids[i].tolist()]
                for i in (c.chosen, c.rejected)
            ]
            rows.append(
                {"chosen_ids": sides[0], "rejected_ids": sides[1], "length": max(map(len, sides))}
            )
    return rows


def _dpo_rows(w: Workload) -> list[dict[str, Any]]:
    rows = []
    for g, e in zip(w.groups, w.encoded, strict=True):
        prompt = [{"role": m.role, "content": m.content} for m in g.prompt]
        for c in g.comparisons:
            longest = max(len(e.response_ids[i]) for i in (c.chosen, c.rejected))
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": [{"role": "assistant", "content": g.responses[c.chosen]}],
                    "rejected": [{"role": "assistant", "content": g.responses[c.rejected]}],
                    "length": len(e.prompt_ids) + longest,
                }
            )
    return rows


CONTENDERS: dict[str, Callable[[Workload, Marks], float]] = {
    "hafrm joint (haf)": Ours(),
    "hafrm joint, checkpointed": Ours(checkpointing=True),
    "hafrm reward only (bt)": Ours("bt"),
    "TRL RewardTrainer, as shipped": Trl("reward", tuned=False),
    "TRL RewardTrainer, tuned": Trl("reward", tuned=True),
    "TRL DPOTrainer, as shipped": Trl("dpo", tuned=False),
    "TRL DPOTrainer, tuned": Trl("dpo", tuned=True),
    "naive hybrid": Naive(Rung()),
}

LADDER: dict[str, Callable[[Workload, Marks], float]] = {
    "naive hybrid": Naive(Rung()),
    "+ checkpointing off": Naive(Rung(checkpointing=False)),
    "+ cached reference": Naive(Rung(checkpointing=False, cached_reference=True)),
    "+ one forward": Naive(Rung(checkpointing=False, cached_reference=True, one_forward=True)),
    "+ chunked log-probs": Naive(Rung(False, True, True, True)),
    "+ packing": Ours(sharing=False, per_prompt=1),
    "+ prefix sharing": Ours(per_prompt=1),
    "+ grouping": Ours(),
    "+ bf16": Ours(bf16=True),
    "+ compile": Ours(bf16=True, compiled=True),
}
