"""Methods: named objectives, each a preset of reward loss, policy loss and their weights.

A new policy loss is one function in `losses` and one entry in POLICY_LOSSES; a new method is one entry in
METHODS. No other code asks for a method's name. `joint_loss` adds the two losses up, per comparison.
"""

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from hafrm.errors import ConfigError
from hafrm.recipe import Recipe
from hafrm.training import losses
from hafrm.training.losses import PolicyLogps


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A loss on the policy head, what it needs, and how its policy scores a response by itself."""

    function: Callable[..., Float[Tensor, " comparisons"]]
    options: Mapping[str, float] = field(default_factory=dict)  # with its paper's or TRL's values
    needs_reference: bool = True
    per_token: bool = False  # the loss compares log-probs per token, so the implicit reward does


POLICY_LOSSES: Mapping[str, PolicyLoss] = {
    "dpo": PolicyLoss(losses.dpo_loss, {"beta": 0.1, "label_smoothing": 0.0}),
    "dpo-noref": PolicyLoss(
        losses.reference_free_dpo_loss,
        {"beta": 0.1, "label_smoothing": 0.0},
        needs_reference=False,
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
    """L = reward_weight * L_reward + alpha * L_policy, per comparison.

    Raises ConfigError for a value that makes no objective.
    """

    name: str
    reward_weight: float = 1.0  # 0 trains the policy only; GRM's convex sum takes 1 - alpha
    alpha: float = (
        0.0  # factor on the policy loss; 0 trains the reward only; the paper's code takes 0.2
    )
    policy_loss: str | None = None  # a key of POLICY_LOSSES
    beta: float = (
        1.0  # the policy loss's temperature (the paper's tau), and the implicit reward's factor
    )
    gamma: float = 0.0  # SimPO's target margin, in units of beta * log-prob per token
    label_smoothing: float = (
        0.0  # assumed probability of a wrong label, in the reward loss and in DPO's
    )
    centering: float = 0.0  # factor on (chosen + rejected)^2; TRL suggests 0.01
    reward_loss: str = "bt"  # one of REWARD_LOSSES
    sum_to_zero: float = 0.0  # factor on BSR's penalty; BSR takes 0.001

    def __post_init__(self) -> None:
        for name in ("reward_weight", "alpha", "gamma", "centering", "sum_to_zero"):
            self._require(name, lambda value: 0 <= value < math.inf, "a finite number >= 0")
        self._require("beta", lambda value: 0 < value < math.inf, "a finite number > 0")
        self._require("label_smoothing", lambda value: 0 <= value < 0.5, "at least 0, under 0.5")
        if self.policy_loss is not None and self.policy_loss not in POLICY_LOSSES:
            raise ConfigError(_unknown("method.policy_loss", self.policy_loss, POLICY_LOSSES))
        if self.reward_loss not in REWARD_LOSSES:
            raise ConfigError(_unknown("method.reward_loss", self.reward_loss, REWARD_LOSSES))
        if self.alpha > 0 and self.policy_loss is None:
            raise ConfigError(
                f"method.alpha is {self.alpha}, but method {self.name!r} has no policy loss to weigh: "
                f"set method.policy_loss to one of {', '.join(POLICY_LOSSES)}, or take method haf"
            )
        if not (self.trains_reward or self.trains_policy):
            raise ConfigError(
                f"method {self.name!r} would train nothing: method.reward_weight and method.alpha are "
                "both 0; set one of them above 0"
            )

    def _require(self, name: str, allowed: Callable[[float], bool], words: str) -> None:
        value = getattr(self, name)
        if not allowed(value):
            raise ConfigError(f"method.{name} is {value!r}; it must be {words}")

    @property
    def trains_reward(self) -> bool:
        return self.reward_weight > 0

    @property
    def trains_policy(self) -> bool:
        return self.alpha > 0 and self.policy_loss is not None

    @property
    def reads_step(self) -> bool:
        """Whether the reward loss reads numbers of the whole step: its mean reward, or its distances."""
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

    def implicit_rewards(
        self,
        logps: Float[Tensor, " responses"],
        counts: Int[Tensor, " responses"],
        reference_logps: Float[Tensor, " responses"] | None = None,
    ) -> Float[Tensor, " responses"]:
        """The policy's score of each response: the quantity that its loss compares. A method without policy
        loss scores as DPO with its beta. Raises ConfigError where a reference is needed and missing."""
        if self.scores_against_reference and reference_logps is None:
            raise ConfigError(
                f"the implicit reward of method {self.name!r} compares with the reference, whose "
                "log-probs are missing: compute them with the starting checkpoint"
            )
        return losses.implicit_rewards(
            logps,
            reference_logps if self.scores_against_reference else None,
            self.beta,
            counts if self.scores_per_token else None,
        )


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
            for loss in ("dpo", "dpo-noref", "ipo", "simpo", "orpo", "kto", "sft")
        ),
    )
}


def get_method(name: str, **overrides: Any) -> Method:
    """The preset `name` with some values replaced; an override of None keeps the preset's value.

    Another `policy_loss` brings its own beta and gamma unless they are given too: SimPO's beta is not
    DPO's. Raises ConfigError for an unknown name, an unknown option, a value that is not allowed, and an
    option that this method would not use.
    """
    if name not in METHODS:
        raise ConfigError(_unknown("method.name", name, METHODS))
    values = {key: value for key, value in overrides.items() if value is not None}
    preset = METHODS[name]
    policy_loss = values.get("policy_loss", preset.policy_loss)
    if policy_loss != preset.policy_loss:
        if policy_loss not in POLICY_LOSSES:
            raise ConfigError(_unknown("method.policy_loss", str(policy_loss), POLICY_LOSSES))
        shared = ("reward_weight", "alpha", "reward_loss", "sum_to_zero")
        preset = _preset(name, policy_loss, **{key: getattr(preset, key) for key in shared})
    allowed = [f.name for f in fields(Method) if f.name != "name"]
    for key in values:
        if key not in allowed:
            raise ConfigError(_unknown("option of method", key, allowed))
    method = replace(preset, **values)
    used = _options_in_use(method)
    for key, value in values.items():
        if key not in used and value != getattr(preset, key):
            raise ConfigError(
                f"method.{key} is set to {value!r}, but method {name!r} does not use it (it uses "
                f"{', '.join(sorted(used))}): remove method.{key}, or use another method"
            )
    if "policy_loss" in values and "alpha" not in values and method.alpha == 0:
        raise ConfigError(
            f"method.policy_loss is {method.policy_loss!r}, but method {name!r} has alpha 0: set "
            "method.alpha too (the paper's is 0.2)"
        )
    return method


def resolve_method(recipe: Recipe) -> Method:
    """The recipe's method with its overrides; raises ConfigError as `get_method` does."""
    section = recipe.method.model_dump()
    return get_method(section.pop("name"), **section)


def _options_in_use(method: Method) -> set[str]:
    """The fields that change what the method computes, its weights taken as if they were not 0."""
    used = {"reward_weight", "policy_loss"}
    if method.trains_reward:
        used |= {"label_smoothing", "centering", "reward_loss", "sum_to_zero"}
    if method.policy_loss is not None:
        used |= {"alpha", *POLICY_LOSSES[method.policy_loss].options}
    return used


def _unknown(what: str, value: str, allowed: Collection[str]) -> str:
    close = difflib.get_close_matches(value, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {value!r}{hint} (one of: {', '.join(allowed)})"


class StepStatistics(NamedTuple):
    """What a reward loss reads of a whole optimiser step; constants for the gradient."""

    distances: Float[Tensor, " comparisons"]  # ||h_chosen - h_rejected|| in this micro-batch
    mean_distance: Float[Tensor, ""]  # running mean over steps
    mean_reward: Float[Tensor, ""]  # over all responses compared in the step, on all ranks
    num_comparisons: int  # of the step, on all ranks


class JointLoss(NamedTuple):
    """The loss of each comparison and its parts."""

    total: Float[Tensor, " comparisons"]  # trained on: both parts, times the comparison's weight
    reward: (
        Float[Tensor, " comparisons"] | None
    )  # unweighted, for logging; None where there is none
    policy: Float[Tensor, " comparisons"] | None


def joint_loss(
    method: Method,
    *,
    rewards: tuple[Float[Tensor, " comparisons"], Float[Tensor, " comparisons"]] | None = None,
    logps: PolicyLogps | None = None,
    margins: Float[Tensor, " comparisons"] | None = None,
    weights: Float[Tensor, " comparisons"] | None = None,
    step: StepStatistics | None = None,
) -> JointLoss:
    """The method's loss per comparison (nat), not reduced; `rewards` are (chosen, rejected).

    Rewards and log-probs that the method does not train on may be None, and are not read.
    """
    reward = policy = None
    total: Tensor | float = 0.0
    if method.trains_reward:
        assert rewards is not None, f"method {method.name} trains rewards, but got none"
        reward = _reward_part(method, rewards, margins, step)
        total = method.reward_weight * reward
    if method.trains_policy:
        assert logps is not None, f"method {method.name} trains the policy, but got no log-probs"
        assert method.policy_loss is not None
        loss = POLICY_LOSSES[method.policy_loss]
        policy = loss.function(
            logps, **{option: getattr(method, option) for option in loss.options}
        )
        # arXiv 2407.04185: L = L_reward + alpha * L_policy
        total = total + method.alpha * policy
    assert isinstance(total, Tensor), "a method trains at least one of the two"
    return JointLoss(total if weights is None else weights * total, reward, policy)


def _reward_part(
    method: Method,
    rewards: tuple[Float[Tensor, " comparisons"], Float[Tensor, " comparisons"]],
    margins: Float[Tensor, " comparisons"] | None,
    step: StepStatistics | None,
) -> Float[Tensor, " comparisons"]:
    loss = losses.reward_loss(
        *rewards,
        margin=margins,
        label_smoothing=method.label_smoothing,
        centering=method.centering,
    )
    if not method.reads_step:
        return loss
    assert step is not None, f"method {method.name} needs the statistics of the whole step"
    if method.reward_loss == "normbt":
        loss = loss * losses.distance_weights(step.distances, step.mean_distance)
    if method.sum_to_zero:
        penalty = losses.sum_to_zero_loss(*rewards, step.mean_reward, step.num_comparisons)
        loss = loss + method.sum_to_zero * penalty
    return loss
