"""What lies in the folders that a page is about, read into typed results. No model is loaded.

Any file may be absent; a folder with none of them, or a file that is not what its name says, is an error.
"""

import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hafrm.errors import CheckpointError
from hafrm.recipe import Recipe
from hafrm.recipe_file import load_recipe
from hafrm.results import from_plain, read_result
from hafrm.run_folder import read_json_lines
from hafrm.statistics import Real

if TYPE_CHECKING:
    from hafrm.best_of_n.picks import BestOfN
    from hafrm.diagnostics.diagnosis import Diagnosis
    from hafrm.evaluation.metrics import Evaluation
    from hafrm.rlhf.policy_comparison import RlhfComparison
    from hafrm.study.study_result import StudyResult

RESULTS = {
    "evaluation": ("test.json", "hafrm.evaluation.metrics:Evaluation"),
    "diagnosis": ("diagnostics.json", "hafrm.diagnostics.diagnosis:Diagnosis"),
    "study": ("comparison.json", "hafrm.study.study_result:StudyResult"),
    # the modules of these two load torch
    "best_of_n": ("best_of_n.json", "hafrm.best_of_n.picks:BestOfN"),
    "rlhf_comparison": ("rlhf_comparison.json", "hafrm.rlhf.policy_comparison:RlhfComparison"),
}
"""Fields of `RunFiles`: the file of each, and its type, which is imported when the file is there."""
FILES = ("metrics.jsonl", "samples.jsonl", *(file for file, _ in RESULTS.values()))


@dataclass(frozen=True)
class GitState:
    """The code that a process ran."""

    commit: str
    changed: bool
    """Whether files differed from the commit."""


@dataclass(frozen=True)
class Session:
    """One process that worked on a run."""

    started: str
    command: str
    platform: str
    versions: dict[str, str]
    seed: int
    data: dict[str, str]
    """Digests of data files."""
    git: GitState | None = None
    counts: dict[str, int | list[str] | dict[str, int]] = field(default_factory=dict)
    template_sha256: str | None = None


@dataclass(frozen=True)
class ProvenanceFile:
    """provenance.json: one session for each process."""

    sessions: tuple[Session, ...]


@dataclass(frozen=True)
class MetricsRecord:
    """A line of metrics.jsonl."""

    step: int
    kind: str
    """train or validation for a reward model; rlhf (a batch) or held-out for a policy."""
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
    """One folder, read; None and () where a file is absent."""

    name: str
    """The shortest end of its path that no other folder has."""
    recipe: Recipe | None
    """Of a reward model's run."""
    recipe_text: str
    sessions: tuple[Session, ...]
    metrics: tuple[MetricsRecord, ...]
    samples: tuple[Sample, ...]
    evaluation: "Evaluation | None" = None
    diagnosis: "Diagnosis | None" = None
    study: "StudyResult | None" = None
    best_of_n: "BestOfN | None" = None
    rlhf_comparison: "RlhfComparison | None" = None

    @property
    def is_training(self) -> bool:
        """Whether a reward model was trained here."""
        return any(record.kind == "train" for record in self.metrics)

    @property
    def is_rlhf(self) -> bool:
        """Whether a policy was trained here."""
        return any(record.kind in ("rlhf", "held-out") for record in self.metrics)

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
        hint = (
            f"did you mean {' '.join(map(str, inside[:4]))}?" if inside else "give a run's folder"
        )
        raise CheckpointError(f"{path} holds nothing to report, none of {', '.join(FILES)}: {hint}")
    lines, samples = path / "metrics.jsonl", path / "samples.jsonl"
    metrics = tuple(_record(line, lines) for line in read_json_lines(lines))
    recipe, provenance = path / "recipe.yaml", path / "provenance.json"
    is_training = any(record.kind == "train" for record in metrics)
    results: dict[str, Any] = {
        field: read_result(path / file, pkgutil.resolve_name(kind))
        for field, (file, kind) in RESULTS.items()
        if (path / file).is_file()
    }
    return RunFiles(
        name=name,
        recipe=load_recipe(recipe) if is_training and recipe.is_file() else None,
        recipe_text=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        sessions=read_result(provenance, ProvenanceFile).sessions if provenance.is_file() else (),
        metrics=metrics,
        samples=tuple(from_plain(Sample, line, samples) for line in read_json_lines(samples)),
        **results,
    )


def _record(line: dict[str, Any], file: Path) -> MetricsRecord:
    kind = str(line.get("kind") or line.get("phase"))
    values = {name: v for name, v in line.items() if isinstance(v, int | float) and name != "step"}
    return from_plain(
        MetricsRecord, {"step": line.get("step"), "kind": kind, "values": values}, file
    )


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
    """What the page calls data sources: without folder and ending, unless two would be the same."""
    names = {}
    for source in sources:
        file, mark, options = source.rpartition("/")[2].partition("#")
        for ending in (".gz", ".jsonl", ".json", ".parquet", ".csv"):
            file = file.removesuffix(ending)
        names[source] = file + mark + options
    short = list(names.values())
    return {s: name if short.count(name) == 1 else s for s, name in names.items()}
