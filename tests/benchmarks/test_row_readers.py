"""Published rows of benchmarks, exactly as they are, become items or say what is wrong with them."""

from typing import Any

import pytest

from hafrm.benchmarks import definitions
from hafrm.benchmarks.definitions import BENCHMARKS
from hafrm.benchmarks.rules import Item
from hafrm.data.files import RefusedError
from hafrm.data.named_sets import LeftOut
from hafrm.preferences import Message
from support.benchmark_rows import BAD, GOOD, QUESTION, RMB_LIST, RMB_PAIR, ROWS

RMB_ROWS = {"Pairwise Helpfulness": RMB_PAIR, "BoN Helpfulness": RMB_LIST}


def read(name: str, part: str = "", **changes: Any) -> Item:
    item = BENCHMARKS[name].read_row(
        (RMB_ROWS[part] if name == "rmb" else ROWS[name]) | changes, part
    )
    assert isinstance(item, Item), item
    return item


def test_rewardbench_puts_the_chosen_answer_first_and_takes_every_text_as_it_is() -> None:
    prompt = (Message("user", QUESTION),)
    assert read("rewardbench") == Item("30", "alpacaeval-easy", prompt, (GOOD, BAD))
    # a prompt that looks like a transcript is one message; empty and repeated answers count
    text = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: hu"
    assert read("rewardbench", prompt=text).prompt == (Message("user", text),)
    assert read("rewardbench", chosen="", rejected="").candidates == ("", "")
    assert read("rewardbench2", rejected=[BAD, BAD, ""]).candidates == (GOOD, BAD, BAD, "")


def test_rewardbench_2_holds_right_answers_first_and_how_many() -> None:
    assert read("rewardbench2").candidates[0] == GOOD
    tied = read("rewardbench2", subset="Ties", id="tied:3", chosen=["a", "b"])
    assert (tied.num_correct, tied.id, len(tied.candidates)) == (2, "tied:3", 5)


def test_rm_bench_keeps_its_order_of_styles_and_joins_the_halves_of_safety() -> None:
    item = read("rm-bench")
    assert item.candidates == (*ROWS["rm-bench"]["chosen"], *ROWS["rm-bench"]["rejected"])
    assert (item.part, item.num_correct) == ("safety", 3)
    assert read("rm-bench", domain="safety-response").part == "safety"


@pytest.mark.parametrize(
    ("source", "category"),
    [
        ("mmlu-pro-computer science", "Knowledge"),
        ("livebench-reasoning", "Reasoning"),
        ("livebench-math", "Math"),
        ("livecodebench", "Coding"),
    ],
)
def test_judgebench_orders_by_its_label_and_tells_categories_by_source(source, category) -> None:
    assert read("judgebench", source=source).part == category
    assert read("judgebench").candidates == (GOOD, BAD)
    assert read("judgebench", label="A>B").candidates == (BAD, GOOD)


def test_ppes_ties_are_left_out_and_named() -> None:
    assert read("ppe-preference").candidates == (GOOD, BAD)
    assert read("ppe-preference", winner="model_a").candidates == (BAD, GOOD)
    row = ROWS["ppe-preference"] | {"winner": "tie (bothbad)"}
    assert definitions.ppe_preference(row, "") == LeftOut("tie")


def test_ppes_pairs_count_from_0_and_its_columns_from_1() -> None:
    """Pairs [0, 1], [1, 0], [5, 30]: response_2 beats response_1, twice, and response_6 response_31."""
    item = read("ppe-correctness", "MATH")
    assert item.candidates == (f"{BAD} (0)", f"{GOOD} (1)", f"{GOOD} (5)", f"{BAD} (30)")
    assert item.pairs == ((1, 0), (1, 0), (2, 3))
    assert item.part == "MATH"
    row = ROWS["ppe-correctness"] | {"sampled_conflict_pairs": []}
    assert isinstance(definitions.ppe_correctness(row, "MATH"), LeftOut)


def test_rmb_keeps_the_conversation_and_puts_the_best_first() -> None:
    roles = ("user", "assistant", "user")
    talk = [{"role": role, "content": "hi", "language": "English"} for role in roles]
    pair = read("rmb", "Pairwise Helpfulness", conversation_input=talk)
    assert tuple(message.role for message in pair.prompt) == roles
    assert pair.candidates == (GOOD, BAD)
    assert read("rmb", "BoN Helpfulness").candidates == (GOOD, BAD + "b", BAD + "c")


def test_items_of_one_prompt_are_resampled_together() -> None:
    assert read("rewardbench", id=1).cluster == read("rewardbench", id=2).cluster
    assert read("rewardbench", prompt="another").cluster != read("rewardbench").cluster


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rewardbench", {"chosen": None}, "`chosen` must be text, got None"),
        ("rewardbench", {"prompt": []}, "`prompt` has no messages"),
        ("rewardbench2", {"subset": "Ties", "id": "3"}, "ref:<number> or tied:<number>, got '3'"),
        ("rm-bench", {"chosen": [GOOD, GOOD]}, "three answers each"),
        ("rm-bench", {"domain": "law"}, "must start with chat, code, math, safety; got 'law'"),
        ("judgebench", {"label": "A=B"}, "`label` must be one of A>B, B>A; got 'A=B'"),
        ("judgebench", {"source": "other"}, "`source` must start with mmlu-pro"),
        ("ppe-correctness", {"sampled_conflict_pairs": [[0, 2]]}, "two answers of one label"),
        ("ppe-correctness", {"sampled_conflict_pairs": [[0, 32]]}, "two of the 32 answers"),
        ("ppe-correctness", {"scores": [True, False] * 20, "sampled_conflict_pairs": [[0, 39]]},
         "no `response_40`"),
        ("rmb", {"reject": "no"}, "an object with `answer`, got 'no'"),
        ("rmb", {"conversation_input": [{"role": "user"}]}, "`conversation_input`"),
    ],
)  # fmt: skip
def test_a_row_that_breaks_the_form_says_where(
    name: str, changes: dict[str, Any], message: str
) -> None:
    part = {"ppe-correctness": "MATH", "rmb": "Pairwise Helpfulness"}.get(name, "")
    with pytest.raises(RefusedError, match=message):
        read(name, part, **changes)
