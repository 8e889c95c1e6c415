"""What a run shows: metrics.jsonl, samples.jsonl, trackers, and a line of log per interval."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from hafrm.preferences import Message
from hafrm.recipe_file import dump_recipe
from hafrm.rlhf.rewards import HeldOut
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from hafrm.run_folder import RunFolder
from hafrm.statistics import in_words
from hafrm.training.runtime import start_trackers

log = logging.getLogger("hafrm")
SHOWN = ("reward", "gold", "kl", "length", "entropy", "clip_fraction", "value_loss")
"""What a line of log says of a batch; metrics.jsonl has it all."""


class RlhfLog:
    """Collects batches and writes them every `log_every`; use as a context manager."""

    def __init__(self, run: RunFolder, recipe: RlhfRecipe) -> None:
        self._run, self._tracking, self._steps = run, recipe.tracking, recipe.training.steps
        self._batches: list[Mapping[str, float | None]] = []
        self._since = time.perf_counter()
        self._trackers = start_trackers(run.path, recipe.tracking, dump_recipe(recipe))

    def __enter__(self) -> "RlhfLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def batch(self, step: int, values: Mapping[str, float | None]) -> None:
        """Note a batch; write the means over the interval when it is full."""
        self._batches.append(values)
        if step % self._tracking.log_every and step != self._steps:
            return
        means = {name: _mean([batch[name] for batch in self._batches]) for name in values}
        seconds = (time.perf_counter() - self._since) / len(self._batches)
        self._report("rlhf", step, means | {"seconds": seconds})
        shown = {name: v for name in SHOWN if (v := means.get(name)) is not None}
        log.info("step %d/%d: %s", step, self._steps, in_words(shown))
        self._batches, self._since = [], time.perf_counter()

    def held_out(
        self, step: int, measured: HeldOut, best: bool, extra: Mapping[str, float]
    ) -> None:
        """Write an evaluation, and some of its responses to read."""
        values: dict[str, Any] = {}
        for name, estimate in measured.estimates().items():
            values |= {name: estimate.value, f"{name}_low": estimate.low}
            values |= {f"{name}_high": estimate.high}
        values |= {"kl": float(measured.kls.mean()), "length": float(measured.lengths.mean())}
        values |= {"ended": float(measured.ended.mean()), **extra}
        self._report("held-out", step, values)
        note = "  (best so far)" if best else ""
        log.info("step %d/%d held out: %s%s", step, self._steps, in_words(values), note)
        for number, rollout in enumerate(measured.rollouts[: self._tracking.samples]):
            self._run.append_sample(
                {
                    "step": step,
                    "prompt": _as_text(rollout.prompt.messages),
                    "response": rollout.texts[0],
                    "reward": float(measured.rewards[number]),
                    "kl": float(measured.kls[number]),
                    "gold": None if measured.gold is None else float(measured.gold[number]),
                }
            )
        self._since = time.perf_counter()

    def _report(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        self._run.append_metrics({"step": step, "phase": phase, **values})
        numbers = {f"{phase}/{name}": value for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def _as_text(messages: Sequence[Message]) -> str:
    """A single question as text, a conversation as JSON of its messages."""
    if len(messages) == 1:
        return messages[0].content
    return json.dumps([message._asdict() for message in messages], ensure_ascii=False)
