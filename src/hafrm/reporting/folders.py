"""What lies in the folders that a report is made of: runs, comparisons, best-of-n and RLHF outputs.

Only text and JSON are read. Any of the files may be absent; a folder with none of them, or a file that
is not what its name says, is an error.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hafrm.errors import CheckpointError
from hafrm.run_folder import read_json_lines

RECIPE, PROVENANCE, METRICS, SAMPLES = (
    *("recipe.yaml", "provenance.json"),
    *("metrics.jsonl", "samples.jsonl"),
)
RESULTS = ("test", "diagnostics", "comparison", "best_of_n", "rlhf_comparison")
"""Each a JSON file of that name."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """One folder, read; empty where a file is absent."""

    name: str
    """As it is called on the page: the shortest end of its path that no other folder has."""
    path: Path
    recipe_text: str
    recipe: Json
    sessions: list[Json]
    """One entry for each process that worked on the run."""
    metrics: list[Json]
    """Of reward-model training."""
    rlhf: list[Json]
    """The same of RLHF, told by their "phase"."""
    samples: list[Json]
    results: dict[str, Json] = field(default_factory=dict)
    """By name, those of RESULTS that are there."""
    is_exported: bool = False
    """Whether the run has its models, which it gets when it is done."""

    @property
    def is_run(self) -> bool:
        """Whether a reward model was trained or measured here."""
        return bool(self.metrics) or "test" in self.results

    def get(self, *keys: str) -> Any:
        """A value of the recipe, or None."""
        return dig(self.recipe, *keys)


@dataclass(frozen=True)
class Material:
    """All that a report is made of."""

    folders: tuple[Folder, ...]
    colours: dict[str, int]
    """A colour for each run and model, the same in every plot."""

    @property
    def runs(self) -> tuple[Folder, ...]:
        """The folders in which a reward model was trained or measured."""
        return tuple(folder for folder in self.folders if folder.is_run)

    def having(self, name: str) -> Iterator[tuple[Folder, Json]]:
        """The folders that have a result of this name, with it."""
        return ((f, f.results[name]) for f in self.folders if name in f.results)

    def colour(self, name: str) -> int:
        """The number of a colour; a name that nobody announced gets the first."""
        return self.colours.get(name, 0)


def read_folders(paths: Sequence[Path]) -> Material:
    """Everything in the folders, in their order; raises CheckpointError for one with nothing to show."""
    unique = list(dict.fromkeys(path.expanduser().resolve() for path in paths))
    names = short_names(unique)
    folders = tuple(_read(path, name) for path, name in zip(unique, names, strict=True))
    found: dict[str, int] = {}
    for name in _coloured(folders):
        found.setdefault(name, len(found))
    return Material(folders, found)


def _coloured(folders: Iterable[Folder]) -> Iterator[str]:
    for folder in folders:
        if folder.is_run or folder.rlhf or "diagnostics" in folder.results:
            yield folder.name
    for folder in folders:
        found = folder.results
        yield from (str(model.get("name")) for model in parts(found, "best_of_n", "models"))
        yield from map(str, dig(found, "rlhf_comparison", "models") or ())


def _read(path: Path, name: str) -> Folder:
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}: give the folder of a run or of a result")
    results = {n: _json(path / f"{n}.json") for n in RESULTS if (path / f"{n}.json").is_file()}
    metrics = read_json_lines(path / METRICS)
    samples = read_json_lines(path / SAMPLES)
    if not (results or metrics or samples):
        raise CheckpointError(_nothing_in(path))
    text = _text(path / RECIPE)
    sessions = _json(path / PROVENANCE).get("sessions") if (path / PROVENANCE).is_file() else None
    return Folder(
        name=name,
        path=path,
        recipe_text=text,
        recipe=_yaml(text, path / RECIPE),
        sessions=sessions or [],
        metrics=[record for record in metrics if "phase" not in record],
        rlhf=[record for record in metrics if "phase" in record],
        samples=samples,
        results=results,
        is_exported=(path / "model").is_dir(),
    )


def _nothing_in(path: Path) -> str:
    """What to say of a folder without anything that is known here."""
    known = [METRICS, SAMPLES, *(f"{name}.json" for name in RESULTS)]
    inside = sorted(p for p in path.iterdir() if any((p / name).is_file() for name in known))
    hint = (
        f"did you mean {' '.join(map(str, inside[:4]))}?"
        if inside
        else "give the folder of a run, or the --out of hafrm compare or hafrm best-of-n"
    )
    return f"{path} holds nothing to report, none of {', '.join(known)}: {hint}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Json:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}): write it again, or remove it"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object: write it again, or remove it")
    return found


def _yaml(text: str, path: Path) -> Json:
    try:
        found = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise CheckpointError(f"{path} is not YAML ({error}): mend it, or remove it") from error
    return found if isinstance(found, dict) else {}


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that tells it from the others."""
    names = []
    for path in paths:
        parts = path.parts
        for length in range(1, len(parts) + 1):
            others = [other for other in paths if other != path]
            if all(other.parts[-length:] != parts[-length:] for other in others):
                break
        names.append("/".join(parts[-length:]))
    return names


def source_names(sources: Sequence[str]) -> dict[str, str]:
    """Data sources as they are called on the page: without folder and ending, where that is clear."""
    short = {}
    for source in sources:
        name = source.rpartition("/")[2] if "://" not in source else source
        for ending in (".gz", ".jsonl", ".json", ".parquet", ".csv"):
            file, mark, options = name.partition("#")
            name = file.removesuffix(ending) + mark + options
        short[source] = name
    values = list(short.values())
    return {source: name if values.count(name) == 1 else source for source, name in short.items()}


def dig(found: Any, *keys: str) -> Any:
    """The value under nested keys, or None where one of them is absent."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def parts(found: Any, *keys: str) -> list[Json]:
    """The list of objects under nested keys; empty where there is none."""
    value = dig(found, *keys) if keys else found
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
