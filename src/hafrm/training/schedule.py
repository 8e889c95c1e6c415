"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from typing import Literal, Protocol, runtime_checkable

from hafrm.recipe import TrainingSection


@runtime_checkable
class Schedule(Protocol):
    """What a section must say of the learning rate."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def schedule(self) -> Literal["cosine", "linear", "constant"]: ...
    @property
    def warmup_fraction(self) -> float: ...


def learning_rate(training: Schedule, step: int, num_steps: int) -> float:
    """The rate of update `step` (from 0): linear warm-up from above 0 to the peak, then the schedule,
    whose last update is one step short of 0."""
    warmup = round(training.warmup_fraction * num_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    factor = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "constant": 1.0,
    }[training.schedule]
    return training.learning_rate * factor


def count_steps(training: TrainingSection, num_comparisons: int) -> int:
    """Optimiser steps of the run: as asked, or as many full batches as the epochs hold, at least one."""
    if training.steps is not None:
        return training.steps
    return max(1, int(training.epochs * num_comparisons) // training.batch_size)
