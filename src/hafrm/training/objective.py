"""What one step minimises: the method's two losses and their sum, per comparison, never reduced.

The one line that adds them up is in `joint_loss`; the step divides by its global count.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from hafrm.training import losses
from hafrm.training.losses import PolicyLogps
from hafrm.training.methods import POLICY_LOSSES, Method


class JointLoss(NamedTuple):
    """The loss of each comparison and its parts."""

    total: Float[Tensor, " comparisons"]
    """What is trained on: both parts in the method's proportions, times the comparison's weight."""
    reward: Float[Tensor, " comparisons"] | None
    """The reward part as it is, unweighted, for logging; None where the method has none."""
    policy: Float[Tensor, " comparisons"] | None
    """The policy part as it is, unweighted, for logging; None where the method has none."""


def joint_loss(
    method: Method,
    *,
    rewards: tuple[Float[Tensor, " comparisons"], Float[Tensor, " comparisons"]] | None = None,
    logps: PolicyLogps | None = None,
    margins: Float[Tensor, " comparisons"] | None = None,
    weights: Float[Tensor, " comparisons"] | None = None,
    alpha: Float[Tensor, ""] | None = None,
) -> JointLoss:
    """The method's loss per comparison (nat), not reduced; `rewards` are (chosen, rejected).

    `alpha` stands in for the method's own where that is balanced.

    Rewards or log-probs that the method does not train on may be None, and are not looked at.
    """
    reward = _reward_part(method, rewards, margins) if method.trains_reward else None
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
) -> Float[Tensor, " comparisons"]:
    assert rewards is not None, f"method {method.name} trains rewards, but got none"
    return losses.reward_loss(
        *rewards,
        margin=margins,
        label_smoothing=method.label_smoothing,
        centering=method.centering,
    )


def _policy_part(method: Method, logps: PolicyLogps | None) -> Float[Tensor, " comparisons"]:
    assert method.policy_loss is not None
    assert logps is not None, f"method {method.name} trains the policy, but got no log-probs"
    loss = POLICY_LOSSES[method.policy_loss]
    return loss.function(logps, **{option: getattr(method, option) for option in loss.options})


def _or_zero(part: Float[Tensor, " comparisons"] | None) -> Float[Tensor, " comparisons"] | float:
    return 0.0 if part is None else part
