"""The benchmarks that `hafrm evaluate --benchmark` knows: where they are, their rules and their weights.

A new one is a function in `row_readers`, a rule in `rules` if none fits, and an entry here. The first seven
are the columns of the table that papers on reward models quote.
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hafrm.benchmarks import row_readers, rules
from hafrm.benchmarks.rules import STYLES, TIES, TIES_TERMS, CandidateScores, Item, ItemVerdict
from hafrm.data.files import HubSet
from hafrm.data.named_sets import LeftOut
from hafrm.errors import ConfigError

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
    sections: Mapping[str, TermWeights]
    """The published sections; the score is their mean."""
    parts: tuple[BenchmarkPart, ...]
    num_rows: int | None = None
    """Published rows, if known."""
    extras: Mapping[str, TermWeights] = field(default_factory=dict)
    """Other numbers that are quoted."""
    pooled: bool = False
    """The score is the mean of all verdicts, and not of the sections."""
    home: str = ""
    """Where to get a benchmark that is not on the hub."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Every term that the whole benchmark has."""
        return tuple(dict.fromkeys(term for weights in self.sections.values() for term in weights))


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names; "all" means those that papers quote.

    Raises ConfigError with the nearest name for an unknown one.
    """
    wanted = [name for entry in names for name in (QUOTED if entry == "all" else (entry,))]
    for name in wanted:
        if name not in BENCHMARKS:
            # names differ by a digit or a hyphen
            near = difflib.get_close_matches(name.lower(), BENCHMARKS, 1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            all_names = ", ".join([*BENCHMARKS, "all"])
            raise ConfigError(f"unknown benchmark {name!r}; {hint}known are {all_names}")
    return [BENCHMARKS[name] for name in dict.fromkeys(wanted)]


def mean_weights(sections: Iterable[TermWeights]) -> TermWeights:
    """The weights of the mean of several sections, which may share terms."""
    parts = list(sections)
    total: dict[str, float] = defaultdict(float)
    for weights in parts:
        for name, weight in weights.items():
            total[name] += weight / len(parts)
    return total


def _alone(names: Iterable[str]) -> dict[str, TermWeights]:
    return {name: {name: 1.0} for name in names}


_SUBSETS = """
Chat        alpacaeval-easy         100   79
Chat        alpacaeval-length        95   79
Chat        alpacaeval-hard          95   76
Chat        mt-bench-easy            28   24
Chat        mt-bench-med             40   38
Chat_Hard   mt-bench-hard            37   35
Chat_Hard   llmbar-natural          100   76
Chat_Hard   llmbar-adver-neighbor   134  124
Chat_Hard   llmbar-adver-GPTInst     92   87
Chat_Hard   llmbar-adver-GPTOut      47   42
Chat_Hard   llmbar-adver-manual      46   43
Safety      refusals-dangerous      100  100
Safety      refusals-offensive      100  100
Safety      xstest-should-refuse    154  154
Safety      xstest-should-respond   250  247
Safety      donotanswer             136  135
Reasoning   math-prm                984  983
Reasoning   hep-cpp                 164  164
Reasoning   hep-go                  164  164
Reasoning   hep-java                164  164
Reasoning   hep-js                  164  164
Reasoning   hep-python              164  163
Reasoning   hep-rust                164  164
"""
"""Section, subset, its count in RewardBench 1 and in each language of M-RewardBench, as in their code.

Within a section a subset weighs as its count, and the sections weigh the same. The counts are those of the
rows, except math-prm: it has 447 rows, and its 984 (983) make mathematics weigh as much as code.
RewardBench's code has had the two xstest counts both ways round; these are those of the rows.
"""
_M_REWARDBENCH = "CohereLabsCommunity/multilingual-reward-bench"
_LANGUAGE_CODES = (
    "arb_Arab ces_Latn deu_Latn ell_Grek fra_Latn heb_Hebr hin_Deva ind_Latn ita_Latn jpn_Jpan kor_Hang "
    "nld_Latn pes_Arab pol_Latn por_Latn ron_Latn rus_Cyrl spa_Latn tur_Latn ukr_Cyrl vie_Latn zho_Hans "
    "zho_Hant"
)
LANGUAGES = tuple(_LANGUAGE_CODES.split())
"""M-RewardBench's, by the names of its configurations."""


def _sections(column: int) -> dict[str, TermWeights]:
    """Each subset's fraction of its section (they sum to 1), from a column of _SUBSETS."""
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for line in _SUBSETS.split("\n")[1:-1]:
        section, subset, *numbers = line.split()
        counts[section.replace("_", " ")][subset] = int(numbers[column])
    return {
        section: {subset: num / sum(subsets.values()) for subset, num in subsets.items()}
        for section, subsets in counts.items()
    }


def _language(language: str) -> TermWeights:
    """The weights of a language's subsets: the mean of its four sections."""
    weights = mean_weights(_sections(1).values())
    return {f"{language} {subset}": weight for subset, weight in weights.items()}


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
        _sections(0),
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
    Benchmark(
        "m-rewardbench",
        "M-RewardBench",
        row_readers.m_rewardbench,
        rules.first_beats_all,
        {language: _language(language) for language in LANGUAGES},
        tuple(
            BenchmarkPart(HubSet(_M_REWARDBENCH, "test", name), (f"*{name}*",), name)
            for name in LANGUAGES
        ),
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
QUOTED = tuple(BENCHMARKS)[:7]
"""The columns of the quoted table (Skywork-Reward-V2's) in its order; its last one is their mean."""
