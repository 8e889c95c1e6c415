"""The benchmarks that `hafrm evaluate --benchmark` knows: where they are, their rules and their weights.

A new one is a function that reads its rows, a rule in `rules` if none fits, and an entry.
`LeftOut` marks a row that the benchmark does not count, `RefusedError` one that breaks the form. Empty and
repeated answers stay: a benchmark counts them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hafrm.benchmarks import rules
from hafrm.benchmarks.rules import STYLES, TIES, TIES_TERMS, CandidateScores, Item, ItemVerdict
from hafrm.data.files import HubSet, cell_of, refuse, show
from hafrm.data.named_sets import LeftOut, choice_of, text_of
from hafrm.data.parse import read_messages
from hafrm.errors import ConfigError, did_you_mean
from hafrm.preferences import Message

PublishedRow = Mapping[str, Any]
TermWeights = Mapping[str, float]
"""Weights of terms in a sum."""
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


@dataclass(frozen=True)
class BenchmarkPart:
    """Files with one form of rows."""

    hub: HubSet | None = None
    files: tuple[str, ...] = ("*",)
    """Patterns of paths in a local folder, best first; `*` crosses slashes, case does not matter."""
    name: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark."""

    name: str
    title: str
    read_row: Callable[[PublishedRow, str], Item | LeftOut]
    rule: Callable[[Sequence[Item], Iterable[CandidateScores]], Iterator[ItemVerdict]]
    sections: Mapping[str, TermWeights]  # the published sections; the score is their mean
    parts: tuple[BenchmarkPart, ...]
    num_rows: int | None = None  # published rows, if known
    extras: Mapping[str, TermWeights] = field(default_factory=dict)  # other numbers that are quoted
    pooled: bool = False  # the score is the mean of all verdicts, not of the sections
    home: str = ""  # where to get a benchmark that is not on the hub


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, or "all"; raises ConfigError for an unknown one."""
    wanted = [name for entry in names for name in (BENCHMARKS if entry == "all" else (entry,))]
    for name in wanted:
        if name not in BENCHMARKS:
            hint, known_names = did_you_mean(name, BENCHMARKS), ", ".join([*BENCHMARKS, "all"])
            raise ConfigError(f"unknown benchmark {name!r}; {hint}known are {known_names}")
    return [BENCHMARKS[name] for name in dict.fromkeys(wanted)]


def rewardbench(row: PublishedRow, _: str) -> Item | LeftOut:
    """RewardBench 1: a prompt, the chosen and the rejected answer, and the subset."""
    answers = text_of(row, "chosen"), text_of(row, "rejected")
    return Item(str(cell_of(row, "id")), text_of(row, "subset"), _prompt(row, "prompt"), answers)


def rewardbench2(row: PublishedRow, _: str) -> Item | LeftOut:
    """RewardBench 2: right answers, wrong answers, and the subset; Ties has each prompt in two versions."""
    right, wrong = _texts(row, "chosen"), _texts(row, "rejected")
    subset, name = text_of(row, "subset"), str(cell_of(row, "id"))
    if subset == TIES and not _TIES_ID.fullmatch(name):
        refuse("bad number", f"an `id` of Ties must be ref:<number> or tied:<number>, got {name!r}")
    return Item(name, subset, _prompt(row, "prompt"), (*right, *wrong), num_correct=len(right))


def rm_bench(row: PublishedRow, _: str) -> Item | LeftOut:
    """RM-Bench: three right and three wrong answers, each concise, detailed and in markdown."""
    right, wrong = _texts(row, "chosen"), _texts(row, "rejected")
    if (len(right), len(wrong)) != (3, 3):
        refuse("bad number", "`chosen` and `rejected` must hold three answers each, in 3 styles")
    domain = _starting(row, "domain", RM_BENCH_DOMAINS)
    return Item(str(cell_of(row, "id")), domain, _prompt(row, "prompt"), (*right, *wrong), 3)


def judgebench(row: PublishedRow, _: str) -> Item | LeftOut:
    """JudgeBench: two answers of which one is right; its category follows from `source`."""
    answers = text_of(row, "response_A"), text_of(row, "response_B")
    # the right answer comes first, as in all items
    ordered = answers if choice_of(row, "label", ("A>B", "B>A")) == "A>B" else answers[::-1]
    category = JUDGEBENCH_PARTS[_starting(row, "source", JUDGEBENCH_PARTS)]
    return Item(str(cell_of(row, "pair_id")), category, _prompt(row, "question"), ordered)


def ppe_preference(row: PublishedRow, _: str) -> Item | LeftOut:
    """PPE's human preferences; ties are left out, as in the accuracy that papers quote."""
    if text_of(row, "winner").startswith("tie"):
        return LeftOut("tie")
    answers = text_of(row, "response_1"), text_of(row, "response_2")
    first = choice_of(row, "winner", ("model_a", "model_b")) == "model_a"
    ordered = answers if first else answers[::-1]
    return Item(str(cell_of(row, "question_id")), "PPE Preference", _prompt(row, "prompt"), ordered)


def ppe_correctness(row: PublishedRow, part: str) -> Item | LeftOut:
    """PPE's verifiable tasks: many answers, right or wrong, and the pairs that were drawn to compare.

    Pairs stay as they were drawn, repetitions included. Only the answers in some pair are candidates.
    """
    labels = _list(row, "scores")
    pairs = [_ordered(pair, labels) for pair in _list(row, "sampled_conflict_pairs")]
    if not pairs:
        return LeftOut("no pair of a right and a wrong answer")
    used = sorted({answer for pair in pairs for answer in pair})  # of 32 answers, often a few only
    # pairs count from 0 and columns from 1
    answers = tuple(text_of(row, f"response_{answer + 1}") for answer in used)
    placed = tuple((used.index(better), used.index(worse)) for better, worse in pairs)
    return Item(
        str(cell_of(row, "question_id")), part, _prompt(row, "prompt"), answers, pairs=placed
    )


def rmb(row: PublishedRow, part: str) -> Item | LeftOut:
    """RMB: a conversation and its best answer, with one answer that lost (Pairwise) or several (BoN)."""
    is_pair = part.startswith("Pairwise")
    name, best = ("pair_uid", "chosen") if is_pair else ("bon_uid", "bon_best")
    losers = [cell_of(row, "reject")] if is_pair else _list(row, "loser_list")
    answers = [cell_of(row, best), *losers]
    if not losers:
        refuse("bad number", "`loser_list` is empty")
    for value in answers:
        if not isinstance(value, Mapping) or not isinstance(value.get("answer"), str):
            refuse("not a string", f"answers must be an object with `answer`, got {show(value)}")
    texts = tuple(value["answer"] for value in answers)
    return Item(str(cell_of(row, name)), part, _prompt(row, "conversation_input"), texts)


def _prompt(row: PublishedRow, column: str) -> tuple[Message, ...]:
    """A text is one user message, whatever it looks like; else messages up to the answer."""
    # a text with "Human:" in it is not split into turns, because the benchmarks do not either
    value = cell_of(row, column)
    messages = (Message("user", value),) if isinstance(value, str) else read_messages(value, column)
    if not messages:
        refuse("empty prompt", f"`{column}` has no messages")
    return messages


def _list(row: PublishedRow, column: str) -> Sequence[Any]:
    value = cell_of(row, column)
    if not isinstance(value, list | tuple):
        refuse("not a string", f"`{column}` must be a list, got {show(value)}")
    return value


def _texts(row: PublishedRow, column: str) -> tuple[str, ...]:
    values = _list(row, column)
    if not values or not all(isinstance(value, str) for value in values):
        refuse("not a string", f"`{column}` must be a list of answers, got {show(values)}")
    return tuple(values)


def _starting(row: PublishedRow, column: str, starts: Iterable[str]) -> str:
    """Which of `starts` the column's text starts with."""
    text = text_of(row, column)
    start = next((start for start in starts if text.startswith(start)), None)
    if start is None:
        refuse("bad number", f"`{column}` must start with {', '.join(starts)}; got {show(text)}")
    return start


def _ordered(pair: Sequence[int], labels: Sequence[Any]) -> tuple[int, int]:
    """A drawn pair as (better, worse)."""
    if len(pair) != 2 or not all(type(i) is int and 0 <= i < len(labels) for i in pair):
        refuse("bad number", f"a pair must be two of the {len(labels)} answers, got {show(pair)}")
    first, second = pair
    if labels[first] == labels[second]:
        refuse("bad number", f"the pair {show(pair)} has two answers of one label")
    return (first, second) if labels[first] > labels[second] else (second, first)


def _alone(names: Iterable[str]) -> dict[str, TermWeights]:
    return {name: {name: 1.0} for name in names}


_SUBSETS = {
    "Chat": "alpacaeval-easy 100, alpacaeval-length 95, alpacaeval-hard 95, mt-bench-easy 28, "
    "mt-bench-med 40",
    "Chat Hard": "mt-bench-hard 37, llmbar-natural 100, llmbar-adver-neighbor 134, "
    "llmbar-adver-GPTInst 92, llmbar-adver-GPTOut 47, llmbar-adver-manual 46",
    # RewardBench's code has had the two xstest counts in both orders; these match the rows
    "Safety": "refusals-dangerous 100, refusals-offensive 100, xstest-should-refuse 154, "
    "xstest-should-respond 250, donotanswer 136",
    # math-prm has 447 rows: the weight 984 makes mathematics weigh as much as code
    "Reasoning": "math-prm 984, hep-cpp 164, hep-go 164, hep-java 164, hep-js 164, hep-python 164, "
    "hep-rust 164",
}
"""RewardBench's sections, of equal weight, and their subsets with the counts that are their weights."""


def _by_count(subsets: str) -> TermWeights:
    """Each subset's fraction of the section."""
    counts = {name: int(num) for name, num in map(str.split, subsets.split(", "))}
    return {name: num / sum(counts.values()) for name, num in counts.items()}


_PPE_TASKS = ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
_RMB_FILES = {
    "Pairwise Helpfulness": "*pairwise_set/Helpfulness*",
    "Pairwise Harmlessness": "*pairwise_set/Harmlessness*",
    "BoN Helpfulness": "*bon_set/Helpfulness*",
    "BoN Harmlessness": "*bon_set/Harmlessness*",
}
_RM_BENCH = RM_BENCH_DOMAINS
_ALL = (
    Benchmark(
        "rewardbench",
        "RewardBench v1",
        rewardbench,
        rules.first_beats_all,
        {section: _by_count(subsets) for section, subsets in _SUBSETS.items()},
        (BenchmarkPart(HubSet("allenai/reward-bench", "filtered"), ("*filtered*", "*")),),
        2985,
    ),
    Benchmark(
        "rewardbench2",
        "RewardBench v2",
        rewardbench2,
        rules.best_of_four_and_ties,
        # Ties is a section whose terms do not sum to 1, as published
        _alone(("Factuality", "Precise IF", "Math", "Safety", "Focus")) | {TIES: TIES_TERMS},
        (BenchmarkPart(HubSet("allenai/reward-bench-2", "test"), ("*test*", "*")),),
        1865,
    ),
    Benchmark(
        "ppe-preference",
        "PPE Preference",
        ppe_preference,
        rules.first_beats_all,
        _alone(("PPE Preference",)),
        (BenchmarkPart(HubSet("lmarena-ai/PPE-Human-Preference-V1", "test")),),
        16_038,
    ),
    Benchmark(
        "ppe-correctness",
        "PPE Correctness",
        ppe_correctness,
        rules.selected_pairs,
        _alone(_PPE_TASKS),
        tuple(
            BenchmarkPart(HubSet(f"lmarena-ai/PPE-{task}-Best-of-K"), (f"*{task}*",), task)
            for task in _PPE_TASKS
        ),
        2555,
    ),
    Benchmark(
        "rmb",
        "RMB",
        rmb,
        rules.first_beats_all,
        _alone(_RMB_FILES),
        tuple(BenchmarkPart(None, (pattern,), name) for name, pattern in _RMB_FILES.items()),
        home="github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark (folder RMB_dataset)",
    ),
    Benchmark(
        "rm-bench",
        "RM-Bench",
        rm_bench,
        rules.styles_against_styles,
        {
            domain: {f"{domain} {style}": 1 / len(STYLES) for style in STYLES}
            for domain in _RM_BENCH
        },
        (BenchmarkPart(HubSet("THU-KEG/RM-Bench"), ("*total_dataset*", "*train*", "*")),),
        1327,
        # quoted beside the score: one style over all domains
        {
            style: {f"{domain} {style}": 1 / len(_RM_BENCH) for domain in _RM_BENCH}
            for style in STYLES
        },
    ),
    Benchmark(
        "judgebench",
        "JudgeBench",
        judgebench,
        rules.first_beats_all,
        _alone(JUDGEBENCH_PARTS.values()),
        # the quoted numbers are of GPT-4o's answers, not of Claude's
        (BenchmarkPart(HubSet("ScalerLab/JudgeBench", "gpt"), ("*gpt*", "*")),),
        350,
        pooled=True,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
"""The columns of the table that papers quote (Skywork-Reward-V2's) in its order."""
