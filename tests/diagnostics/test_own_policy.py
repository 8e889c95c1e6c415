"""Whose continuations a reward model prefers, counted by hand; and what policies write."""

import numpy as np
import pytest
import torch

from hafrm.diagnostics.model_runs import as_continuation
from hafrm.diagnostics.own_policy import (
    Continuation,
    fraction_higher,
    policy_text,
    reward_preferences,
)
from hafrm.engine.sampling import Sampling, sample
from models_for_tests import tiny_causal_lm, token_groups

PROMPTS = [
    group.prompt_ids.tolist()
    for group in token_groups([(9, (1,)), (2, (1,)), (5, (1,)), (9, (1,))])
]
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
EOS, PAD = 2, 0


@pytest.fixture(scope="module")
def policy():
    return tiny_causal_lm("llama")


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
    found = policy_text("p", [Continuation((4, 5, 6), ended=True), Continuation((4,), ended=False)])
    assert (found.mean_tokens, found.ended.value) == (2.0, 0.5)


def write(
    policy, prompts: list[list[int]], options: Sampling, eos: int = EOS
) -> list[Continuation]:
    written = sample(policy, prompts, 1, options, eos=eos, pad=PAD, seed=0)
    return [as_continuation(ids, eos, PAD) for (ids,) in written]


def plain_greedy(policy, prompt: list[int], num: int) -> list[int]:
    """Token by token, no cache, no padding."""
    ids = list(prompt)
    for _ in range(num):
        with torch.no_grad():
            ids.append(int(policy(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return [i for i in ids[len(prompt) :] if i not in (EOS, PAD)]


def test_padded_batches_write_what_one_prompt_at_a_time_writes(policy) -> None:
    found = write(policy, PROMPTS, GREEDY)
    for prompt, written in zip(PROMPTS, found, strict=True):
        assert list(written.ids) == plain_greedy(policy, prompt, 12)


def test_the_same_call_draws_the_same(policy) -> None:
    first = write(policy, PROMPTS, Sampling(max_new_tokens=8))
    assert write(policy, PROMPTS, Sampling(max_new_tokens=8)) == first


def test_a_checkpoint_s_own_settings_and_its_last_eos_are_not_used(policy) -> None:
    """Every token is an EOS of somebody; ours is what ends a continuation."""
    policy.generation_config.max_new_tokens = 3
    policy.generation_config.repetition_penalty = 9.0
    found = write(policy, PROMPTS, GREEDY)
    assert list(found[0].ids) == plain_greedy(policy, PROMPTS[0], 12)
    first = found[0].ids[1]
    cut = write(policy, PROMPTS[:1], GREEDY, eos=first)[0]
    assert cut.ended
    assert cut.ids == found[0].ids[: found[0].ids.index(first)]
