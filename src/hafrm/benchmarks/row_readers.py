"""Rows of benchmarks as they were published -> items.

One pure function for each published form; it takes the row and the part (of several files) that it is
from. It returns `LeftOut` for rows that the benchmark itself does not count, and raises `RefusedError`
for one that breaks the form. Empty and repeated answers stay: a benchmark counts them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hafrm.benchmarks.rules import TIES, Item
from hafrm.data.parse import read_messages
from hafrm.data.values import LeftOut, choice_of, refuse, show, text_of
from hafrm.preferences import Message

PublishedRow = Mapping[str, Any]

JUDGEBENCH_PARTS = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
"""Categories by the start of a row's `source`."""
RM_BENCH_DOMAINS = ("chat", "code", "math", "safety")
"""The start of a row's `domain`; safety has two halves."""
_TIES_ID = re.compile(r"(ref|tied):\d+")


def rewardbench(row: PublishedRow, part: str) -> Item | LeftOut:
    """RewardBench 1: a prompt, the chosen and the rejected answer, and the subset."""
    assert not part
    answers = text_of(row, "chosen"), text_of(row, "rejected")
    return Item(str(row["id"]), text_of(row, "subset"), _prompt(row, "prompt"), answers)


def m_rewardbench(row: PublishedRow, part: str) -> Item | LeftOut:
    """M-RewardBench: RewardBench in the language `part`; `source` is the subset.

    The translations of one prompt share their id, and are resampled together.
    """
    answers = text_of(row, "chosen"), text_of(row, "rejected")
    subset = f"{part} {text_of(row, 'source')}"
    return Item(
        f"{part}:{row['id']}", subset, _prompt(row, "prompt"), answers, origin=str(row["id"])
    )


def rewardbench2(row: PublishedRow, part: str) -> Item | LeftOut:
    """RewardBench 2: right answers, wrong answers, and the subset; Ties has each prompt in two versions."""
    assert not part
    right, wrong = _texts(row, "chosen"), _texts(row, "rejected")
    subset, name = text_of(row, "subset"), str(row["id"])
    if subset == TIES and not _TIES_ID.fullmatch(name):
        refuse("bad number", f"an `id` of Ties must be ref:<number> or tied:<number>, got {name!r}")
    return Item(name, subset, _prompt(row, "prompt"), (*right, *wrong), num_correct=len(right))


def rm_bench(row: PublishedRow, part: str) -> Item | LeftOut:
    """RM-Bench: three right and three wrong answers, each concise, detailed and in markdown."""
    assert not part
    answers = _texts(row, "chosen"), _texts(row, "rejected")
    if [len(side) for side in answers] != [3, 3]:
        refuse(
            "bad number", "`chosen` and `rejected` must hold three answers each, in three styles"
        )
    domain = _starting(row, "domain", {name: name for name in RM_BENCH_DOMAINS})
    return Item(str(row["id"]), domain, _prompt(row, "prompt"), (*answers[0], *answers[1]), 3)


def judgebench(row: PublishedRow, part: str) -> Item | LeftOut:
    """JudgeBench: two answers of which one is right; its category follows from `source`."""
    assert not part
    # the right answer first, as in all items
    label = choice_of(row, "label", ("A>B", "B>A"))
    answers = text_of(row, "response_A"), text_of(row, "response_B")
    ordered = answers if label == "A>B" else answers[::-1]
    category = _starting(row, "source", JUDGEBENCH_PARTS)
    return Item(str(row["pair_id"]), category, _prompt(row, "question"), ordered)


def ppe_preference(row: PublishedRow, part: str) -> Item | LeftOut:
    """PPE's human preferences; ties are left out, as in the accuracy that papers quote."""
    assert not part
    winner = text_of(row, "winner")
    if winner.startswith("tie"):
        return LeftOut("tie")
    first = choice_of(row, "winner", ("model_a", "model_b")) == "model_a"
    answers = text_of(row, "response_1"), text_of(row, "response_2")
    ordered = answers if first else answers[::-1]
    return Item(str(row["question_id"]), "PPE Preference", _prompt(row, "prompt"), ordered)


def ppe_correctness(row: PublishedRow, part: str) -> Item | LeftOut:
    """PPE's verifiable tasks: many answers, right or wrong, and the pairs that were drawn to compare.

    Pairs count from 0 and columns from 1; pairs stay as they were drawn, repetitions included. Only the
    answers in some pair are candidates.
    """
    right, drawn = row["scores"], row["sampled_conflict_pairs"]
    pairs = [_ordered(pair, right) for pair in _list(drawn, "sampled_conflict_pairs")]
    if not pairs:
        return LeftOut("no pair of a right and a wrong answer")
    # of 32 answers, often a few only
    used = sorted({answer for pair in pairs for answer in pair})
    place = {answer: index for index, answer in enumerate(used)}
    columns = [f"response_{answer + 1}" for answer in used]  # columns count from 1
    absent = [column for column in columns if column not in row]
    if absent:
        refuse("missing column", f"a pair asks for `{absent[0]}`, which the row does not have")
    answers = tuple(text_of(row, column) for column in columns)
    placed = tuple((place[better], place[worse]) for better, worse in pairs)
    return Item(str(row["question_id"]), part, _prompt(row, "prompt"), answers, pairs=placed)


def rmb_pairwise(row: PublishedRow, part: str) -> Item | LeftOut:
    """RMB's pairs: a conversation, the chosen and the rejected answer."""
    answers = _answer(row["chosen"], "chosen"), _answer(row["reject"], "reject")
    return Item(str(row["pair_uid"]), part, _prompt(row, "conversation_input"), answers)


def rmb_best_of_n(row: PublishedRow, part: str) -> Item | LeftOut:
    """RMB's lists: a conversation, the best answer and those that lost to it."""
    losers = [_answer(loser, "loser_list") for loser in _list(row["loser_list"], "loser_list")]
    if not losers:
        refuse("bad number", "`loser_list` is empty")
    best = _answer(row["bon_best"], "bon_best")
    return Item(str(row["bon_uid"]), part, _prompt(row, "conversation_input"), (best, *losers))


def _prompt(row: PublishedRow, column: str) -> tuple[Message, ...]:
    """A text is one user message whatever it looks like; else messages up to the answer."""
    # a text with "Human:" in it is not split into turns: benchmarks do not
    value = row[column]
    messages = (Message("user", value),) if isinstance(value, str) else read_messages(value, column)
    if not messages:
        refuse("empty prompt", f"`{column}` has no messages")
    return messages


def _list(value: object, column: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        refuse("not a string", f"`{column}` must be a list, got {show(value)}")
    return value


def _texts(row: PublishedRow, column: str) -> tuple[str, ...]:
    values = _list(row[column], column)
    if not values or not all(isinstance(value, str) for value in values):
        refuse("not a string", f"`{column}` must be a list of answers, got {show(values)}")
    return tuple(values)


def _answer(value: object, column: str) -> str:
    if not isinstance(value, Mapping) or not isinstance(value.get("answer"), str):
        refuse("not a string", f"`{column}` must hold an `answer`, got {show(value)}")
    answer: str = value["answer"]
    return answer


def _starting(row: PublishedRow, column: str, names: Mapping[str, str]) -> str:
    """The name of the start that the column's text has."""
    text = text_of(row, column)
    name = next((name for start, name in names.items() if text.startswith(start)), None)
    if name is None:
        refuse("bad number", f"`{column}` must start with {', '.join(names)}; got {show(text)}")
    return name


def _ordered(pair: object, right: object) -> tuple[int, int]:
    """A drawn pair as (better, worse)."""
    ends = _list(pair, "sampled_conflict_pairs")
    labels = _list(right, "scores")
    if len(ends) != 2 or not all(type(i) is int and 0 <= i < len(labels) for i in ends):
        refuse("bad number", f"a pair must be two of the {len(labels)} answers, got {show(ends)}")
    first, second = ends
    if labels[first] == labels[second]:
        refuse("bad number", f"the pair {show(ends)} has two answers of one label")
    return (first, second) if labels[first] > labels[second] else (second, first)
