"""The contents of the folders that a page is about, read into typed results. No model is loaded.

Any file may be absent; a folder with none of them, or a file that is not what its name says, is an error.
"""

import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hafrm.errors import CheckpointError, HafrmError
from hafrm.recipe import Recipe
from hafrm.recipe_file import load_recipe
from hafrm.results import from_plain, read_result
from hafrm.run_folder import read_json_lines
from hafrm.statistics import Real

if TYPE_CHECKING:
    from hafrm.benchmarks.benchmark_scores import BenchmarkResults
    from hafrm.best_of_n.picks import BestOfN
    from hafrm.diagnostics.diagnosis import Diagnosis
    from hafrm.evaluation.metrics import Evaluation
    from hafrm.rlhf.policy_comparison import RlhfComparison
    from hafrm.study.study_result import StudyResult

RESULTS = {
    "test.json": ("evaluation", "evaluation.metrics:Evaluation", "train --resume"),
    # an evaluation requested later replaces the run's own test
    "evaluation.json": ("evaluation", "evaluation.metrics:Evaluation", "evaluate"),
    "benchmarks.json": ("benchmarks", "benchmarks.benchmark_scores:BenchmarkResults", "evaluate"),
    "diagnostics.json": ("diagnosis", "diagnostics.diagnosis:Diagnosis", "evaluate --diagnose"),
    "comparison.json": ("study", "study.study_result:StudyResult", "compare"),
    # the modules of these two load torch
    "best_of_n.json": ("best_of_n", "best_of_n.picks:BestOfN", "best-of-n"),
    "rlhf_comparison.json": ("rlhf_comparison", "rlhf.policy_comparison:RlhfComparison", "rlhf"),
}
"""By file: its field of `RunFiles`, its type (imported if the file is there), the verb that writes it."""
FILES = ("metrics.jsonl", "samples.jsonl", *RESULTS)


@dataclass(frozen=True)
class GitState:
    """The code that a process ran."""

    commit: str
    changed: bool  # whether files differed from the commit


@dataclass(frozen=True)
class Session:
    """One process that worked on a run."""

    started: str
    command: str
    platform: str
    versions: dict[str, str]
    seed: int | None = None
    data: dict[str, str] = field(default_factory=dict)  # digests of data files
    git: GitState | None = None
    counts: dict[str, int | list[str] | dict[str, int]] = field(default_factory=dict)
    template_sha256: str | None = None


@dataclass(frozen=True)
class ProvenanceFile:
    """provenance.json, with a session for each process; or manifest.json, with the last one."""

    sessions: tuple[Session, ...] = ()
    process: Session | None = None

    @property
    def all(self) -> tuple[Session, ...]:
        """The sessions of either file."""
        return self.sessions or ((self.process,) if self.process else ())


@dataclass(frozen=True)
class MetricsRecord:
    """A line of metrics.jsonl."""

    step: int
    kind: str  # train or validation for a reward model; rlhf (a batch) or held-out for a policy
    values: dict[str, Real]


@dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl: what a policy wrote in RLHF."""

    step: int
    prompt: str
    response: str
    reward: Real
    kl: Real
    gold: float | None = None


@dataclass(frozen=True)
class RunFiles:
    """The contents of one folder; None or () for an absent file."""

    name: str = ""  # the shortest end of its path that no other folder has
    recipe: Recipe | None = None  # of a reward model's run
    recipe_text: str = ""
    sessions: tuple[Session, ...] = ()
    metrics: tuple[MetricsRecord, ...] = ()
    samples: tuple[Sample, ...] = ()
    unreadable: tuple[str, ...] = ()  # what is wrong with files that cannot be shown
    evaluation: "Evaluation | None" = None
    benchmarks: "BenchmarkResults | None" = None
    diagnosis: "Diagnosis | None" = None
    study: "StudyResult | None" = None
    best_of_n: "BestOfN | None" = None
    rlhf_comparison: "RlhfComparison | None" = None

    @property
    def is_training(self) -> bool:
        """Whether a reward model was trained here."""
        return any(record.kind in ("train", "validation") for record in self.metrics)

    def records(self, kind: str) -> list[MetricsRecord]:
        """The lines of one kind, by step."""
        return [record for record in self.metrics if record.kind == kind]


@dataclass(frozen=True)
class Material:
    """All folders of a page."""

    folders: tuple[RunFiles, ...]

    @cached_property
    def colours(self) -> dict[str, int]:
        """The number of a colour for each run and model, the same in every plot and table."""
        names = [f.name for f in self.folders if f.evaluation or f.diagnosis or f.metrics]
        for folder in self.folders:
            names += folder.study.methods if folder.study else ()
            names += (m.name for m in folder.best_of_n.models) if folder.best_of_n else ()
            names += folder.rlhf_comparison.models if folder.rlhf_comparison else ()
        return {name: number for number, name in enumerate(dict.fromkeys(names))}

    def key(self, names: Iterable[str]) -> tuple[tuple[str, int], ...]:
        """Names with their colours, for plots."""
        return tuple((name, self.colours[name]) for name in names)


def read_material(paths: Sequence[Path]) -> Material:
    """Everything in the folders, in their order; raises CheckpointError for one with nothing to show."""
    unique = list(dict.fromkeys(path.expanduser().resolve() for path in paths))
    names = short_paths(unique)
    return Material(tuple(_read(path, name) for path, name in zip(unique, names, strict=True)))


def _read(path: Path, name: str) -> RunFiles:
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}: give the folder of a run or of a result")
    if not any((path / file).is_file() for file in FILES):
        inside = sorted(p for p in path.iterdir() if any((p / file).is_file() for file in FILES))
        names = " ".join(map(str, inside[:4]))
        hint = f"did you mean {names}?" if names else "give a run's folder"
        raise CheckpointError(f"{path} holds nothing to report, none of {', '.join(FILES)}: {hint}")
    return replace(_read_files(path), name=name)


def _read_files(path: Path) -> RunFiles:
    unreadable: list[str] = []

    def read(file: str, parse: Callable[[Path], Any], verb: str = "") -> Any:
        # a file of another version must not prevent the rest of the page
        try:
            return parse(path / file) if (path / file).is_file() else None
        except (HafrmError, ValueError, KeyError, TypeError) as error:
            again = f"; `hafrm {verb}` writes it again" if verb else ""
            unreadable.append(f"{file} is not shown: {error}{again}")
            return None

    def result(kind: str) -> Callable[[Path], Any]:
        return lambda file: read_result(file, pkgutil.resolve_name(f"hafrm.{kind}"))

    values: dict[str, Any] = {}
    for file, (name, kind, verb) in RESULTS.items():
        values[name] = read(file, result(kind), verb) or values.get(name)

    def lines(parse: Callable[[dict[str, Any]], Any]) -> Callable[[Path], tuple[Any, ...]]:
        return lambda file: tuple(map(parse, read_json_lines(file)))

    for name, parse in (("metrics", _record), ("samples", partial(from_plain, Sample))):
        values[name] = read(f"{name}.jsonl", lines(parse)) or ()
    if unreadable and not any(values.values()):
        raise CheckpointError(unreadable[0])
    sessions = ()
    for file in ("manifest.json", "provenance.json"):
        processes = read(file, result("report.run_files:ProvenanceFile"))
        sessions = processes.all if processes else sessions
    text = path / "recipe.yaml"
    files = RunFiles(
        sessions=sessions,
        recipe_text=text.read_text(encoding="utf-8") if text.is_file() else "",
        **values,
    )
    recipe = read("recipe.yaml", load_recipe) if files.is_training else None
    return replace(files, recipe=recipe, unreadable=tuple(unreadable))


def _record(line: dict[str, Any]) -> MetricsRecord:
    kind = str(line.get("kind") or line.get("phase"))
    values = {name: v for name, v in line.items() if isinstance(v, int | float) and name != "step"}
    return from_plain(MetricsRecord, {"step": line.get("step"), "kind": kind, "values": values})


def short_paths(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other path has."""
    names = []
    for path in paths:
        others = [other.parts for other in paths if other != path]
        ends = (path.parts[-length:] for length in range(1, len(path.parts) + 1))
        unique = (e for e in ends if all(other[-len(e) :] != e for other in others))
        names.append("/".join(next(unique, path.parts)))
    return names


def short_sources(sources: Sequence[str]) -> dict[str, str]:
    """Names of data sources on the page: without folder and ending, unless two would be the same."""
    names = {}
    for source in sources:
        file, mark, options = source.rpartition("/")[2].partition("#")
        for ending in (".gz", ".jsonl", ".json", ".parquet", ".csv"):
            file = file.removesuffix(ending)
        names[source] = file + mark + options
    short = list(names.values())
    return {s: name if short.count(name) == 1 else s for s, name in names.items()}
