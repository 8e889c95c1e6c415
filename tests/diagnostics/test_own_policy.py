"""Whose continuations a reward model prefers, counted by hand."""

import numpy as np

from hafrm.diagnostics.own_policy import (
    Continuation,
    fraction_higher,
    policy_text,
    reward_preferences,
)


def test_equal_rewards_are_half() -> None:
    """Higher, equal, lower, higher: 2.5 of 4."""
    found = fraction_higher(np.array([2.0, 1, 0, 5]), np.array([1.0, 1, 1, 1]))
    assert found.value == 2.5 / 4
    assert fraction_higher(np.array([2.0, 0.0]), np.ones(2)).method == "wilson"


def test_the_fractions_of_two_policies_by_hand() -> None:
    """Own rewards 3, 1, 2, 4 against 1, 2, 2, 0: 2.5 of 4. Lengths 10, 8, 4, 10 against 8, 8, 9, 2: the
    first two are of like length (ratios 1.25 and 1), one of them won; longer are the first and last, and
    one is equal."""
    rewards = {"base": np.array([1.0, 2, 2, 0]), "own": np.array([3.0, 1, 2, 4])}
    lengths = {"base": np.array([8, 8, 9, 2]), "own": np.array([10, 8, 4, 10])}
    (found,) = reward_preferences("own", rewards, lengths)
    assert (found.reward_model, found.policy, found.against, found.is_own) == (
        "own",
        "own",
        "base",
        True,
    )
    assert found.win.value == 2.5 / 4
    assert (found.length_matched.value, found.length_matched.num) == (0.5, 2)
    assert found.longer.value == 2.5 / 4


def test_a_reward_model_puts_its_own_policy_first_and_scores_the_others_too() -> None:
    rewards = {name: np.array([k, 1.5]) for k, name in enumerate(["a", "b", "c"])}
    lengths = {name: np.array([3, 3]) for name in rewards}
    found = reward_preferences("b", rewards, lengths)
    assert [(w.policy, w.against, w.is_own) for w in found] == [
        *(("b", "a", True), ("b", "c", True), ("a", "c", False))
    ]
    assert not any(w.is_own for w in reward_preferences("another", rewards, lengths))


def test_what_a_policy_wrote_in_numbers() -> None:
    found = policy_text(
        "p", [Continuation("abc", 3, ended=True), Continuation("a", 1, ended=False)]
    )
    assert (found.mean_tokens, found.ended.value) == (2.0, 0.5)
