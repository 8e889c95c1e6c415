"""Presets, their overrides and errors, and the joint loss."""

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


def test_presets_have_their_papers_weights_and_grm_is_a_convex_sum() -> None:
    haf = get_method("haf")
    assert (haf.reward_weight, haf.alpha, haf.beta, haf.policy_loss) == (1.0, 0.2, 0.1, "dpo")
    for name in ("grm-sft", "grm-dpo", "grm-dpo-noref"):
        method = get_method(name)
        assert (method.reward_weight, method.alpha) == (0.99, 0.01)


@pytest.mark.parametrize(
    ("names", "needs"),
    [
        ("bt normbt bsr", {"reward"}),
        ("grm-sft grm-dpo-noref", {"reward", "policy"}),
        ("haf grm-dpo", {"reward", "policy", "reference"}),
        ("dpo dpo-logits dpo-likelihood ipo kto", {"policy", "reference"}),
        ("dpo-noref simpo orpo sft", {"policy"}),
    ],
)
def test_presets_say_what_they_need(names: str, needs: set[str]) -> None:
    for method in map(get_method, names.split()):
        assert method.trains_reward == ("reward" in needs)
        assert method.trains_policy == ("policy" in needs)
        assert method.needs_reference == ("reference" in needs)
        assert method.scores_with == ("reward" if "reward" in needs else "implicit")


def test_an_override_replaces_a_value_none_keeps_it_and_another_loss_brings_its_own_options():
    method = get_method("haf", alpha=0.5, beta=None, gamma=None)
    assert (method.alpha, method.beta) == (0.5, 0.1)
    simpo = get_method("haf", policy_loss="simpo")
    assert (simpo.alpha, simpo.beta, simpo.gamma) == (0.2, 2.0, 1.0)
    assert not simpo.needs_reference
    assert get_method("haf", policy_loss="simpo", beta=10.0).beta == 10.0
    other = get_method("normbt", policy_loss="sft", alpha=0.1)
    assert (other.reward_loss, other.policy_loss) == ("normbt", "sft")


def test_alpha_zero_is_bit_for_bit_bradley_terry_whose_policy_still_scores() -> None:
    method = get_method("haf", alpha=0.0)
    assert not method.trains_policy
    assert not method.needs_reference
    assert method.scores_against_reference
    haf = joint_loss(method, rewards=rewards(), logps=logps())
    bt = joint_loss(get_method("bt"), rewards=rewards())
    assert torch.equal(haf.total, bt.total)
    assert haf.policy is bt.policy is None


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gmr-sft", {}, r"unknown method.name 'gmr-sft'; did you mean grm-sft\?"),
        ("something else entirely", {}, "one of: haf, bt, normbt, bsr, grm-sft"),
        ("haf", {"reward_loss": "norm-bt"}, "did you mean normbt"),
        # options that would do nothing
        ("bt", {"beta": 0.3}, "method.beta is set to 0.3, but method 'bt'"),
        ("haf", {"gamma": 0.5}, "method.gamma is set to"),
        ("dpo", {"centering": 0.01}, "method.centering is set to"),
        ("bt", {"policy_loss": "dpo"}, r"set method\.alpha too"),
        ("bt", {"alpha": 0.2}, "no policy loss to weigh"),
        ("dpo", {"alpha": 0.0}, "would train nothing"),
    ],
)
def test_what_makes_no_method_is_refused_with_the_fix(name, options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        get_method(name, **options)


def test_the_joint_loss_is_the_weighted_sum_of_its_parts() -> None:
    """Gap 1: softplus(-1) = 0.313262. Log-ratios +2, -5: softplus(-0.7) = 0.403186; * 0.2 = 0.080637.
    A comparison's weight scales its total alone."""
    loss = joint_loss(get_method("haf"), rewards=rewards(), logps=logps())
    reward = losses.reward_loss(*rewards())
    policy = losses.dpo_loss(logps(), beta=0.1)
    torch.testing.assert_close(loss.total, reward + 0.2 * policy)
    assert loss.total[0].item() == pytest.approx(0.313262 + 0.080637, abs=2e-6)
    assert torch.equal(loss.reward, reward)
    assert torch.equal(loss.policy, policy)
    weights = torch.tensor([0.0, 1.0, 2.5])
    weighted = joint_loss(get_method("haf"), rewards=rewards(), logps=logps(), weights=weights)
    torch.testing.assert_close(weighted.total, weights * loss.total)
    assert torch.equal(weighted.reward, reward)


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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("haf dpo kto", 0.1 * (-10 + 12)),
        ("ipo", 0.1 * (-10 + 12) / 5),
        ("simpo", 2.0 * -10 / 5),
        ("orpo", 0.1 * -10 / 5),
        ("sft", -10 / 5),
        ("grm-dpo-noref grm-sft", 0.1 * -10),
        ("bt", -10 + 12),
    ],
)
def test_the_implicit_reward_is_what_the_loss_tells_responses_apart_by(names, expected) -> None:
    """One response of 5 tokens, log-prob -10, reference -12."""
    for method in map(get_method, names.split()):
        inputs = torch.tensor([-10.0]), torch.tensor([5]), torch.tensor([-12.0])
        assert method.implicit_rewards(*inputs).item() == pytest.approx(expected)
