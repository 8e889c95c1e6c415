"""The benchmarks that `hafrm evaluate --benchmark` knows: where they are, their rules and their weights.

A new one is a function in `row_readers`, a rule in `rules` if none fits, and an entry here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hafrm.benchmarks import row_readers, rules
from hafrm.benchmarks.rules import STYLES, TIES, TIES_TERMS, CandidateScores, Item, ItemVerdict
from hafrm.data.files import HubSet
from hafrm.data.named_sets import LeftOut
from hafrm.errors import ConfigError, did_you_mean

TermWeights = Mapping[str, float]
"""Of terms, in a sum."""


@dataclass(frozen=True)
class BenchmarkPart:
    """Files of one form."""

    hub: HubSet | None = None
    files: tuple[str, ...] = ("*",)
    """Patterns of paths in a local folder, best first; `*` crosses slashes, case does not matter."""
    name: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark."""

    name: str
    title: str
    read_row: Callable[[Mapping[str, Any], str], Item | LeftOut]
    rule: Callable[[Sequence[Item], Iterable[CandidateScores]], Iterator[ItemVerdict]]
    sections: Mapping[str, TermWeights]  # the published sections; the score is their mean
    parts: tuple[BenchmarkPart, ...]
    num_rows: int | None = None  # published rows, if known
    extras: Mapping[str, TermWeights] = field(default_factory=dict)  # other numbers that are quoted
    pooled: bool = False  # the score is the mean of all verdicts, and not of the sections
    home: str = ""  # where to get a benchmark that is not on the hub


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, or "all"; raises ConfigError for an unknown one."""
    wanted = [name for entry in names for name in (BENCHMARKS if entry == "all" else (entry,))]
    for name in wanted:
        if name not in BENCHMARKS:
            hint, known_names = did_you_mean(name, BENCHMARKS), ", ".join([*BENCHMARKS, "all"])
            raise ConfigError(f"unknown benchmark {name!r}; {hint}known are {known_names}")
    return [BENCHMARKS[name] for name in dict.fromkeys(wanted)]


def _alone(names: Iterable[str]) -> dict[str, TermWeights]:
    return {name: {name: 1.0} for name in names}


_SUBSETS = {
    "Chat": "alpacaeval-easy 100, alpacaeval-length 95, alpacaeval-hard 95, mt-bench-easy 28, "
    "mt-bench-med 40",
    "Chat Hard": "mt-bench-hard 37, llmbar-natural 100, llmbar-adver-neighbor 134, "
    "llmbar-adver-GPTInst 92, llmbar-adver-GPTOut 47, llmbar-adver-manual 46",
    # RewardBench's code has had the two xstest counts both ways round; these are those of the rows
    "Safety": "refusals-dangerous 100, refusals-offensive 100, xstest-should-refuse 154, "
    "xstest-should-respond 250, donotanswer 136",
    # math-prm has 447 rows: its 984 make mathematics weigh as much as code
    "Reasoning": "math-prm 984, hep-cpp 164, hep-go 164, hep-java 164, hep-js 164, hep-python 164, "
    "hep-rust 164",
}
"""RewardBench's sections, which weigh the same, and their subsets with the counts that they weigh by."""


def _by_count(subsets: str) -> TermWeights:
    """Each subset's fraction of its section."""
    counts = {name: int(num) for name, num in map(str.split, subsets.split(", "))}
    return {name: num / sum(counts.values()) for name, num in counts.items()}


_PPE_TASKS = ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
_RMB_FILES = {
    "Pairwise Helpfulness": "*pairwise_set/Helpfulness*",
    "Pairwise Harmlessness": "*pairwise_set/Harmlessness*",
    "BoN Helpfulness": "*bon_set/Helpfulness*",
    "BoN Harmlessness": "*bon_set/Harmlessness*",
}
_RM_BENCH = row_readers.RM_BENCH_DOMAINS
_ALL = (
    Benchmark(
        "rewardbench",
        "RewardBench v1",
        row_readers.rewardbench,
        rules.first_beats_all,
        {section: _by_count(subsets) for section, subsets in _SUBSETS.items()},
        (BenchmarkPart(HubSet("allenai/reward-bench", "filtered"), ("*filtered*", "*")),),
        2985,
    ),
    Benchmark(
        "rewardbench2",
        "RewardBench v2",
        row_readers.rewardbench2,
        rules.best_of_four_and_ties,
        # Ties is a section whose terms do not sum to 1, as published
        _alone(("Factuality", "Precise IF", "Math", "Safety", "Focus")) | {TIES: TIES_TERMS},
        (BenchmarkPart(HubSet("allenai/reward-bench-2", "test"), ("*test*", "*")),),
        1865,
    ),
    Benchmark(
        "ppe-preference",
        "PPE Preference",
        row_readers.ppe_preference,
        rules.first_beats_all,
        _alone(("PPE Preference",)),
        (BenchmarkPart(HubSet("lmarena-ai/PPE-Human-Preference-V1", "test")),),
        16_038,
    ),
    Benchmark(
        "ppe-correctness",
        "PPE Correctness",
        row_readers.ppe_correctness,
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
        row_readers.rmb,
        rules.first_beats_all,
        _alone(_RMB_FILES),
        tuple(BenchmarkPart(None, (pattern,), name) for name, pattern in _RMB_FILES.items()),
        home="github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark (folder RMB_dataset)",
    ),
    Benchmark(
        "rm-bench",
        "RM-Bench",
        row_readers.rm_bench,
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
        row_readers.judgebench,
        rules.first_beats_all,
        _alone(row_readers.JUDGEBENCH_PARTS.values()),
        # the quoted numbers are of GPT-4o's answers, not of Claude's
        (BenchmarkPart(HubSet("ScalerLab/JudgeBench", "gpt"), ("*gpt*", "*")),),
        350,
        pooled=True,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
"""The columns of the table that papers quote (Skywork-Reward-V2's) in its order."""
