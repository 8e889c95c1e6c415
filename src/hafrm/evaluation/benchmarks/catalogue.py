"""The benchmarks that `hafrm evaluate --benchmark` knows: where they lie, their rules and their weights.

A new one is a function in `rows`, a rule in `rules` where none fits, and an entry here. The first seven
are the columns of the table that papers on reward models quote.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hafrm.data.files import HubSet
from hafrm.data.values import LeftOut
from hafrm.errors import ConfigError
from hafrm.evaluation.benchmarks import rows, rules
from hafrm.evaluation.benchmarks.items import Item, Verdict
from hafrm.evaluation.benchmarks.rules import STYLES, TIES, TIES_TERMS, Scores
from hafrm.evaluation.benchmarks.weights import (
    LANGUAGES,
    SECTIONS,
    within_language,
    within_section,
)

Weights = Mapping[str, float]
"""Of terms, in a sum; where all of a section's terms are there, it is as published."""


@dataclass(frozen=True)
class Part:
    """Files of one form."""

    name: str = ""
    hub: HubSet | None = None
    files: tuple[str, ...] = ("*",)
    """Patterns of paths in a local folder, best first; `*` crosses slashes, case does not matter."""
    columns: tuple[str, ...] = ()
    """What its rows have besides the benchmark's columns."""


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark."""

    name: str
    title: str
    columns: tuple[str, ...]
    """What every row has."""
    read_row: Callable[[Mapping[str, Any], str], Item | LeftOut]
    judge: Callable[[Sequence[Item], Iterable[Scores]], Iterator[Verdict]]
    sections: Mapping[str, Weights]
    """The published sections; the score is their mean."""
    parts: tuple[Part, ...]
    extras: Mapping[str, Weights] = field(default_factory=dict)
    """Other numbers that are quoted."""
    pooled: bool = False
    """The score is the mean of all verdicts, and not of the sections."""
    num_rows: int | None = None
    """Published rows, where they are known."""
    home: str = ""
    """Where to get what is not on the hub."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Every term that the whole benchmark has."""
        return tuple(dict.fromkeys(term for weights in self.sections.values() for term in weights))


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, "all" standing for those that papers quote.

    Raises ConfigError with the nearest name for an unknown one.
    """
    wanted = [name for given in names for name in (QUOTED if given == "all" else (given,))]
    for name in wanted:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name.lower(), BENCHMARKS, 1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            known = ", ".join([*BENCHMARKS, "all"])
            raise ConfigError(f"unknown benchmark {name!r}; {hint}known are {known}")
    return [BENCHMARKS[name] for name in dict.fromkeys(wanted)]


def _alone(names: Iterable[str]) -> dict[str, Weights]:
    return {name: {name: 1.0} for name in names}


_PPE_TASKS = ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
_RMB_SECTIONS = {
    f"{kind} {goal}": f"*{folder}/{goal}*"
    for kind, folder in (("Pairwise", "pairwise_set"), ("BoN", "bon_set"))
    for goal in ("Helpfulness", "Harmlessness")
}


_RMB_COLUMNS = {
    "Pairwise": ("pair_uid", "chosen", "reject"),
    "BoN": ("bon_uid", "bon_best", "loser_list"),
}


def _rmb_row(row: Mapping[str, Any], part: str) -> Item | LeftOut:
    pairwise = part.startswith("Pairwise")
    return rows.rmb_pairwise(row, part) if pairwise else rows.rmb_best_of_n(row, part)


BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (
        Benchmark(
            "rewardbench",
            "RewardBench v1",
            ("id", "prompt", "chosen", "rejected", "subset"),
            rows.rewardbench,
            rules.first_beats_all,
            {name: within_section(counts) for name, counts in SECTIONS.items()},
            (Part(hub=HubSet("allenai/reward-bench", "filtered"), files=("*filtered*", "*")),),
            num_rows=2985,
        ),
        Benchmark(
            "rewardbench2",
            "RewardBench v2",
            ("id", "prompt", "chosen", "rejected", "subset"),
            rows.rewardbench2,
            rules.best_of_four_and_ties,
            _alone(("Factuality", "Precise IF", "Math", "Safety", "Focus")) | {TIES: TIES_TERMS},
            (Part(hub=HubSet("allenai/reward-bench-2", "test"), files=("*test*", "*")),),
            num_rows=1865,
        ),
        Benchmark(
            "ppe-preference",
            "PPE Preference",
            ("question_id", "winner", "prompt", "response_1", "response_2"),
            rows.ppe_preference,
            rules.first_beats_all,
            _alone(("PPE Preference",)),
            (Part(hub=HubSet("lmarena-ai/PPE-Human-Preference-V1", "test")),),
            num_rows=16_038,
        ),
        Benchmark(
            "ppe-correctness",
            "PPE Correctness",
            ("question_id", "prompt", "scores", "sampled_conflict_pairs"),
            rows.ppe_correctness,
            rules.chosen_pairs,
            _alone(_PPE_TASKS),
            tuple(
                Part(task, HubSet(f"lmarena-ai/PPE-{task}-Best-of-K"), (f"*{task}*",))
                for task in _PPE_TASKS
            ),
            num_rows=2555,
        ),
        Benchmark(
            "rmb",
            "RMB",
            ("conversation_input",),
            _rmb_row,
            rules.first_beats_all,
            _alone(_RMB_SECTIONS),
            tuple(
                Part(name, files=(pattern,), columns=_RMB_COLUMNS[name.partition(" ")[0]])
                for name, pattern in _RMB_SECTIONS.items()
            ),
            home="github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark (folder RMB_dataset)",
        ),
        Benchmark(
            "rm-bench",
            "RM-Bench",
            ("id", "prompt", "chosen", "rejected", "domain"),
            rows.rm_bench,
            rules.styles_against_styles,
            {
                domain: {f"{domain} {style}": 1 / len(STYLES) for style in STYLES}
                for domain in rows.RM_BENCH_DOMAINS
            },
            (Part(hub=HubSet("THU-KEG/RM-Bench"), files=("*total_dataset*", "*train*", "*")),),
            extras={
                style: {
                    f"{domain} {style}": 1 / len(rows.RM_BENCH_DOMAINS)
                    for domain in rows.RM_BENCH_DOMAINS
                }
                for style in STYLES
            },
            num_rows=1327,
        ),
        Benchmark(
            "judgebench",
            "JudgeBench",
            ("pair_id", "source", "question", "response_A", "response_B", "label"),
            rows.judgebench,
            rules.first_beats_all,
            _alone(rows.JUDGEBENCH_PARTS.values()),
            (Part(hub=HubSet("ScalerLab/JudgeBench", "gpt"), files=("*gpt*", "*")),),
            pooled=True,
            num_rows=350,
        ),
        Benchmark(
            "m-rewardbench",
            "M-RewardBench",
            ("id", "prompt", "chosen", "rejected", "source"),
            rows.m_rewardbench,
            rules.first_beats_all,
            {language: within_language(language) for language in LANGUAGES},
            tuple(
                Part(
                    language,
                    HubSet("CohereLabsCommunity/multilingual-reward-bench", "test", language),
                    (f"*{language}*",),
                )
                for language in LANGUAGES
            ),
        ),
    )
}
QUOTED = tuple(BENCHMARKS)[:7]
"""In the order of the quoted table (Skywork-Reward-V2's), whose last column is their mean."""
