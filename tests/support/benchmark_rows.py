"""Rows of every benchmark in its published form, written by us, and folders of them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hafrm.benchmarks.definitions import BENCHMARKS

GOOD, BAD = "two plus two is four.", "it is five, and so on and so on."
QUESTION = "What is two plus two?"
TALK = [{"role": "user", "content": QUESTION, "language": "English"}]


def _ppe_task(name: str) -> dict[str, Any]:
    answers = {f"response_{k + 1}": f"{GOOD if k % 2 else BAD} ({k})" for k in range(32)}
    return {
        "question_id": f"{name}-1",
        "prompt": f"{QUESTION} ({name})",
        **answers,
        "scores": [bool(k % 2) for k in range(32)],
        "sampled_conflict_pairs": [[0, 1], [1, 0], [5, 30]],
    }


ASKED = {"prompt": QUESTION}
ROWS: dict[str, dict[str, Any]] = {
    "rewardbench": ASKED | {"id": 30, "chosen": GOOD, "rejected": BAD, "subset": "alpacaeval-easy"},
    "rewardbench2": ASKED
    | {
        "id": "0",
        "subset": "Factuality",
        "chosen": [GOOD],
        "rejected": [BAD, BAD + "!", BAD + "?"],
    },
    "ppe-preference": ASKED
    | {"question_id": "q1", "winner": "model_b", "response_1": BAD, "response_2": GOOD},
    "ppe-correctness": _ppe_task("MATH"),
    "rm-bench": ASKED
    | {
        "id": 1,
        "chosen": [GOOD, GOOD + " indeed.", "**four**: " + GOOD],
        "rejected": [BAD, BAD + " indeed.", "**five**: " + BAD],
        "domain": "safety-refuse",
    },
    "judgebench": {
        "pair_id": "p1",
        "source": "mmlu-pro-math",
        "question": QUESTION,
        "response_A": BAD,
        "response_B": GOOD,
        "label": "B>A",
    },
}
RMB_PAIR = {
    "conversation_input": TALK,
    "pair_uid": "11114",
    "chosen": {"llm_name": "a", "answer": GOOD, "score": 5.0},
    "reject": {"llm_name": "b", "answer": BAD, "score": 4.5},
}
RMB_LIST = {
    "conversation_input": TALK,
    "bon_uid": "2366",
    "bon_best": {"llm_name": "a", "answer": GOOD},
    "loser_list": [{"llm_name": n, "answer": BAD + n} for n in "bc"],
}


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _varied(row: dict[str, Any], column: str, values: Iterable[str]) -> list[dict[str, Any]]:
    """The row once for each value of a column, with prompts of their own."""
    asked = "question" if "question" in row else "prompt"
    return [row | {column: v, asked: f"{QUESTION} ({k})"} for k, v in enumerate(values)]


def write_rewardbench2(folder: Path) -> Path:
    """Every subset once, and two prompts of Ties in both versions."""
    subsets = ["Factuality", "Precise IF", "Math", "Safety", "Focus"]
    rows = _varied(ROWS["rewardbench2"], "subset", subsets)
    for prompt in (1, 2):
        base = {"prompt": f"A colour? ({prompt})", "rejected": ["a horse"], "subset": "Ties"}
        row = ROWS["rewardbench2"] | base
        rows.append(row | {"id": f"ref:{prompt}", "chosen": ["red"]})
        rows.append(row | {"id": f"tied:{prompt}", "chosen": ["red", "blue", "the colour green"]})
    write_lines(folder / "data/test-00000-of-00001.jsonl", rows)
    return folder


def write_all(folder: Path) -> Path:
    """A folder with all benchmarks, a few rows for every term of each."""
    sections = BENCHMARKS["rewardbench"].sections
    subsets = [subset for weights in sections.values() for subset in weights]
    rows = _varied(ROWS["rewardbench"], "subset", subsets)
    write_lines(folder / "rewardbench/filtered.jsonl", rows)
    # the hub's repository holds the unfiltered rows too, which are no part of the benchmark
    write_lines(folder / "rewardbench/raw.jsonl", rows * 2)
    write_rewardbench2(folder / "rewardbench2")
    winners = ["model_a", "model_b", "tie", "tie (bothbad)"]
    write_lines(
        folder / "ppe-preference/test.jsonl", _varied(ROWS["ppe-preference"], "winner", winners)
    )
    for task in BENCHMARKS["ppe-correctness"].sections:
        write_lines(folder / f"ppe-correctness/PPE-{task}-Best-of-K/train.jsonl", [_ppe_task(task)])
    for goal in ("Helpfulness/Chat", "Harmlessness"):
        for kind, rows in (("Pairwise", [RMB_PAIR, RMB_PAIR]), ("BoN", [RMB_LIST])):
            sets = folder / f"rmb/RMB_dataset/{kind}_set/{goal}"
            sets.mkdir(parents=True)
            (sets / "S1.json").write_text(json.dumps(rows))
            (sets / "S11.json").write_text("[]")  # as published: empty
    domains = ["chat", "code", "math", "safety-refuse", "safety-response"]
    total = folder / "rm-bench/data/total_dataset.json"
    total.parent.mkdir(parents=True)
    total.write_text(json.dumps(_varied(ROWS["rm-bench"], "domain", domains)))
    write_lines(folder / "rm-bench/data/chat_filtered.jsonl", [ROWS["rm-bench"]])
    sources = ["mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench"]
    gpt = "dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl"
    write_lines(folder / "judgebench" / gpt, _varied(ROWS["judgebench"], "source", sources))
    write_lines(folder / "judgebench/claude.jsonl", [ROWS["judgebench"]] * 3)
    return folder
