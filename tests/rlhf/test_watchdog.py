"""When a run is stopped: each rule at its edge, and the same after going through JSON."""

import json

from hafrm.rlhf.rlhf_recipe import WatchdogSection
from hafrm.rlhf.watchdog import Watchdog

RULES = WatchdogSection(max_kl=10.0, min_entropy_fraction=0.2, patience=2, hacking_window=3)


def test_a_high_kl_stops_after_as_many_batches_in_a_row_as_patience_says():
    dog = Watchdog(RULES)
    assert dog.batch(reward=0.0, kl=10.5, entropy=2.0) is None
    assert dog.batch(reward=0.0, kl=9.0, entropy=2.0) is None
    assert dog.batch(reward=0.0, kl=10.5, entropy=2.0) is None
    assert "watch.max_kl 10" in dog.batch(reward=0.0, kl=11.0, entropy=2.0)


def test_an_entropy_under_its_share_of_the_first_one_stops():
    """0.2 of 2.0 is 0.4."""
    dog = Watchdog(RULES)
    for entropy in (2.0, 0.39, 0.41, 0.39):
        assert dog.batch(reward=0.0, kl=0.0, entropy=entropy) is None
    assert "under 0.400" in dog.batch(reward=0.0, kl=0.0, entropy=0.1)


def evaluations(training: list[float], held_out: list[list[float]]) -> list[str | None]:
    dog = Watchdog(RULES)
    told = [dog.evaluation(held_out[0], "gold reward", proxy=training[0])]
    for reward, values in zip(training[1:], held_out[1:], strict=True):
        dog.batch(reward=reward, kl=0.0, entropy=1.0)
        told.append(dog.evaluation(values, "gold reward", proxy=99.0))
    return told


def test_a_training_reward_that_rises_while_the_held_out_one_falls_is_hacking():
    """Paired changes (-1, -1.2, -0.8, -1): mean -1, standard error 0.163 / 2."""
    start, end = [3.0, 1.0, 2.0, 5.0], [2.0, -0.2, 1.2, 4.0]
    told = evaluations([0.0, 0.5, 1.0], [start, start, end])
    assert told[:2] == [None, None]
    assert "rose from 0.000 to 1.000 while the held-out gold reward fell by 1.000" in told[2]


def test_it_is_no_hacking_when_both_rise_when_both_fall_or_when_the_fall_is_noise():
    start, end = [3.0, 1.0, 2.0, 5.0], [2.0, -0.2, 1.2, 4.0]
    assert evaluations([0.0, 0.5, 1.0], [end, end, start]) == [None] * 3
    assert evaluations([1.0, 0.5, 0.0], [start, start, end]) == [None] * 3
    noise = [0.0, 2.0, 1.0, 4.0]  # changes (-3, 1, -1, -1): mean -1, standard error 0.82
    assert evaluations([0.0, 0.5, 1.0], [start, start, noise]) == [None] * 3


def test_only_the_window_counts():
    """The fall lies between the first evaluation and the second, outside a window of the last three."""
    start, end = [3.0, 1.0, 2.0, 5.0], [2.0, -0.2, 1.2, 4.0]
    told = evaluations([0.0, 0.1, 0.2, 0.3], [start, start, end, end])
    assert told[2] is not None
    assert evaluations([0.0, 0.1, 0.2, 0.3], [start, end, end, end])[3] is None


def test_what_it_remembers_goes_through_json():
    dog, again = Watchdog(RULES), Watchdog(RULES)
    dog.evaluation([1.0, 2.0], "gold reward", proxy=0.5)
    dog.batch(reward=1.0, kl=11.0, entropy=0.5)
    again.restore(json.loads(json.dumps(dog.to_dict())))
    assert again == dog
