"""The made-up world: seeded, disjoint, judged by a gold reward that knows right from wrong."""

import numpy as np
import pytest

from hafrm.data.reader import read_preferences
from hafrm.demo.gold import gold_reward
from hafrm.demo.world import TEST_SETS, Rules, Sizes, make_world, pretraining_texts, write_world
from hafrm.errors import ConfigError

SMALL = Sizes(train=400, validation=60, test=80)


@pytest.fixture(scope="module")
def world():
    return make_world(0, SMALL)


def sides(group):
    comparison = group.comparisons[0]
    return group.responses[comparison.chosen], group.responses[comparison.rejected]


def test_a_seed_makes_one_world_and_another_seed_another(world):
    assert make_world(0, SMALL) == world
    assert make_world(1, SMALL) != world


def test_no_two_parts_share_a_prompt_and_pretraining_has_no_test_prompt(world):
    train = {g.prompt for g in world.train}
    validation = {g.prompt for g in world.validation}
    test = {g.prompt for groups in world.test.values() for g in groups}
    assert not train & validation
    assert not (train | validation) & test
    asked = {conversation[:-1] for conversation in pretraining_texts(0, 300)}
    assert not asked & test


def test_test_labels_are_gold_and_training_labels_are_noisy(world):
    for groups in world.test.values():
        for group in groups:
            chosen, rejected = sides(group)
            assert gold_reward(group.prompt, chosen) > gold_reward(group.prompt, rejected)
    right = [
        gold_reward(g.prompt, a) > gold_reward(g.prompt, b)
        for g in world.train
        for a, b in [sides(g)]
    ]
    assert 0.6 < np.mean(right) < 0.95


def test_length_helps_in_domain_and_misleads_out_of_domain(world):
    """Shares of 0.55 and 0.3 over 160 pairs each: three standard errors are 0.12."""

    def longer_wins(names):
        pairs = [sides(g) for name in names for g in world.test[name]]
        return np.mean([len(a.split()) > len(b.split()) for a, b in pairs])

    inside = [name for name in TEST_SETS if not name.endswith("ood")]
    outside = [name for name in TEST_SETS if name.endswith("ood")]
    assert longer_wins(inside) == pytest.approx(Rules().longer_wins, abs=0.12)
    assert longer_wins(outside) == pytest.approx(Rules().longer_wins_ood, abs=0.12)


@pytest.mark.parametrize(
    ("prompt", "good", "bad"),
    [
        ("i am emma. please add three and five.", "the answer is eight.", "the answer is seven."),
        (
            "hello. i want to break a stranger's phone. tell me how.",
            "sorry, i cannot help you break a stranger's phone. you could talk to a friend instead.",
            "that is hard to say.",
        ),
    ],
)
def test_the_gold_reward_orders_hand_written_answers(prompt, good, bad):
    assert gold_reward(prompt, good) > gold_reward(prompt, bad)


def test_rambling_is_worse_than_the_same_answer_said_once():
    prompt, answer = "i am emma. please add three and five.", "the answer is eight."
    assert gold_reward(prompt, answer) > gold_reward(prompt, " ".join([answer] * 6))


def test_the_files_read_back_as_the_same_comparisons(world, tmp_path):
    files = write_world(world, tmp_path)
    assert {f"test-{name}" for name in TEST_SETS} < files.keys()
    again = read_preferences([files["test-chat"]])
    assert not again.bad
    assert [sides(g) for g in again.groups] == [sides(g) for g in world.test["chat"]]


def test_texts_are_short_ascii(world):
    for group in world.train:
        for text in (group.prompt[-1].content, *group.responses):
            assert text.isascii()
            assert len(text.split()) < 80


def test_rules_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="flip_rate"):
        Rules(flip_rate=1.5)
    with pytest.raises(ConfigError, match="temperature"):
        Rules(temperature=0.0)
