"""Numbers that are not finite never reach the weights, and no step waits to find that out.

A flag on the device stays up from the first step whose loss or gradient is not finite on any rank. AdamW
reads it there and leaves weights and moments as they are, in that step and in all later ones, so the host
may look once per logging interval: it then raises with the groups of the step that broke.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from hafrm.errors import DivergedError
from hafrm.training import parallel
from hafrm.training.batches import MicroBatch


class Guard:
    """Collects what each step says about its numbers; `check` before trusting anything after it."""

    def __init__(self, device: torch.device) -> None:
        self._broken = torch.zeros((), device=device)
        self._unseen: list[tuple[list[tuple[str, ...]], Tensor, Tensor]] = []

    def protect(
        self,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[MicroBatch],
        finite: Bool[Tensor, " flags"],
    ) -> None:
        """Let `optimizer` update only if all steps so far were finite on all ranks.

        `finite` holds a flag for the losses of each micro-batch and, last, one for the gradient.
        """
        good = parallel.all_finite(finite)
        self._broken = torch.maximum(self._broken, (~good).to(self._broken.dtype))
        self._unseen.append(([batch.ids for batch in batches], finite, self._broken))
        # What GradScaler sets: torch's fused optimisers skip the whole update where it is 1.
        optimizer.found_inf = _placed(self._broken, optimizer)  # type: ignore[attr-defined]
        self.check_now()

    def check_now(self) -> None:
        """Check after every step where looking costs nothing."""
        if self._broken.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise DivergedError if a step since the last check was not finite, naming its groups."""
        unseen, self._unseen = self._unseen, []
        if not unseen or not bool(self._broken):
            return
        ids, finite, _ = next(step for step in unseen if bool(step[2]))
        raise DivergedError(_message(ids, finite.tolist()))


def _placed(flag: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """The flag as the optimiser's parameters are: sharded ones take no plain tensor beside them."""
    parameter = optimizer.param_groups[0]["params"][0]
    if not isinstance(parameter, DTensor):
        return flag
    mesh = parameter.device_mesh
    return DTensor.from_local(flag, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _message(ids: Sequence[tuple[str, ...]], finite: Sequence[bool]) -> str:
    """Which groups to look at."""
    broken = [batch for batch, good in zip(ids, finite, strict=False) if not good]
    what = "loss" if broken else "gradient"
    names = sorted({name for batch in broken or ids for name in batch})
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
    return (
        f"the {what} of this step is not finite; stopped before the update. Groups in it: {shown}. "
        "Look at their texts and margins, lower training.learning_rate, or set training.precision: fp32"
    )
