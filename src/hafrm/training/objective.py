"""What one step minimises: the method's two losses and their sum, per comparison, never reduced.

The one line that adds them up is in `joint_loss`; the step divides by its global count.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from hafrm.training import losses
from hafrm.training.losses import PolicyLogps
from hafrm.training.methods import POLICY_LOSSES, Method


class StepView(NamedTuple):
    """What a reward loss reads of a whole optimiser step; constants for the gradient."""

    distances: Float[Tensor, " comparisons"]
    """||h_chosen - h_rejected|| of each comparison at hand."""
    mean_distance: Float[Tensor, ""]
    """Running mean over steps."""
    mean_reward: Float[Tensor, ""]
    """Over all responses compared in the step, on all ranks."""
    num_comparisons: int
    """Of the step, on all ranks."""


class JointLoss(NamedTuple):
    """The loss of each comparison and its parts."""

    total: Float[Tensor, " comparisons"]
    """What is trained on: both parts in the method's proportions, times the comparison's weight."""
    reward: Float[Tensor, " comparisons"] | None
    """The reward part as it is, unweighted, for logging; None where the method has none."""
    policy: Float[Tensor, " comparisons"] | None
    """The policy part as it is, unweighted, for logging; None where the method has none."""


def joint_loss(  # noqa: PLR0913 - all by name
    method: Method,
    *,
    rewards: tuple[Float[Tensor, " comparisons"], Float[Tensor, " comparisons"]] | None = None,
    logps: PolicyLogps | None = None,
    margins: Float[Tensor, " comparisons"] | None = None,
    weights: Float[Tensor, " comparisons"] | None = None,
    alpha: Float[Tensor, ""] | None = None,
    step: StepView | None = None,
) -> JointLoss:
    """The method's loss per comparison (nat), not reduced; `rewards` are (chosen, rejected).

    `alpha` stands in for the method's own where that is balanced; `step` is for methods that read it.

    Rewards or log-probs that the method does not train on may be None, and are not looked at.
    """
    reward = _reward_part(method, rewards, margins, step) if method.trains_reward else None
    policy = _policy_part(method, logps) if method.trains_policy else None
    # arXiv 2407.04185: L = L_reward + alpha * L_policy
    weight = method.alpha if alpha is None else alpha
    total = method.reward_weight * _or_zero(reward) + weight * _or_zero(policy)
    assert isinstance(total, Tensor), "a method trains at least one of the two"
    return JointLoss(total if weights is None else weights * total, reward, policy)


def _reward_part(
    method: Method,
    rewards: tuple[Float[Tensor, " comparisons"], Float[Tensor, " comparisons"]] | None,
    margins: Float[Tensor, " comparisons"] | None,
    step: StepView | None,
) -> Float[Tensor, " comparisons"]:
    assert rewards is not None, f"method {method.name} trains rewards, but got none"
    loss = losses.reward_loss(
        *rewards,
        margin=margins,
        label_smoothing=method.label_smoothing,
        centering=method.centering,
    )
    if not method.reads_step:
        return loss
    assert step is not None, f"method {method.name} reads the whole step, but got no view of it"
    if method.reward_loss == "normbt":
        loss = loss * losses.distance_weights(step.distances, step.mean_distance)
    if method.sum_to_zero:
        penalty = losses.sum_to_zero_loss(*rewards, step.mean_reward, step.num_comparisons)
        loss = loss + method.sum_to_zero * penalty
    return loss


def _policy_part(method: Method, logps: PolicyLogps | None) -> Float[Tensor, " comparisons"]:
    assert method.policy_loss is not None
    assert logps is not None, f"method {method.name} trains the policy, but got no log-probs"
    loss = POLICY_LOSSES[method.policy_loss]
    return loss.function(logps, **{option: getattr(method, option) for option in loss.options})


def _or_zero(part: Float[Tensor, " comparisons"] | None) -> Float[Tensor, " comparisons"] | float:
    return 0.0 if part is None else part
