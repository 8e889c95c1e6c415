"""`diagnose` runs one reward model, and others beside it, and gathers every diagnostic.

The files beside this one compute, each one thing from arrays; `judges` and `contest` run models. Nothing is
trained or selected here, and no model is changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from hafrm.errors import ConfigError, DataError
from hafrm.evaluation.diagnostics import label_noise
from hafrm.evaluation.diagnostics.consistency import Consistency
from hafrm.evaluation.diagnostics.contest import consistency, writing_policies
from hafrm.evaluation.diagnostics.decided import Decided
from hafrm.evaluation.diagnostics.judges import Judged, base_states, implicit_margins, judge
from hafrm.evaluation.diagnostics.label_noise import LabelNoise
from hafrm.evaluation.diagnostics.margins import MarginHistogram, margin_histogram
from hafrm.evaluation.diagnostics.representation import (
    Distance,
    Representation,
    distance,
    representation,
)
from hafrm.evaluation.diagnostics.slices import Slice, slice_accuracies
from hafrm.evaluation.diagnostics.style import StyleBias, style_biases
from hafrm.evaluation.diagnostics.temperature import Temperature, temperature
from hafrm.evaluation.diagnostics.worst import Example, worst
from hafrm.evaluation.evaluate import Heads, find_heads, read_comparisons
from hafrm.evaluation.metrics import (
    Accuracy,
    Agreement,
    Calibration,
    Result,
    agreement,
    calibration,
    pairwise_accuracy,
)
from hafrm.recipe_file import load_recipe
from hafrm.scoring.loading import load_config

Margins = Float[np.ndarray, " comparisons"]


@dataclass(frozen=True, slots=True)
class SetDiagnosis(Result):
    """What was found on one source, or on all of them together."""

    name: str
    num: int
    """Comparisons that people decided; ties are left out of everything."""
    accuracy: Accuracy
    temperature: Temperature
    calibration: Calibration
    """As the model is, without a temperature."""
    margins: MarginHistogram
    style: tuple[StyleBias, ...]
    slices: tuple[Slice, ...]
    agreement: Agreement | None
    """Of reward and implicit reward, where there are both heads."""


@dataclass(frozen=True, slots=True)
class SeenModel(Result):
    """A model's representation, and how far it is from the base model's."""

    model: str
    states: Representation
    distance: Distance | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that `hafrm diagnose` finds."""

    model: str
    scored_with: str
    """"reward" or "implicit reward"."""
    sets: tuple[SetDiagnosis, ...]
    label_noise: LabelNoise | None
    """None for a single model on data without votes."""
    representation: tuple[SeenModel, ...]
    """The model, then the others."""
    base: SeenModel | None
    num_states: int
    """Responses that the representations are of."""
    consistency: Consistency | None
    worst: tuple[Example, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        own, *others = [each.to_dict() for each in self.representation]
        noise, contest = self.label_noise, self.consistency
        return {
            "model": self.model,
            "scored_with": self.scored_with,
            "sets": [each.to_dict() for each in self.sets],
            "label_noise": None if noise is None else noise.to_dict(),
            "representation": own["states"]
            | {
                "num": self.num_states,
                "base": None if self.base is None else self.base.to_dict()["states"],
                "distance": own["distance"],
                "also": [e["states"] | {k: e[k] for k in ("model", "distance")} for e in others],
            },
            "consistency": None if contest is None else contest.to_dict(),
            "worst": [each.to_dict() for each in self.worst],
        }


def diagnose(  # noqa: PLR0913 - the verb and its options
    path: str | Path,
    sources: Sequence[str],
    *,
    also: Sequence[str] = (),
    policy: str | Path | None = None,
    reference: str | Path | None = None,
    base: str | Path | None = None,
    num_generations: int = 0,
    max_length: int | None = None,
    max_bad_fraction: float = 0.02,
    done: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Every diagnostic of the model at `path` on the sources' comparisons.

    `also` are further models (seeds, methods), for the label audit and to compare states with.
    `base` is the checkpoint that training began with; a run folder's is its recipe's. With
    `num_generations` policies write on so many prompts.

    Raises DataError for a source without a decided comparison, NumericsError for scores that are not
    finite, and what `evaluate` raises.
    """
    heads = _heads(path, also, policy, reference)
    base = _base_of(path) if base is None else Path(base)
    if base is not None:
        load_config(base)  # here, and not after minutes of scoring
    if num_generations:
        writing_policies(heads, base)
    decided = _read(sources, max_bad_fraction)
    options: dict[str, Any] = {"max_length": max_length, "done": done}
    own, encoded = judge(path, decided, reference=reference, **options)
    implicit = implicit_margins(heads[own.name], decided, reference=reference, **options)
    start = None if base is None else base_states(base, encoded, own)
    models = [own, *(judge(other, decided, **options)[0] for other in also)]
    margins = np.stack([model.margins for model in models])
    contest = None
    if num_generations:
        contest = consistency(heads, base, decided.groups, num_generations, **options)
    return Diagnosis(
        model=own.name,
        scored_with=own.scored_with,
        sets=_sets(decided, own.margins, implicit),
        label_noise=_label_noise(decided, margins, [model.name for model in models]),
        representation=tuple(_seen(model, start) for model in models),
        base=None if start is None else SeenModel(str(base), representation(start), None),
        num_states=len(own.states),
        consistency=contest,
        worst=worst(decided, margins),
    )


def _heads(
    path: str | Path,
    also: Sequence[str],
    policy: str | Path | None,
    reference: str | Path | None,
) -> dict[str, Heads]:
    """The heads of every model by its name, the first one's policy replaced by the one given.

    Raises ConfigError for a model given twice, and for options that would be ignored.
    """
    if len({str(path), *also}) < 1 + len(also):
        raise ConfigError("a model is given twice; --also takes other models than MODEL")
    own = find_heads(path)
    if policy is not None:
        if own.reward is None:
            raise ConfigError(f"--policy goes with a reward model, and {path} is a policy itself")
        own = Heads(own.reward, Path(policy))
    if reference is not None and own.policy is None:
        raise ConfigError(f"--reference is of a policy, and {path} has none; give --policy too")
    return {str(path): own} | {other: find_heads(other) for other in also}


def _read(sources: Sequence[str], max_bad_fraction: float) -> Decided:
    """The decided comparisons; raises DataError for a source that has none."""
    reading, groups = read_comparisons(sources, max_bad_fraction)
    decided = Decided.of(groups)
    known = {groups[i].source for i in decided.owner}
    for name in dict.fromkeys(group.source for group in reading.groups):
        if name not in known:
            raise DataError(
                f"{name} holds no comparison that people decided (all are ties, or nothing is compared); "
                "leave it out"
            )
    return decided


def _base_of(path: str | Path) -> Path | None:
    """The model that a run folder's recipe began with, where it is still there."""
    recipe = Path(path) / "recipe.yaml"
    if not recipe.is_file():
        return None
    base = Path(load_recipe(recipe).model.path)
    return base if base.is_dir() else None


def _sets(decided: Decided, margins: Margins, implicit: Margins | None) -> tuple[SetDiagnosis, ...]:
    return tuple(
        _set(name, decided, rows, margins[rows], None if implicit is None else implicit[rows])
        for name, rows in decided.of_set().items()
    )


def _set(
    name: str,
    decided: Decided,
    rows: Int[np.ndarray, " comparisons"],
    margins: Margins,
    implicit: Margins | None,
) -> SetDiagnosis:
    prompts: NDArray[Any] = decided.prompts[rows]
    chosen, rejected = ([texts[i] for i in rows] for texts in (decided.chosen, decided.rejected))
    return SetDiagnosis(
        name=name,
        num=len(rows),
        accuracy=pairwise_accuracy(margins, prompts),
        temperature=temperature(margins, prompts),
        calibration=calibration(margins),
        margins=margin_histogram(margins),
        style=style_biases(margins, chosen, rejected, prompts),
        slices=slice_accuracies(margins, decided.divisions(rows), prompts),
        agreement=None if implicit is None else agreement(margins, implicit, prompts),
    )


def _label_noise(
    decided: Decided, margins: Float[np.ndarray, "models comparisons"], models: list[str]
) -> LabelNoise | None:
    votes, known = decided.votes, label_noise.has_votes(decided.votes)
    if len(models) == 1 and not known.any():
        return None

    def audit(rows: Int[np.ndarray, " comparisons"]) -> label_noise.Audit:
        return label_noise.audit(margins[:, rows], votes[rows], decided.prompts[rows])

    parts = {n: rows for n, rows in decided.of_set().items() if n != "all" and known[rows].any()}
    return LabelNoise(
        models=tuple(models),
        all=audit(np.arange(len(decided))),
        by_set={name: audit(rows).predictors for name, rows in parts.items()},
    )


def _seen(model: Judged, base: Float[np.ndarray, "responses hidden"] | None) -> SeenModel:
    """Its representation, and its distance from the base model's."""
    gap = None if base is None else distance(model.states, base)
    return SeenModel(model.name, representation(model.states), gap)
