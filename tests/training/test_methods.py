"""Presets, their overrides and errors, and the joint loss."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hafrm.errors import ConfigError
from hafrm.training import losses
from hafrm.training.losses import PolicyLogps
from hafrm.training.methods import (
    METHODS,
    POLICY_LOSSES,
    Method,
    StepStatistics,
    get_method,
    joint_loss,
)


def rewards() -> tuple[Tensor, Tensor]:
    return torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.0, 0.5, 1.5])


def logps(*, reference: bool = True) -> PolicyLogps:
    return PolicyLogps(
        torch.tensor([-10.0, -30.0, -4.0]),
        torch.tensor([-20.0, -25.0, -6.0]),
        torch.tensor([5, 10, 2]),
        torch.tensor([8, 9, 3]),
        torch.tensor([-12.0, -29.0, -4.5]) if reference else None,
        torch.tensor([-15.0, -26.0, -5.0]) if reference else None,
    )


def step_view() -> StepStatistics:
    return StepStatistics(torch.tensor([1.0, 2.0, 4.0]), torch.tensor(2.0), torch.tensor(0.5), 3)


# Presets.


def test_haf_has_the_papers_weights() -> None:
    haf = get_method("haf")
    assert (haf.reward_weight, haf.alpha, haf.beta, haf.policy_loss) == (1.0, 0.2, 0.1, "dpo")
    assert haf.trains_reward
    assert haf.trains_policy
    assert haf.needs_reference
    assert haf.scores_with == "reward"


@pytest.mark.parametrize("name", ["grm-sft", "grm-dpo", "grm-dpo-noref"])
def test_grm_is_a_convex_sum(name: str) -> None:
    method = get_method(name)
    assert method.reward_weight + method.alpha == pytest.approx(1.0)
    assert method.alpha == 0.01


@pytest.mark.parametrize(
    ("name", "reward", "policy", "reference", "scores_with"),
    [
        ("haf", True, True, True, "reward"),
        ("bt", True, False, False, "reward"),
        ("normbt", True, False, False, "reward"),
        ("bsr", True, False, False, "reward"),
        ("grm-sft", True, True, False, "reward"),
        ("grm-dpo", True, True, True, "reward"),
        ("grm-dpo-noref", True, True, False, "reward"),
        ("dpo", False, True, True, "implicit"),
        ("dpo-noref", False, True, False, "implicit"),
        ("ipo", False, True, True, "implicit"),
        ("kto", False, True, True, "implicit"),
        ("simpo", False, True, False, "implicit"),
        ("orpo", False, True, False, "implicit"),
        ("sft", False, True, False, "implicit"),
    ],
)
def test_presets_say_what_they_need(
    name: str, reward: bool, policy: bool, reference: bool, scores_with: str
) -> None:
    method = get_method(name)
    got = (method.trains_reward, method.trains_policy, method.needs_reference, method.scores_with)
    assert got == (reward, policy, reference, scores_with)


# Overrides.


def test_an_override_replaces_a_value_and_none_keeps_it() -> None:
    method = get_method("haf", alpha=0.5, beta=None, gamma=None)
    assert (method.alpha, method.beta) == (0.5, 0.1)


def test_another_policy_loss_brings_its_own_options() -> None:
    method = get_method("haf", policy_loss="simpo")
    assert (method.alpha, method.beta, method.gamma) == (0.2, 2.0, 1.0)
    assert not method.needs_reference
    assert get_method("haf", policy_loss="simpo", beta=10.0).beta == 10.0


def test_alpha_zero_switches_the_policy_off_but_not_its_scores() -> None:
    method = get_method("haf", alpha=0.0)
    assert not method.trains_policy
    assert not method.needs_reference
    assert method.scores_against_reference


def test_an_unknown_method_is_answered_with_a_suggestion_and_the_list() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown method.name 'gmr-sft'; did you mean 'grm-sft'\?"
    ):
        get_method("gmr-sft")
    with pytest.raises(ConfigError, match=r"one of: haf, bt, normbt, bsr, grm-sft"):
        get_method("something else entirely")


@pytest.mark.parametrize(
    ("name", "options", "suggestion"),
    [
        ("haf", {"alhpa": 0.1}, "alpha"),
        ("haf", {"reward_loss": "norm-bt"}, "normbt"),
        ("haf", {"policy_loss": "simp"}, "simpo"),
    ],
)
def test_an_unknown_option_or_loss_is_answered_with_a_suggestion(name, options, suggestion) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{suggestion}'"):
        get_method(name, **options)


def test_another_policy_loss_leaves_the_reward_loss_as_it_is() -> None:
    method = get_method("normbt", policy_loss="sft", alpha=0.1)
    assert (method.reward_loss, method.policy_loss) == ("normbt", "sft")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("bt", "beta", 0.3),
        ("haf", "gamma", 0.5),
        ("ipo", "label_smoothing", 0.1),
        ("dpo", "centering", 0.01),
        ("dpo", "sum_to_zero", 0.01),
        ("sft", "beta", 0.1),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(
        ConfigError, match=f"method.{option} is set to {value}, but method '{name}'"
    ):
        get_method(name, **{option: value})


def test_a_policy_loss_without_a_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set method\.alpha too"):
        get_method("bt", policy_loss="dpo")
    assert get_method("bt", policy_loss="dpo", alpha=0.2).needs_reference
    with pytest.raises(ConfigError, match=r"no policy loss to weigh"):
        get_method("bt", alpha=0.2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alpha", -0.1),
        ("alpha", math.nan),
        ("reward_weight", math.inf),
        ("beta", 0.0),
        ("label_smoothing", 0.5),
        ("centering", -1.0),
        ("sum_to_zero", -1.0),
    ],
)
def test_values_that_make_no_objective_are_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"method.{option} is"):
        get_method("haf", **{option: value})


def test_a_method_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="would train nothing"):
        get_method("dpo", alpha=0.0)


def test_a_method_of_ones_own_needs_no_registration() -> None:
    method = Method(name="mine", reward_weight=0.5, alpha=0.5, policy_loss="kto", beta=0.1)
    assert joint_loss(method, rewards=rewards(), logps=logps()).total.shape == (3,)


# The joint loss.


def test_the_joint_loss_is_the_weighted_sum_of_its_parts() -> None:
    loss = joint_loss(get_method("haf"), rewards=rewards(), logps=logps())
    reward = losses.reward_loss(*rewards())
    policy = losses.dpo_loss(logps(), beta=0.1)
    torch.testing.assert_close(loss.total, reward + 0.2 * policy)
    assert torch.equal(loss.reward, reward)
    assert torch.equal(loss.policy, policy)


def test_normbt_and_the_sum_to_zero_penalty_enter_the_reward_part() -> None:
    """Factors 2, 1 and 1/2; the penalty's parts are 3 * (2 * 0.5 * s - 0.25), s = 0.5, 0 and 1.75."""
    method = get_method("haf", reward_loss="normbt", sum_to_zero=0.1)
    loss = joint_loss(method, rewards=rewards(), logps=logps(), step=step_view())
    expected = torch.tensor([2.0, 1.0, 0.5]) * losses.reward_loss(*rewards())
    expected += 0.1 * torch.tensor([0.75, -0.75, 4.5])
    torch.testing.assert_close(loss.reward, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        loss.total, expected + 0.2 * losses.dpo_loss(logps(), beta=0.1), atol=1e-5, rtol=0
    )


def test_the_first_joint_loss_by_hand() -> None:
    """Gap 1: softplus(-1) = 0.313262. Log-ratios +2, -5: softplus(-0.7) = 0.403186; * 0.2 = 0.080637."""
    loss = joint_loss(get_method("haf"), rewards=rewards(), logps=logps())
    assert loss.total[0].item() == pytest.approx(0.313262 + 0.080637, abs=2e-6)


def test_alpha_zero_is_bit_for_bit_bradley_terry() -> None:
    haf = joint_loss(get_method("haf", alpha=0.0), rewards=rewards(), logps=logps())
    bt = joint_loss(get_method("bt"), rewards=rewards())
    assert torch.equal(haf.total, bt.total)
    assert haf.policy is None
    assert bt.policy is None


def test_weights_scale_the_total_and_leave_the_parts() -> None:
    weights = torch.tensor([0.0, 1.0, 2.5])
    plain = joint_loss(get_method("haf"), rewards=rewards(), logps=logps())
    weighted = joint_loss(get_method("haf"), rewards=rewards(), logps=logps(), weights=weights)
    torch.testing.assert_close(weighted.total, weights * plain.total)
    assert torch.equal(weighted.reward, plain.reward)


def test_margins_smoothing_and_centering_reach_the_reward_loss() -> None:
    margins = torch.tensor([0.1, 0.2, 0.3])
    method = get_method("bt", label_smoothing=0.1, centering=0.01)
    expected = losses.reward_loss(*rewards(), margin=margins, label_smoothing=0.1, centering=0.01)
    assert torch.equal(joint_loss(method, rewards=rewards(), margins=margins).total, expected)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_needs_no_more_than_it_says(name: str) -> None:
    method = get_method(name)
    loss = joint_loss(
        method,
        rewards=rewards() if method.trains_reward else None,
        logps=logps(reference=method.needs_reference) if method.trains_policy else None,
        step=step_view() if method.reads_step else None,
    )
    assert torch.isfinite(loss.total).all()
    assert (loss.reward is None) != method.trains_reward
    assert (loss.policy is None) != method.trains_policy


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_policy_loss_is_called_with_the_methods_options(name: str) -> None:
    options = {key: 1.5 * value + 0.01 for key, value in POLICY_LOSSES[name].options.items()}
    method = Method(name="mine", reward_weight=0.0, alpha=1.0, policy_loss=name, **options)
    expected = POLICY_LOSSES[name].function(logps(), **options)
    assert torch.equal(joint_loss(method, logps=logps()).total, expected)


def test_the_joint_gradient_is_the_sum_of_both() -> None:
    method = get_method("haf")
    given, (chosen, rejected) = logps(), rewards()
    chosen.requires_grad_()
    given.chosen_logps.requires_grad_()
    joint_loss(method, rewards=(chosen, rejected), logps=given).total.sum().backward()
    # d/dr_c = -sigmoid(-gap); d/dlogp_c = -alpha * beta * sigmoid(-beta * difference of log-ratios).
    torch.testing.assert_close(chosen.grad, -torch.sigmoid(rejected - chosen.detach()))
    gap = (given.chosen_logps - given.reference_chosen_logps).detach() - (
        given.rejected_logps - given.reference_rejected_logps
    )
    torch.testing.assert_close(given.chosen_logps.grad, -0.2 * 0.1 * torch.sigmoid(-0.1 * gap))


# Implicit rewards.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("haf", 0.1 * (-10 + 12)),
        ("dpo", 0.1 * (-10 + 12)),
        ("kto", 0.1 * (-10 + 12)),
        ("ipo", 0.1 * (-10 + 12) / 5),
        ("simpo", 2.0 * -10 / 5),
        ("orpo", 0.1 * -10 / 5),
        ("sft", -10 / 5),
        ("grm-dpo-noref", 0.1 * -10),
        ("grm-sft", 0.1 * -10),
        ("bt", -10 + 12),
    ],
)
def test_the_implicit_reward_is_what_the_loss_tells_responses_apart_by(
    name: str, expected: float
) -> None:
    """One response of 5 tokens, log-prob -10, reference -12."""
    method = get_method(name)
    got = method.implicit_rewards(torch.tensor([-10.0]), torch.tensor([5]), torch.tensor([-12.0]))
    assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["dpo", "dpo-noref", "ipo", "simpo"])
def test_pairwise_losses_depend_on_the_difference_of_implicit_rewards_alone(name: str) -> None:
    """Both log-probs are moved so that both implicit rewards rise by 0.3: the loss must not notice."""
    entry, given = POLICY_LOSSES[name], logps()
    method = Method(name="mine", reward_weight=0.0, alpha=1.0, policy_loss=name, **entry.options)
    rise = 0.3 / method.beta
    one = torch.ones_like(given.chosen_counts)
    moved = replace(
        given,
        chosen_logps=given.chosen_logps + rise * (given.chosen_counts if entry.per_token else one),
        rejected_logps=given.rejected_logps
        + rise * (given.rejected_counts if entry.per_token else one),
    )
    before, after = (
        method.implicit_rewards(each.chosen_logps, each.chosen_counts, each.reference_chosen_logps)
        for each in (given, moved)
    )
    torch.testing.assert_close(after - before, torch.full((3,), 0.3))
    torch.testing.assert_close(
        joint_loss(method, logps=moved).total, joint_loss(method, logps=given).total
    )


def test_an_implicit_reward_without_its_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match="compares with the reference"):
        get_method("dpo").implicit_rewards(torch.tensor([-10.0]), torch.tensor([5]))
    assert get_method("sft").implicit_rewards(torch.tensor([-10.0]), torch.tensor([5])).item() == -2
