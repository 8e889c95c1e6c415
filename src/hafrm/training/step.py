"""One optimiser step, exactly: sums over micro-batches, divided by the step's global count.

Neither packing nor the number of ranks changes the gradient, because every comparison's loss enters as
loss / (comparisons of the step over all ranks). A non-finite loss or gradient never reaches the weights.
Nothing here logs, schedules, reads data, or waits for the device.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hafrm.engine.model import Outputs
from hafrm.training import parallel
from hafrm.training.balance import Balance, Weighing
from hafrm.training.batches import MicroBatch
from hafrm.training.guard import Guard
from hafrm.training.losses import PolicyLogps
from hafrm.training.methods import Method
from hafrm.training.objective import JointLoss, StepView, joint_loss
from hafrm.training.step_means import StepMeans

MEASURES = (
    "loss",
    "reward_loss",
    "policy_loss",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "implicit_accuracy",
    "implicit_margin",
)
"""What a step sums over its comparisons, in this order; NaN where a head is absent."""


@dataclass(frozen=True)
class StepResult:
    """Device tensors: nothing is fetched until somebody asks."""

    sums: Float[Tensor, " measures"]
    """MEASURES summed over this rank's comparisons; divide by the global count."""
    grad_norm: Float[Tensor, ""]
    """2-norm of the whole gradient before clipping."""
    num_tokens: int
    """Packed tokens that this rank ran."""
    alpha: Float[Tensor, ""] | None = None
    """The policy loss's weight in this step, where it is balanced."""
    balance: Balance | None = None
    """What the next step's alpha follows from."""
    distance: Float[Tensor, ""] | None = None
    """NormBT's running mean distance, which the next step reads."""


def losses_of(
    outputs: Outputs,
    batch: MicroBatch,
    method: Method,
    alpha: Float[Tensor, ""] | None = None,
    step: StepView | None = None,
) -> JointLoss:
    """The method's losses for every comparison of a micro-batch; `alpha` stands in for its own, `step` is
    for a method that reads the whole step."""
    rewards = (
        None
        if outputs.rewards is None
        else (outputs.rewards[batch.chosen], outputs.rewards[batch.rejected])
    )
    return joint_loss(
        method,
        rewards=rewards,
        logps=None if outputs.logps is None else policy_logps(outputs, batch),
        margins=batch.margins,
        weights=batch.weights,
        alpha=alpha,
        step=step,
    )


def policy_logps(outputs: Outputs, batch: MicroBatch) -> PolicyLogps:
    """The log-probs of both sides of every comparison, with their references where there are any."""
    assert outputs.logps is not None
    reference = batch.reference_logps
    return PolicyLogps(
        chosen_logps=outputs.logps[batch.chosen],
        rejected_logps=outputs.logps[batch.rejected],
        reference_chosen_logps=None if reference is None else reference[batch.chosen],
        reference_rejected_logps=None if reference is None else reference[batch.rejected],
        chosen_counts=outputs.lengths[batch.chosen],
        rejected_counts=outputs.lengths[batch.rejected],
    )


def take_step(  # noqa: PLR0913
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    method: Method,
    *,
    num_comparisons: int,
    max_grad_norm: float,
    autocast: torch.dtype | None = None,
    guard: Guard | None = None,
    balance: Balance | None = None,
    distance: Float[Tensor, ""] | None = None,
) -> StepResult:
    """Run the step's micro-batches, clip and update; `num_comparisons` counts all ranks.

    A loss or gradient that is not finite updates nothing: NumericsError is raised here without a `guard`
    and on a CPU, and else by the guard's next `check`. With a `balance`, alpha follows from it; `distance`
    is NormBT's running mean after the steps before.
    """
    assert (balance is None) == (method.gradient_ratio is None), "alpha auto needs its balance"
    device = parallel.unwrap(model).device
    sums = torch.zeros(len(MEASURES), device=device)
    finite: list[Tensor] = []
    weighing = Weighing(balance, device)
    means = StepMeans(method, num_comparisons, distance, device)

    def watch(head: Literal["reward", "policy"], states: Tensor) -> None:
        means.watch(head, states)
        if weighing.watch is not None and states.requires_grad:
            weighing.watch(head, states)

    def forward(moved: MicroBatch) -> Outputs:
        with _autocast(device, autocast):
            outputs: Outputs = model(moved.layout, watch)
        return outputs

    means.look_ahead(forward, batches)
    for number, batch in enumerate(batches):
        moved = batch.to(device)
        with parallel.synchronise(model, last=number == len(batches) - 1):
            outputs = forward(moved)
            loss = losses_of(outputs, moved, method, weighing.alpha, means.view(outputs, moved))
            # Gradients are averaged over ranks; the loss is a sum over the step's comparisons.
            (loss.total.sum() * (parallel.num_ranks() / num_comparisons)).backward()
        sums += measure(outputs, moved, loss, method)
        finite.append(torch.isfinite(loss.total.detach()).all())
    parameters = [p for p in model.parameters() if p.grad is not None]
    grad_norm = parallel.clip(parameters, max_grad_norm)
    watching = guard or Guard(device)
    watching.protect(optimizer, batches, torch.stack([*finite, torch.isfinite(grad_norm)]))
    if guard is None:
        watching.check()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    num_tokens = sum(batch.layout.num_tokens for batch in batches)
    return StepResult(sums, grad_norm, num_tokens, weighing.alpha, weighing.done(), means.done())


@torch.no_grad()
def measure(
    outputs: Outputs, batch: MicroBatch, loss: JointLoss, method: Method
) -> Float[Tensor, " measures"]:
    """MEASURES summed over the micro-batch's comparisons; fillers count for nothing."""
    real = batch.weights != 0
    absent = torch.full_like(batch.weights, float("nan"))

    def sides(scores: Tensor | None) -> tuple[Tensor, Tensor]:
        return (
            (absent, absent) if scores is None else (scores[batch.chosen], scores[batch.rejected])
        )

    chosen, rejected = sides(outputs.rewards)
    implicit_chosen, implicit_rejected = sides(_implicit(outputs, batch, method))
    rows = [
        loss.total,
        absent if loss.reward is None else loss.reward,
        absent if loss.policy is None else loss.policy,
        _share(chosen - rejected),
        chosen - rejected,
        chosen,
        rejected,
        _share(implicit_chosen - implicit_rejected),
        implicit_chosen - implicit_rejected,
    ]
    return torch.where(real, torch.stack(rows), 0.0).sum(1)


def _implicit(outputs: Outputs, batch: MicroBatch, method: Method) -> Tensor | None:
    if outputs.logps is None or not method.trains_policy:
        return None
    return method.implicit_rewards(outputs.logps, outputs.lengths, batch.reference_logps)


def _share(difference: Tensor) -> Tensor:
    return torch.where(difference.isnan(), difference, (difference > 0).float())


def _autocast(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def build_optimizer(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float], eps: float
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


def drop_half_made(optimizer: torch.optim.Optimizer) -> None:
    """Forget state of which AdamW, running out of memory in its first step, has made a part only: it would
    take the rest for made."""
    for parameter, state in list(optimizer.state.items()):
        if "exp_avg_sq" not in state:
            del optimizer.state[parameter]
