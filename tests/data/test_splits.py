"""Splits are disjoint by prompt and independent of order, leakage is found, mixing is exact."""

import random
from collections import Counter

import pytest

from hafrm.data.reader import read_preferences
from hafrm.data.splits import check_leakage, mix, normalised_key, split_by_prompt, write_groups
from hafrm.errors import DataError
from hafrm.preferences import Comparison, Group, Message, Votes, num_comparisons


def group(text: str, num_pairs: int = 1, name: str = "") -> Group:
    """A group in which response 0 beats each other one."""
    return Group(
        name or f"id-{text}",
        (Message("user", text),),
        tuple(f"response {index}" for index in range(num_pairs + 1)),
        tuple(Comparison(0, index + 1, weight=2.0) for index in range(num_pairs)),
    )


GROUPS = [group(f"prompt {index}") for index in range(2000)]


def ids(groups: list[Group]) -> list[str]:
    return [each.id for each in groups]


def test_a_split_is_disjoint_complete_and_near_the_fraction() -> None:
    """2,000 draws at 0.2: standard deviation sqrt(2000 * 0.2 * 0.8) = 18, so within 90 of 400."""
    rest, held = split_by_prompt(GROUPS, 0.2, seed=1)
    assert set(ids(rest)).isdisjoint(ids(held)) and len(rest) + len(held) == 2000
    assert abs(len(held) - 400) < 90
    assert ids(rest) == sorted(ids(rest), key=ids(GROUPS).index)
    check_leakage(rest, held)


def test_a_prompt_stays_on_its_side_whatever_else_is_in_the_data() -> None:
    _, held = split_by_prompt(GROUPS, 0.3, seed=7)
    shuffled = GROUPS[:500] + [group(f"new {index}") for index in range(300)]
    random.Random(0).shuffle(shuffled)
    _, held_of_part = split_by_prompt(shuffled, 0.3, seed=7)
    part = set(ids(GROUPS[:500]))
    assert set(ids(held)) & part == set(ids(held_of_part)) & part
    _, held_by_other_seed = split_by_prompt(GROUPS, 0.3, seed=8)
    assert set(ids(held)) != set(ids(held_by_other_seed))


def test_groups_of_one_prompt_are_never_separated_even_in_other_case_and_spacing() -> None:
    variants = ["Why is  it so?", "why is it\nSO?", " WHY IS IT SO? "]
    groups = [
        group(f"{text} {n}", name=f"{n}-{k}") for n in range(50) for k, text in enumerate(variants)
    ]
    _, held = split_by_prompt(groups, 0.5, seed=3)
    assert set(Counter(each.id.split("-")[0] for each in held).values()) == {3}


def test_neither_side_of_a_split_is_empty() -> None:
    for seed in range(30):
        for size, fraction in ((2, 0.01), (2, 0.99), (20, 0.01), (21, 0.97)):
            rest, held = split_by_prompt(GROUPS[:size], fraction, seed)
            assert rest and held and len(rest) + len(held) == size


def test_nothing_is_held_out_at_fraction_zero_nor_of_a_single_prompt() -> None:
    assert split_by_prompt(GROUPS[:3], 0.0, seed=0) == (GROUPS[:3], [])
    assert split_by_prompt([], 0.5, seed=0) == ([], [])
    with pytest.raises(DataError, match="one prompt"):
        split_by_prompt([group("only"), group("only", 2)], 0.1, seed=0)


def test_the_normalised_key_knows_roles_and_turns_apart() -> None:
    user, system = Message("user", "a b"), Message("system", "a b")
    keys = {
        normalised_key(prompt)
        for prompt in ([user], [system], [user, user], [Message("user", "ab")])
    }
    assert len(keys) == 4
    assert normalised_key([user]) == normalised_key([Message("user", " A\t\u00a0b ")])


def test_leakage_names_the_number_of_prompts_and_some_of_them() -> None:
    test = [group("a"), group("B  c", name="culprit"), group("b c"), group("d")]
    with pytest.raises(DataError) as caught:
        check_leakage([group("b C"), group("e")], test, names=("data.train", "data.test"))
    message = str(caught.value)
    assert "1 of 3 prompts of data.test are in data.train too" in message
    assert "culprit: 'B  c'" in message
    check_leakage([group("e")], test)
    check_leakage([], test)


def test_a_cap_keeps_exactly_so_many_comparisons_of_each_set_in_their_order() -> None:
    sets = [[group(f"{name}{index}", num_pairs=7) for index in range(10)] for name in "ab"]
    small = [group("small", num_pairs=3)]
    mixed = mix([*sets, small], cap=24, seed=5)
    counts = Counter(each.prompt[0].content[0] for each in mixed for _ in each.comparisons)
    assert counts == {"a": 24, "b": 24, "s": 3}
    assert ids(mixed) == sorted(ids(mixed), key=ids([*sets[0], *sets[1], *small]).index)
    assert mixed == mix([*sets, small], cap=24, seed=5)
    assert ids(mixed) != ids(mix([*sets, small], cap=24, seed=6))
    other_order = mix([sets[0][::-1]], cap=24, seed=5)
    assert set(ids(other_order)) == {each.id for each in mixed if each.id.startswith("id-a")}


def test_a_trimmed_group_keeps_its_comparisons_texts_and_no_unused_response() -> None:
    whole = group("p", num_pairs=30)
    (trimmed,) = mix([[whole]], cap=4, seed=0)
    assert len(trimmed.comparisons) == 4 and len(trimmed.responses) == 5
    pairs = {
        (trimmed.responses[c.chosen], trimmed.responses[c.rejected]) for c in trimmed.comparisons
    }
    assert len(pairs) == 4 and {chosen for chosen, _ in pairs} == {"response 0"}
    assert num_comparisons([whole]) == 30


def test_weights_multiply_the_comparisons_own() -> None:
    assert mix([GROUPS[:3], GROUPS[1:5]]) == [*GROUPS[:3], *GROUPS[1:5]]
    mixed = mix([[group("a")], [group("b", 2)]], weights=[1.0, 0.25], seed=0)
    assert [[c.weight for c in each.comparisons] for each in mixed] == [[2.0], [0.5, 0.5]]


def test_written_groups_read_back_with_ids_margins_weights_votes_ties_and_unlabelled_responses(
    tmp_path,
):
    prompt = (Message("system", "Be brief."), Message("user", "Which sea is \u201cred\u201d?"))
    comparisons = (
        Comparison(0, 1, margin=1.5),
        Comparison(0, 2, weight=0.5),
        Comparison(1, 2, tie=True, votes=Votes(1, 1, 3)),
    )
    groups = (
        Group("a", prompt, ("1", "2", "3", "4"), comparisons, "f", {"subset": "seas"}),
        Group("b", prompt[1:], ("5", "6"), source="f"),
    )
    assert write_groups(groups, tmp_path / "new" / "f.jsonl") == 5
    again = read_preferences([tmp_path / "new" / "f.jsonl"], need_comparisons=False)
    assert (again.groups, again.bad_rows) == (groups, ())
    write_groups([Group("c", prompt, ())], tmp_path / "p.jsonl")
    (alone,) = read_preferences([tmp_path / "p.jsonl"], need_responses=False).groups
    assert (alone.id, alone.prompt) == ("c", prompt)
