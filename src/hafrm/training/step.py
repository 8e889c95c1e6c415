"""One optimiser step, exactly: sums over micro-batches, divided by the step's global count.

Neither packing nor the number of ranks changes the gradient, and a non-finite loss or gradient never
reaches the weights. Nothing here logs, reads data, or waits for the device. Start at `take_step`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from hafrm.engine.model import Outputs
from hafrm.errors import DivergedError, MemoryBudgetError
from hafrm.scoring.forward import is_out_of_memory
from hafrm.training import parallel
from hafrm.training.losses import PolicyLogps
from hafrm.training.methods import JointLoss, Method, StepStatistics, joint_loss
from hafrm.training.step_batches import MicroBatch

MEASURES = (
    *("loss", "reward_loss", "policy_loss", "accuracy", "margin", "chosen_reward"),
    *("rejected_reward", "implicit_accuracy", "implicit_margin", "equal_rewards"),
)
"""What a step sums over its comparisons, in this order; NaN for an absent head."""
# The fraction of NormBT's running mean distance that a step keeps: arXiv 2512.06343's beta.
DECAY = 0.9


@dataclass(frozen=True)
class StepResult:
    """Device tensors: no value is copied to the host before someone reads it."""

    sums: Float[Tensor, " sums"]  # MEASURES summed over this rank's comparisons, and their number
    grad_norm: Float[Tensor, ""]  # 2-norm of the whole gradient before clipping
    num_tokens: int  # packed tokens that this rank ran
    distance: Float[Tensor, ""] | None = None  # NormBT's running mean, which the next step reads


def take_step(  # noqa: PLR0913
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    method: Method,
    *,
    num_comparisons: int,
    max_grad_norm: float,
    nonfinite: "NonFiniteCheck",
    autocast: torch.dtype | None = None,
    distance: Float[Tensor, ""] | None = None,
    scatter: bool = False,
) -> StepResult:
    """Run the step's micro-batches, clip and update. `num_comparisons` is over all ranks; `distance` comes
    from the last step. With `scatter`, shards exchange gradients in every micro-batch, so none is whole. A
    step that is not finite updates nothing, and the next `nonfinite.check()` raises."""
    device = parallel.unwrap(model).device
    sums = torch.zeros(len(MEASURES) + 1, device=device)
    finite: list[Tensor] = []
    means = StepMeans(method, num_comparisons, distance)

    def forward(batch: MicroBatch) -> Outputs:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            outputs: Outputs = model(batch.layout)
        return outputs

    means.look_ahead(forward, batches, device)
    for number, batch in enumerate(batches):
        moved = batch.to(device)
        with parallel.synchronise(model, last=number == len(batches) - 1, scatter=scatter):
            outputs = forward(moved)
            loss = losses_of(outputs, moved, method, means.add(outputs, moved))
            # Gradients are averaged over ranks; the loss is a sum over the step's comparisons.
            (loss.total.sum() * (parallel.num_ranks() / num_comparisons)).backward()
        sums += measure(outputs, moved, loss, method)
        finite.append(torch.isfinite(loss.total.detach()).all())
    parameters = [p for p in model.parameters() if p.grad is not None]
    grad_norm = parallel.clip(parameters, max_grad_norm)
    nonfinite.protect(optimizer, batches, torch.stack([*finite, torch.isfinite(grad_norm)]))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    num_tokens = sum(batch.layout.num_tokens for batch in batches)
    num_tokens //= parallel.unwrap(model).team.size
    return StepResult(sums, grad_norm, num_tokens, means.next_distance())


@contextlib.contextmanager
def memory_errors(what: str, resume: str) -> Iterator[None]:
    """Turn running out of memory into a MemoryBudgetError that says how to resume."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise MemoryBudgetError(
            f"{what} ran out of memory ({reason}). Resume with: {resume}"
        ) from error


def losses_of(
    outputs: Outputs, batch: MicroBatch, method: Method, step: StepStatistics | None = None
) -> JointLoss:
    """The method's losses for every comparison; `step` is for a method that reads the whole step."""

    def both(values: Tensor | None) -> Any:
        """(of the chosen, of the rejected) responses."""
        return (None, None) if values is None else (values[batch.chosen], values[batch.rejected])

    logps = rewards = None
    if outputs.rewards is not None:
        rewards = both(outputs.rewards)
    if outputs.logps is not None:
        sides = (outputs.logps, outputs.lengths, batch.reference_logps)
        logps = PolicyLogps(*(side for values in sides for side in both(values)))
    of_batch = {"margins": batch.margins, "weights": batch.weights}
    return joint_loss(method, rewards=rewards, logps=logps, step=step, **of_batch)


@torch.no_grad()
def measure(
    outputs: Outputs, batch: MicroBatch, loss: JointLoss, method: Method
) -> Float[Tensor, " sums"]:
    """MEASURES summed over the micro-batch's comparisons, and their number; comparisons of weight 0, and
    fillers, do not count."""
    absent = torch.full_like(batch.weights, float("nan"))

    def sides(scores: Tensor | None) -> list[Tensor]:
        """Whether the chosen response scores higher, by how much, and both scores."""
        if scores is None:
            return [absent] * 4
        chosen, rejected = scores[batch.chosen], scores[batch.rejected]
        return [(chosen > rejected).float(), chosen - rejected, chosen, rejected]

    implicit = None
    if outputs.logps is not None and method.trains_policy:
        implicit = method.implicit_rewards(outputs.logps, outputs.lengths, batch.reference_logps)
    parts = [absent if part is None else part for part in (loss.reward, loss.policy)]
    values = [loss.total, *parts, *sides(outputs.rewards), *sides(implicit)[:2]]
    # accuracy counts these as wrong; not by the margin alone, because NaN never equals 0
    values.append(absent if outputs.rewards is None else (values[4] == 0).float())
    values.append(torch.ones_like(batch.weights))
    return torch.where(batch.weights != 0, torch.stack(values), 0.0).sum(1)


class StepMeans:
    """Means over all micro-batches and ranks, for `normbt` and `sum_to_zero`; else it does nothing.

    NormBT's scale comes from earlier steps. BSR's mean reward, and the scale of the first step, are needed
    before the first backward, so a step of several micro-batches runs forward once more.
    """

    def __init__(
        self, method: Method, num_comparisons: int, distance: Float[Tensor, ""] | None
    ) -> None:
        self._method, self._num_comparisons, self._distance = method, num_comparisons, distance
        self._total: Float[Tensor, " means"] | None = None
        self._ahead: Float[Tensor, " means"] | None = None

    def look_ahead(
        self,
        forward: Callable[[MicroBatch], Outputs],
        batches: Sequence[MicroBatch],
        device: torch.device,
    ) -> None:
        """Run the step without gradients, if its first loss needs the means of the whole step."""
        unknown = self._method.sum_to_zero > 0 or self._distance is None
        alone = len(batches) == 1 and parallel.num_ranks() == 1
        if not self._method.reads_step or not unknown or alone:
            return
        with torch.no_grad():
            moved = (batch.to(device) for batch in batches)
            sums = [self._sums(forward(batch), batch) for batch in moved]
        self._ahead = parallel.add_up(torch.stack(sums).sum(0)) / self._num_comparisons

    def add(self, outputs: Outputs, batch: MicroBatch) -> StepStatistics | None:
        """Add a micro-batch right after its forward; returns what its losses read."""
        if not self._method.reads_step:
            return None
        sums = self._sums(outputs, batch)
        self._total = sums if self._total is None else self._total + sums
        means = sums / self._num_comparisons if self._ahead is None else self._ahead
        reward, first = means.unbind()
        distance = first if self._distance is None else self._distance
        return StepStatistics(_distances(outputs, batch), distance, reward, self._num_comparisons)

    def next_distance(self) -> Float[Tensor, ""] | None:
        if self._total is None:
            return None
        mean = (parallel.add_up(self._total) / self._num_comparisons)[1]
        return mean if self._distance is None else DECAY * self._distance + (1 - DECAY) * mean

    def _sums(self, outputs: Outputs, batch: MicroBatch) -> Float[Tensor, " means"]:
        """Sums over comparisons of (mean of both rewards, distance); fillers do not count."""
        assert outputs.rewards is not None
        rewards = outputs.rewards.detach()
        # Weighted like the loss: the penalty's gradient is then that of this very mean.
        reward = (batch.weights * (rewards[batch.chosen] + rewards[batch.rejected]) / 2).sum()
        distance = torch.where(batch.weights != 0, _distances(outputs, batch), 0.0).sum()
        return torch.stack([reward, distance])


def _distances(outputs: Outputs, batch: MicroBatch) -> Float[Tensor, " comparisons"]:
    assert outputs.reward_states is not None
    states = outputs.reward_states.float()
    norms: Tensor = torch.linalg.vector_norm(states[batch.chosen] - states[batch.rejected], dim=1)
    return norms


class NonFiniteCheck:
    """Keeps non-finite losses and gradients away from the weights, without waiting for the device.

    A flag on the device stays set from the first broken step of any rank on. AdamW reads it and leaves
    weights and moments as they are, so the host needs to look only once per logging interval.
    """

    def __init__(self, device: torch.device) -> None:
        self._broken = torch.zeros((), device=device)
        self._unchecked: list[tuple[list[tuple[str, ...]], Tensor, Tensor]] = []

    def protect(
        self,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[MicroBatch],
        finite: Bool[Tensor, " flags"],
    ) -> None:
        """Let `optimizer` update only if all steps so far were finite on all ranks; `finite` has a flag for
        the losses of each micro-batch and, last, one for the gradient."""
        broken = parallel.add_up((~finite.all()).float())  # over ranks, so that all stop together
        self._broken = torch.maximum(self._broken, broken.clamp(max=1.0))
        self._unchecked.append(([batch.ids for batch in batches], finite, self._broken))
        flag, parameter = self._broken, optimizer.param_groups[0]["params"][0]
        if isinstance(parameter, DTensor):  # sharded parameters accept no plain tensor beside them
            mesh, flag = parameter.device_mesh, flag.to(parameter.device)
            flag = DTensor.from_local(flag, mesh, [Replicate()] * mesh.ndim, run_check=False)
        # What GradScaler sets: torch's fused optimisers skip the whole update if it is 1.
        optimizer.found_inf = flag  # type: ignore[attr-defined]
        self.check_now()

    def check_now(self) -> None:
        """`check`, if reading the flag costs nothing."""
        if self._broken.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise DivergedError if a step since the last check was not finite, naming its groups."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked or not bool(self._broken):
            return
        ids, finite, _ = next(step for step in unchecked if bool(step[2]))
        broken = [b for b, good in zip(ids, finite.tolist(), strict=False) if not good]
        names = sorted({name for batch in broken or ids for name in batch})
        raise DivergedError(
            f"the {'loss' if broken else 'gradient'} of this step is not finite; stopped before the "
            f"update. Look at its {len(names)} groups ({', '.join(names[:16])}), lower "
            "training.learning_rate, or set training.precision: fp32"
        )


def build_optimizer(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, norms and biases do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=betas, eps=eps, fused=True
    )


def learning_rate(training: Any, step: int, num_steps: int) -> float:
    """The learning rate of update `step` (from 0), by a recipe's section `training`: linear warm-up from
    above 0 to the peak, then the schedule, whose last update is one step short of 0."""
    peak: float = training.learning_rate
    warmup: int = round(training.warmup_fraction * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    factor: float = {"cosine": cosine, "linear": 1.0 - progress, "constant": 1.0}[training.schedule]
    return peak * factor
