"""Methods: named objectives, each a preset of reward loss, policy loss and their weights.

A new policy loss is one function in `losses` and one entry in POLICY_LOSSES; a new method is one entry in
METHODS. No other code depends on a method's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hafrm.errors import ConfigError, did_you_mean
from hafrm.recipe import Recipe
from hafrm.training import losses
from hafrm.training.losses import PerComparison, PolicyLogps


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A loss on the policy head, what it needs, and how its policy alone scores a response."""

    function: Callable[..., PerComparison]
    options: Mapping[str, float] = field(default_factory=dict)  # with its paper's or TRL's values
    needs_reference: bool = True
    per_token: bool = False  # the loss, and so the implicit reward, compares log-probs per token
    reads_logits: bool = False  # uses the target tokens' logits instead of their log-probs


POLICY_LOSSES: Mapping[str, PolicyLoss] = {
    "dpo": PolicyLoss(losses.dpo_loss, {"beta": 0.1, "label_smoothing": 0.0}),
    "dpo-noref": PolicyLoss(
        losses.reference_free_dpo_loss, {"beta": 0.1, "label_smoothing": 0.0}, needs_reference=False
    ),
    "dpo-likelihood": PolicyLoss(losses.dpo_likelihood_loss, {"beta": 0.1, "label_smoothing": 0.0}),
    # OpenReview wlxINVwfl7: DPO without its log-softmax
    "dpo-logits": PolicyLoss(
        losses.dpo_loss, {"beta": 0.1, "label_smoothing": 0.0}, reads_logits=True
    ),
    "ipo": PolicyLoss(losses.ipo_loss, {"beta": 0.1}, per_token=True),
    "simpo": PolicyLoss(
        losses.simpo_loss, {"beta": 2.0, "gamma": 1.0}, needs_reference=False, per_token=True
    ),
    "orpo": PolicyLoss(losses.orpo_loss, {"beta": 0.1}, needs_reference=False, per_token=True),
    "kto": PolicyLoss(losses.kto_loss, {"beta": 0.1}),
    "sft": PolicyLoss(losses.sft_loss, needs_reference=False, per_token=True),
    "sft-logsigmoid": PolicyLoss(losses.sft_logsigmoid_loss, {"beta": 0.1}, needs_reference=False),
}
REWARD_LOSSES = ("bt", "normbt")
"""Bradley-Terry, and Bradley-Terry with each comparison weighted by NormBT's factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """L = reward_weight * L_reward + alpha * L_policy; raises ConfigError for values that train nothing."""

    name: str
    reward_weight: float = 1.0  # 0 trains the policy only; GRM's convex sum uses 1 - alpha
    alpha: float = 0.0  # 0 trains the reward only; the paper's code uses 0.2
    policy_loss: str | None = None  # a key of POLICY_LOSSES
    beta: float = 1.0  # of the policy loss (the paper's tau), and the implicit reward's factor
    gamma: float = 0.0  # SimPO's target margin, in units of beta * log-prob per token
    label_smoothing: float = 0.0  # assumed probability of a wrong label; reward loss and DPO's
    centering: float = 0.0  # factor on (chosen + rejected)^2; TRL suggests 0.01
    reward_loss: str = "bt"  # one of REWARD_LOSSES
    sum_to_zero: float = 0.0  # factor on BSR's penalty; BSR uses 0.001

    def __post_init__(self) -> None:
        if self.alpha > 0 and self.policy_loss is None:
            raise ConfigError(
                f"method.alpha is {self.alpha}, but method {self.name!r} has no policy loss to weigh: "
                f"set method.policy_loss to one of {', '.join(POLICY_LOSSES)}"
            )
        if not (self.trains_reward or self.trains_policy):
            raise ConfigError(
                f"method {self.name!r} would train nothing: set method.reward_weight or method.alpha"
            )

    @property
    def trains_reward(self) -> bool:
        return self.reward_weight > 0

    @property
    def trains_policy(self) -> bool:
        return self.alpha > 0 and self.policy_loss is not None

    @property
    def reads_step(self) -> bool:
        """Whether the reward loss reads the whole step: its mean reward, or its distances."""
        return self.trains_reward and (self.reward_loss == "normbt" or self.sum_to_zero > 0)

    @property
    def needs_reference(self) -> bool:
        return self.trains_policy and self.scores_against_reference

    @property
    def scores_with(self) -> Literal["reward", "implicit"]:
        """What ranks responses after training: the reward head if it was trained, else the policy."""
        return "reward" if self.trains_reward else "implicit"

    @property
    def scores_against_reference(self) -> bool:
        return self.policy_loss is None or POLICY_LOSSES[self.policy_loss].needs_reference

    @property
    def scores_per_token(self) -> bool:
        return self.policy_loss is not None and POLICY_LOSSES[self.policy_loss].per_token

    @property
    def reads_logits(self) -> bool:
        return self.trains_policy and POLICY_LOSSES[self.policy_loss or ""].reads_logits

    def implicit_rewards(
        self,
        logps: Float[Tensor, " responses"],
        counts: Int[Tensor, " responses"],
        reference_logps: Float[Tensor, " responses"] | None = None,
    ) -> Float[Tensor, " responses"]:
        """The policy's score of each response: what its loss compares (without a policy loss: DPO's)."""
        # beta * (log pi - log pi_ref), arXiv 2305.18290, Eq. 5
        logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
        if self.scores_against_reference:
            assert reference_logps is not None
            logps = logps - reference_logps
        return self.beta * (logps / counts if self.scores_per_token else logps)


def _preset(name: str, policy_loss: str | None = None, **values: Any) -> Method:
    """A method with its policy loss's own options, unless `values` has others."""
    options = POLICY_LOSSES[policy_loss].options if policy_loss else {}
    return Method(name=name, policy_loss=policy_loss, **{**options, **values})


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        # HAF-RM, arXiv 2407.04185, with the weights of its released code: not a convex sum.
        _preset("haf", "dpo", alpha=0.2),
        _preset("bt"),
        _preset("normbt", reward_loss="normbt"),  # arXiv 2512.06343
        _preset("bsr", sum_to_zero=1e-3),  # arXiv 2505.07271
        # GRM, arXiv 2406.10216: (1 - a) L_BT + a L_regulariser, a = 0.01.
        _preset("grm-sft", "sft-logsigmoid", reward_weight=0.99, alpha=0.01),
        _preset("grm-dpo", "dpo", reward_weight=0.99, alpha=0.01),
        _preset("grm-dpo-noref", "dpo-noref", reward_weight=0.99, alpha=0.01),
        # Policies alone, scored by their implicit reward.
        *(
            _preset(loss, loss, reward_weight=0.0, alpha=1.0)
            for loss in POLICY_LOSSES
            if loss != "sft-logsigmoid"  # GRM's regulariser
        ),
    )
}


def get_method(name: str, **overrides: Any) -> Method:
    """The preset `name` with overrides that are not None; another policy loss brings its own beta, gamma.

    Raises ConfigError for an unknown name, and for an option that this method does not use.
    """
    values = {key: value for key, value in overrides.items() if value is not None}
    names = {"name": METHODS, "policy_loss": POLICY_LOSSES, "reward_loss": REWARD_LOSSES}
    for key, allowed in names.items():
        value = {"name": name, **values}.get(key)
        if value is not None and value not in allowed:
            hint = did_you_mean(value, allowed)
            raise ConfigError(f"unknown method.{key} {value!r}; {hint}one of: {', '.join(allowed)}")
    preset = METHODS[name]
    policy_loss = values.get("policy_loss", preset.policy_loss)
    if policy_loss != preset.policy_loss:
        shared = ("reward_weight", "alpha", "reward_loss", "sum_to_zero")
        preset = _preset(name, policy_loss, **{key: getattr(preset, key) for key in shared})
    method = replace(preset, **values)
    used = {"reward_weight", "policy_loss"}  # whatever the weights are
    if method.trains_reward:
        used |= {"label_smoothing", "centering", "reward_loss", "sum_to_zero"}
    if method.policy_loss is not None:
        used |= {"alpha", *POLICY_LOSSES[method.policy_loss].options}
    for key, value in values.items():
        if key not in used and value != getattr(preset, key):
            raise ConfigError(
                f"method.{key} is set to {value!r}, but method {name!r} uses {', '.join(sorted(used))} "
                f"alone: remove method.{key}, or use another method"
            )
    if "policy_loss" in values and "alpha" not in values and method.alpha == 0:
        raise ConfigError(
            f"method {name!r} has alpha 0: with method.policy_loss, set method.alpha too (paper: 0.2)"
        )
    return method


def resolve_method(recipe: Recipe) -> Method:
    """The recipe's method with its overrides; raises ConfigError as `get_method` does."""
    section = recipe.method.model_dump()
    return get_method(section.pop("name"), **section)


class StepStatistics(NamedTuple):
    """What a reward loss reads from a whole optimiser step; constants for the gradient."""

    distances: PerComparison  # ||h_chosen - h_rejected|| in this micro-batch
    mean_distance: Float[Tensor, ""]  # running mean over steps
    mean_reward: Float[Tensor, ""]  # over all responses compared in the step, on all ranks
    num_comparisons: int  # of the step, on all ranks


class JointLoss(NamedTuple):
    """The loss of each comparison and its parts."""

    total: PerComparison  # trained on: both parts, times the comparison's weight
    reward: PerComparison | None  # unweighted, for logging
    policy: PerComparison | None


def joint_loss(
    method: Method,
    *,
    rewards: tuple[PerComparison, PerComparison] | None = None,
    logps: PolicyLogps | None = None,
    margins: PerComparison | None = None,
    weights: PerComparison | None = None,
    step: StepStatistics | None = None,
) -> JointLoss:
    """The method's loss per comparison (nat), not reduced; `rewards` are (chosen, rejected)."""
    reward = policy = None
    total: Tensor | float = 0.0
    if method.trains_reward:
        assert rewards is not None
        smoothing, centering = method.label_smoothing, method.centering
        reward = losses.reward_loss(
            *rewards, margin=margins, label_smoothing=smoothing, centering=centering
        )
        if method.reads_step:
            assert step is not None
            if method.reward_loss == "normbt":
                reward = reward * losses.distance_weights(step.distances, step.mean_distance)
            if method.sum_to_zero:
                penalty = losses.sum_to_zero_loss(*rewards, step.mean_reward, step.num_comparisons)
                reward = reward + method.sum_to_zero * penalty
        total = method.reward_weight * reward
    if method.trains_policy:
        assert logps is not None
        loss = POLICY_LOSSES[method.policy_loss or ""]
        options = {option: getattr(method, option) for option in loss.options}
        policy = loss.function(logps, **options)
        # arXiv 2407.04185: L = L_reward + alpha * L_policy
        total = total + method.alpha * policy
    assert isinstance(total, Tensor)
    return JointLoss(total if weights is None else weights * total, reward, policy)
