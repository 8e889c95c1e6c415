"""What lies in the folders that a page is about, read into typed results. No model is loaded.

Any file may be absent; a folder with none of them, or a file that is not what its name says, is an error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from hafrm.diagnostics.diagnosis import Diagnosis
from hafrm.errors import CheckpointError
from hafrm.evaluation.metrics import Evaluation
from hafrm.recipe import Recipe
from hafrm.recipe_file import load_recipe
from hafrm.results import Real, from_plain, read_result
from hafrm.run_folder import read_json_lines
from hafrm.study.study_result import StudyResult

if TYPE_CHECKING:
    from hafrm.best_of_n.picks import BestOfN
    from hafrm.rlhf.policy_comparison import RlhfComparison

T = TypeVar("T")

RESULTS = (
    "test.json",
    "diagnostics.json",
    "comparison.json",
    "best_of_n.json",
    "rlhf_comparison.json",
)
LOGS = ("metrics.jsonl", "samples.jsonl")


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
    counts: dict[str, int | dict[str, int]] = field(default_factory=dict)
    """Rows and tokens of the training data."""
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
    """What the page calls it: the shortest end of its path that no other folder has."""
    path: Path
    recipe: Recipe | None
    """Of a reward model's run."""
    recipe_text: str
    sessions: tuple[Session, ...]
    metrics: tuple[MetricsRecord, ...]
    samples: tuple[Sample, ...]
    evaluation: Evaluation | None
    diagnosis: Diagnosis | None
    study: StudyResult | None
    best_of_n: "BestOfN | None"
    rlhf_comparison: "RlhfComparison | None"

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
        names = dict.fromkeys(self._coloured())
        return {name: number for number, name in enumerate(names)}

    def _coloured(self) -> Iterator[str]:
        for folder in self.folders:
            if folder.evaluation or folder.diagnosis or folder.metrics:
                yield folder.name
        for folder in self.folders:
            if folder.study is not None:
                yield from folder.study.methods
            if folder.best_of_n is not None:
                yield from (model.name for model in folder.best_of_n.models)
            if folder.rlhf_comparison is not None:
                yield from folder.rlhf_comparison.models

    def key(self, folders: Sequence[RunFiles]) -> tuple[tuple[str, int], ...]:
        """Names and colours of some folders, for plots."""
        return tuple((folder.name, self.colours[folder.name]) for folder in folders)


def read_material(paths: Sequence[Path]) -> Material:
    """Everything in the folders, in their order; raises CheckpointError for one with nothing to show."""
    unique = list(dict.fromkeys(path.expanduser().resolve() for path in paths))
    names = short_paths(unique)
    return Material(tuple(_read(path, name) for path, name in zip(unique, names, strict=True)))


def _read(path: Path, name: str) -> RunFiles:
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}: give the folder of a run or of a result")
    if not any((path / file).is_file() for file in (*RESULTS, *LOGS)):
        raise CheckpointError(_nothing_in(path))
    metrics = tuple(map(_record, read_json_lines(path / "metrics.jsonl")))
    recipe, provenance = path / "recipe.yaml", _optional(path / "provenance.json", ProvenanceFile)
    is_training = any(record.kind == "train" for record in metrics)
    return RunFiles(
        name=name,
        path=path,
        recipe=load_recipe(recipe) if is_training and recipe.is_file() else None,
        recipe_text=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        sessions=() if provenance is None else provenance.sessions,
        metrics=metrics,
        samples=tuple(_samples(path / "samples.jsonl")),
        evaluation=_optional(path / "test.json", Evaluation),
        diagnosis=_optional(path / "diagnostics.json", Diagnosis),
        study=_optional(path / "comparison.json", StudyResult),
        best_of_n=_best_of_n(path / "best_of_n.json"),
        rlhf_comparison=_rlhf_comparison(path / "rlhf_comparison.json"),
    )


def _optional(path: Path, kind: type[T]) -> T | None:
    return read_result(path, kind) if path.is_file() else None


def _best_of_n(path: Path) -> "BestOfN | None":
    if not path.is_file():
        return None
    from hafrm.best_of_n.picks import BestOfN  # noqa: PLC0415 - loads torch

    return read_result(path, BestOfN)


def _rlhf_comparison(path: Path) -> "RlhfComparison | None":
    if not path.is_file():
        return None
    from hafrm.rlhf.policy_comparison import RlhfComparison  # noqa: PLC0415 - loads torch

    return read_result(path, RlhfComparison)


def _record(line: dict[str, Any]) -> MetricsRecord:
    kind = str(line.get("kind") or line.get("phase"))
    values = {name: v for name, v in line.items() if name not in ("step", "kind", "phase")}
    return MetricsRecord(
        int(line["step"]), kind, {n: v for n, v in values.items() if isinstance(v, int | float)}
    )


def _samples(path: Path) -> Iterator[Sample]:
    for number, line in enumerate(read_json_lines(path), start=1):
        try:
            yield from_plain(Sample, line)
        except ValidationError as error:
            raise CheckpointError(
                f"{path}, line {number}: not a sample; remove that line"
            ) from error


def _nothing_in(path: Path) -> str:
    names = (*LOGS, *RESULTS)
    inside = sorted(p for p in path.iterdir() if any((p / name).is_file() for name in names))
    hint = "give the folder of a run, or the --out of hafrm compare or hafrm best-of-n"
    if inside:
        hint = f"did you mean {' '.join(map(str, inside[:4]))}?"
    return f"{path} holds nothing to report, none of {', '.join(names)}: {hint}"


def short_paths(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other path has."""
    names = []
    for path in paths:
        others = [other.parts for other in paths if other != path]
        lengths = range(1, len(path.parts) + 1)
        ends = (path.parts[-length:] for length in lengths)
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
