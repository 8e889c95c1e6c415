"""Sections about runs: the summary, training curves, RLHF curves, provenance.

The page shows each section's docstring, except the summary's, above it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hafrm.report.cautions import cautions
from hafrm.report.html import Block, Details, Text, drawn
from hafrm.report.plots import AxisScale, Plot, Series, chart
from hafrm.report.run_files import Material, MetricsRecord, RunFiles, Session, short_sources
from hafrm.results import Cell, Column, Table, columns


@dataclass(frozen=True)
class Curve:
    """One plot of a logged value."""

    title: str
    names: tuple[str, ...]  # the first of these that a run has is drawn
    unit: str = ""
    is_fraction: bool = False
    reference: float | None = None
    second: str = ""  # drawn dashed in the same plot


COIN = 0.6931  # -log(1/2), the loss at chance
TRAINING_CURVES = (
    Curve("Loss", ("loss",), "nat"),
    Curve("Reward loss", ("reward_loss",), "nat", reference=COIN),
    Curve("Policy loss", ("policy_loss",)),
    # a model without a reward head is evaluated by its implicit reward
    Curve("Accuracy", ("accuracy", "implicit_accuracy"), "of the scoring head", True, 0.5),
    Curve("Implicit accuracy", ("implicit_accuracy",), "policy head", True, 0.5),
    Curve("Margin", ("margin", "implicit_margin"), "chosen over rejected", reference=0.0),
    Curve("Implicit margin", ("implicit_margin",), "policy head", reference=0.0),
    Curve("Rewards", ("chosen_reward",), "dashed: rejected", second="rejected_reward"),
    Curve("Gradient norm", ("grad_norm",), "before clipping"),
    Curve("Learning rate", ("learning_rate",)),
    Curve("Throughput", ("tokens_per_second",), "tokens/s"),
)
RLHF_CURVES = (
    Curve("Reward", ("reward",), "of the model trained on"),
    Curve("Gold reward", ("gold",)),
    Curve("KL from the start", ("kl",), "nat per response"),
    Curve("Response length", ("length",), "tokens"),
    Curve("Complete responses", ("ended",), "ended by EOS", is_fraction=True),
    Curve("Entropy", ("entropy",), "nat per token"),
    Curve("Clipped updates", ("clip_fraction",), is_fraction=True),
    Curve("Policy loss", ("policy_loss",)),
    Curve("Value loss", ("value_loss",)),
)


def summary_section(material: Material) -> Iterator[Block]:
    """The accuracy of a run alone, what was trained, and what to be careful about."""
    yield from _headline(material)
    yield from _trained_table(material)
    if sentences := tuple(cautions(material)):
        labels = ("Cautions", *("",) * (len(sentences) - 1))
        yield Text(tuple(zip(labels, sentences, strict=True)), "points")


def _headline(material: Material) -> Iterator[Text]:
    evaluations = [run.evaluation for run in material.folders if run.evaluation]
    if len(evaluations) == 1:  # several are shown side by side in the next section
        (evaluation,) = evaluations
        first, *others = evaluation.single_sets
        names = short_sources([first.name, *(other.name for other in others)])
        value, _, interval = str(first.accuracy).partition(" [")
        held_out = "" if evaluation.trained_on else "held-out "
        label = f"[{interval} accuracy on {first.accuracy.num} {held_out}comparisons, {names[first.name]}"
        label += "".join(f"; {other.accuracy} on {names[other.name]}" for other in others[:3])
        label += f"; {len(others) - 3} more below" if len(others) > 3 else ""
        yield Text((("", value), ("", label)), "headline")


def _trained_table(material: Material) -> Iterator[Table]:
    rows: list[tuple[Cell, ...]] = []
    for run in material.folders:
        if run.recipe is None:
            continue
        training, sources = run.recipe.training, short_sources(run.recipe.data.train)
        lora = f", LoRA of rank {run.recipe.lora.rank}" if run.recipe.lora else ""
        base = run.recipe.model.path.rstrip("/").rpartition("/")[2]
        counts = run.sessions[-1].counts if run.sessions else {}
        comparisons = counts.get("train_comparisons")
        num = comparisons if isinstance(comparisons, int) else None
        what = run.name, run.recipe.method.name + lora, base, ", ".join(sources.values())
        steps = run.metrics[-1].step, training.batch_size, training.learning_rate
        rows.append((*what, num, *steps))
    heads = columns(
        "run | method | base model | training data | comparisons: count | steps: count | batch: count | "
        "learning rate: general"
    )
    if rows:
        yield Table("What was trained", heads, tuple(rows))


def training_section(material: Material) -> Iterator[Block]:
    """Faint lines: training batches, averaged between logged steps. Dots: validation [95 %]. The vertical
    line is the exported step."""
    runs = [run for run in material.folders if run.is_training]
    plots = [_curve_plot(curve, runs, material) for curve in TRAINING_CURVES]
    yield from drawn(plots, material.key(run.name for run in runs))


def rlhf_section(material: Material) -> Iterator[Block]:
    """The policy learns to get high rewards from a reward model. Where the reward still rises but the gold
    reward falls, the policy exploits the reward model's errors."""
    runs = [run for run in material.folders if run.records("rlhf") or run.records("held-out")]
    plots = [_curve_plot(curve, runs, material) for curve in RLHF_CURVES]
    for title, name in (("Reward over KL", "reward"), ("Gold reward over KL", "gold")):
        series = []
        for run in runs:
            # batches are noisy: use held-out prompts if there are any
            records = run.records("held-out") or run.records("rlhf")
            points = [r for r in records if {"kl", name} <= r.values.keys()]
            series.append(_series(run, points, name, material, x="kl"))
        plots.append(chart(title, series, AxisScale("KL, nat")))
    note = "Lines are training batches; dots are held-out prompts, with 95 % intervals."
    yield from drawn(plots, material.key(run.name for run in runs), note)


def _exported_step(run: RunFiles) -> int | None:
    """The step that is best by the run's metric, and by the loss at a tie."""
    metric = "accuracy" if run.recipe is None else run.recipe.evaluation.metric
    sign = -1.0 if metric == "loss" else 1.0
    records = [r for r in run.records("validation") if {metric, "loss"} <= r.values.keys()]
    best = max(records, key=lambda r: (sign * r.values[metric], -r.values["loss"]), default=None)
    return None if best is None else best.step


def _curve_plot(curve: Curve, runs: Sequence[RunFiles], material: Material) -> Plot | None:
    series, marks = [], []
    for run in runs:
        logged = {name for record in run.metrics for name in record.values}
        name = next((name for name in curve.names if name in logged), None)
        if name is None:
            continue
        batches, held_out = (
            [r for kind in kinds for r in run.records(kind) if name in r.values]
            for kinds in (("train", "rlhf"), ("validation", "held-out"))
        )
        style = "faint" if held_out else "line"
        series.append(_series(run, batches, name, material, style=style))
        if held_out:
            dots = _series(run, held_out, name, material, style="dots")
            series.append(replace(dots, name=f"{run.name} (held out)"))
        if curve.second in logged:
            series.append(_series(run, batches, curve.second, material, style="dashed"))
        if held_out and (step := _exported_step(run)) is not None:
            marks.append((float(step), material.colours[run.name]))
    scale = AxisScale(is_fraction=curve.is_fraction, reference=curve.reference, marks=marks)
    return chart(curve.title, series, scale, curve.unit)


def _series(
    run: RunFiles,
    records: Sequence[MetricsRecord],
    name: str,
    material: Material,
    x: str = "step",
    style: str = "line",
) -> Series:
    has_bounds = style == "dots" and f"{name}_low" in records[0].values
    ends = [f"{name}_low", f"{name}_high"] if has_bounds else []
    low, high = [[r.values[end] for r in records] for end in ends] or [[], []]
    places = [float(r.step) if x == "step" else r.values[x] for r in records]
    values, colour = [r.values[name] for r in records], material.colours[run.name]
    return Series(run.name, places, values, colour, low, high, style)  # type: ignore[arg-type]


def provenance_section(material: Material) -> Iterator[Block]:
    """What is needed to reproduce every number."""
    for folder in material.folders:
        parts: list[Block] = []
        if facts := tuple(fact for session in folder.sessions for fact in _facts(session)):
            parts.append(Table("Processes", (Column(""), Column("")), facts))
        if folder.recipe_text:
            parts.append(Details("Recipe", (Text((("", folder.recipe_text),), "file"),)))
        if parts:
            yield Details(folder.name, tuple(parts), is_open=len(material.folders) == 1)


def _facts(session: Session) -> Iterator[tuple[Cell, ...]]:
    yield "started", session.started
    yield "command", session.command
    if session.git is not None:
        changed = ", with uncommitted changes" if session.git.changed else ""
        yield "commit", session.git.commit + changed
    yield "platform", session.platform
    yield "versions", ", ".join(f"{name} {version}" for name, version in session.versions.items())
    if session.seed is not None:
        yield "seed", str(session.seed)
    if session.template_sha256 is not None:
        yield "chat template, SHA-256", session.template_sha256
    for file, digest in session.data.items():
        yield f"{file}, SHA-256", digest
    for name, value in session.counts.items():
        if value and not isinstance(value, dict):
            text = ", ".join(value) if isinstance(value, list) else str(value)
            yield name.replace("_", " "), text
