"""Numbers of a whole optimiser step that a reward loss reads: its mean reward, its mean distance of states.

A comparison's loss must not depend on what it was packed with, so these are sums over all micro-batches
and ranks. NormBT's scale comes from the steps before. BSR's mean reward, and the scale of the first step,
must be known before the first backward: a step of several micro-batches then runs forward once more,
without gradients; a step of one has its mean from the one forward. Nothing here waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hafrm.engine.model import Outputs
from hafrm.training import parallel
from hafrm.training.batches import MicroBatch
from hafrm.training.methods import Method
from hafrm.training.objective import StepView

DECAY = 0.9
"""Part of NormBT's running mean distance that a step keeps (arXiv 2512.06343's beta)."""


class StepMeans:
    """One step's means; for a method that reads none, nothing is watched or computed."""

    def __init__(
        self,
        method: Method,
        num_comparisons: int,
        distance: Float[Tensor, ""] | None,
        device: torch.device,
    ) -> None:
        """`distance` is the running mean after the steps before; None at a run's start."""
        self._method, self._num, self._distance = method, num_comparisons, distance
        self._device = device
        self._states: Tensor | None = None
        self._total: Float[Tensor, " means"] | None = None
        self._ahead: Float[Tensor, " means"] | None = None

    def watch(self, head: Literal["reward", "policy"], states: Tensor) -> None:
        """Keep the states that rewards are read from."""
        if self._method.reads_step and head == "reward":
            self._states = states.detach().float()

    def look_ahead(
        self, forward: Callable[[MicroBatch], Outputs], batches: Sequence[MicroBatch]
    ) -> None:
        """Run the step once without gradients, where its first loss needs the means of all of it."""
        unknown = self._method.sum_to_zero > 0 or self._distance is None
        alone = len(batches) == 1 and parallel.num_ranks() == 1
        if not self._method.reads_step or not unknown or alone:
            return
        with torch.no_grad():
            sums = []
            for batch in batches:
                moved = batch.to(self._device)
                sums.append(self._sums(forward(moved), moved))
        self._ahead = parallel.add_up(torch.stack(sums).sum(0)) / self._num

    def view(self, outputs: Outputs, batch: MicroBatch) -> StepView | None:
        """What this micro-batch's losses read, just after its forward."""
        if not self._method.reads_step:
            return None
        sums = self._sums(outputs, batch)
        self._total = sums if self._total is None else self._total + sums
        reward, distance = (sums / self._num if self._ahead is None else self._ahead).unbind()
        if self._distance is not None:
            distance = self._distance
        return StepView(self._distances(batch), distance, reward, self._num)

    def done(self) -> Float[Tensor, ""] | None:
        """The running mean distance for the next step, once all micro-batches have run."""
        if self._total is None:
            return None
        mean = (parallel.add_up(self._total) / self._num)[1]
        return mean if self._distance is None else DECAY * self._distance + (1 - DECAY) * mean

    def _sums(self, outputs: Outputs, batch: MicroBatch) -> Float[Tensor, " means"]:
        """Sums over comparisons of (mean of both rewards, distance); fillers count for nothing."""
        assert outputs.rewards is not None
        rewards = outputs.rewards.detach()
        # Weighed, as the loss is: the penalty's gradient is then that of this very mean.
        reward = (batch.weights * (rewards[batch.chosen] + rewards[batch.rejected]) / 2).sum()
        distance = torch.where(batch.weights != 0, self._distances(batch), 0.0).sum()
        return torch.stack([reward, distance])

    def _distances(self, batch: MicroBatch) -> Float[Tensor, " comparisons"]:
        assert self._states is not None, "the forward was not watched"
        difference = self._states[batch.chosen] - self._states[batch.rejected]
        norms: Tensor = torch.linalg.vector_norm(difference, dim=1)
        return norms
