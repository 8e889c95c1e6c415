"""Training curves: what was logged while one or several runs learnt, and the step that was exported."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from hafrm.reporting.axes import Scale, Series, Style
from hafrm.reporting.blocks import Figure, Panels, Section
from hafrm.reporting.folders import Folder, Json, Material
from hafrm.reporting.numbers import finite
from hafrm.reporting.plots import chart, end_label, thinned


class Curve(NamedTuple):
    """One panel: a logged name of each kind of record, and how it is read."""

    title: str
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    unit: str = ""
    per_cent: bool = False
    reference: float | None = None
    y_log: bool = False
    heads: int | None = None
    """Only for runs with so many heads; None: for all."""


CURVES = (
    Curve("Training loss", ("loss",), unit="nat"),
    Curve("Reward loss", ("reward_loss",), unit="nat", reference=0.6931),
    Curve("Policy loss", ("policy_loss",)),
    Curve("Validation loss", (), ("loss",), unit="nat", reference=0.6931),
    Curve("Accuracy", ("accuracy",), ("accuracy",), "of the head that judges", True, 0.5),
    Curve(
        "Implicit accuracy",
        *(("implicit_accuracy",), ("implicit_accuracy",), "policy head", True, 0.5),
        heads=2,
    ),
    Curve("Margin", ("margin",), ("margin",), "chosen over rejected", reference=0.0),
    Curve("Implicit margin", ("implicit_margin",), (), "policy head", reference=0.0),
    Curve("Rewards", ("chosen_reward", "rejected_reward"), unit="dashed: rejected"),
    Curve("Alpha", ("alpha",), unit="weight of the policy loss"),
    Curve("Gradient norm", ("grad_norm",), unit="before clipping", y_log=True),
    Curve("Learning rate", ("learning_rate",)),
    Curve("Throughput", ("tokens_per_second",), unit="tokens/s"),
)
NOT_DRAWN = {"step", "kind", "phase", "comparisons_per_second"}


def section(material: Material) -> Section | None:
    """The curves of all runs in one panel for each thing that was logged."""
    runs = [run for run in material.runs if run.metrics]
    figures = [_figure(curve, runs, material) for curve in (*CURVES, *_other_curves(runs))]
    shown = tuple(figure for figure in figures if figure is not None)
    if not shown:
        return None
    key = tuple((run.name, material.colour(run.name)) for run in runs)
    lead = (
        "Faint lines are training, each point the mean since the last one; dots are validation, with 95 % "
        "intervals."
    )
    if any(best_record(run) for run in runs):
        lead += " The upright line is the step that was exported."
    return Section("training", "Training", lead, (Panels(shown, key if len(key) > 1 else ()),))


def best_record(run: Folder) -> Json | None:
    """The validation record of the step that the run exports: best by its metric, the loss at a tie."""
    records = [r for r in run.metrics if r.get("kind") == "validation"]
    name = run.get("evaluation", "metric") or "accuracy"
    sign = -1.0 if name == "loss" else 1.0
    best: tuple[tuple[float, float], Json] | None = None
    for record in records:
        score = (sign * finite(record.get(name)), -finite(record.get("loss")))
        if best is None or score > best[0]:
            best = (score, record)
    return None if best is None else best[1]


def _other_curves(runs: Sequence[Folder]) -> list[Curve]:
    """Whatever else was logged as a number."""
    known = {name for curve in CURVES for name in (*curve.train, *curve.validation)}
    names = dict.fromkeys(
        name
        for run in runs
        for record in run.metrics
        if record.get("kind") == "train"
        for name, value in record.items()
        if finite(value) == value and not name.endswith(("_low", "_high"))
    )
    return [
        Curve(name.replace("_", " ").capitalize(), (name,))
        for name in names
        if name not in known | NOT_DRAWN
    ]


def _figure(curve: Curve, runs: Sequence[Folder], material: Material) -> Figure | None:
    series, marks = [], []
    for run in runs:
        colour = material.colour(run.name)
        if curve.heads is not None and _num_heads(run) != curve.heads:
            continue
        found = _series(run, "train", _judging(run, curve.train), colour)
        held_out = _series(run, "validation", curve.validation, colour)
        if held_out:
            found = [replace(each, style="faint") for each in found] + held_out
        if found and len(runs) > 1:
            found[-1] = replace(found[-1], label=end_label(run.name))
        series += found
        best = best_record(run)
        if best is not None and curve.validation:
            marks.append((finite(best.get("step")), colour))
    scale = Scale(
        per_cent=curve.per_cent, reference=curve.reference, y_log=curve.y_log, marks=marks
    )
    return chart(curve.title, series, scale, curve.unit)


def _num_heads(run: Folder) -> int:
    names = {name for record in run.metrics for name in record}
    return ("reward_loss" in names) + ("policy_loss" in names)


def _judging(run: Folder, names: tuple[str, ...]) -> tuple[str, ...]:
    """A run without a reward head is judged by its implicit reward, while it trains too."""
    logged = {name for r in run.metrics if r.get("kind") == "train" for name in r}
    instead = {"accuracy": "implicit_accuracy", "margin": "implicit_margin"}
    return tuple(instead.get(n, n) if n not in logged else n for n in names)


def _series(run: Folder, kind: str, names: Sequence[str], colour: int) -> list[Series]:
    found = []
    for position, name in enumerate(names):
        records = [r for r in run.metrics if r.get("kind") == kind and name in r]
        if not records:
            continue
        style: Style = "dots" if kind == "validation" else "dashed" if position else "line"
        low, high = (
            [finite(r.get(f"{name}_{end}")) for r in records] if kind == "validation" else []
            for end in ("low", "high")
        )
        series = Series(
            name=f"{run.name} ({kind})",
            x=[finite(r.get("step")) for r in records],
            y=[finite(r.get(name)) for r in records],
            colour=colour,
            low=low,
            high=high,
            style=style,
        )
        found.append(thinned(series))
    return found
