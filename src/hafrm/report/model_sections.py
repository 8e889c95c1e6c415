"""Sections about reward models: accuracy, calibration, length, and what `--diagnose` finds."""

from collections.abc import Iterator

from hafrm.evaluation.metrics import LENGTH_SLICES, Calibration, PairwiseMetrics, SetResult
from hafrm.report.html import Block, PageSection, Plots, Strips
from hafrm.report.plots import AxisScale, Plot, Series, chart, estimates, histogram
from hafrm.report.run_files import Material, RunFiles, short_sources
from hafrm.statistics import Estimate, wilson
from hafrm.table import Cell, Column, Table

Measured = tuple[RunFiles, SetResult]
"""A run, and what it got on one test set."""
SCORER_COLUMNS = (
    Column("scorer"),
    Column("accuracy [95 %]", "percent"),
    Column("comparisons", "count"),
)


def evaluated_sets(material: Material) -> dict[str, list[Measured]]:
    """Test sets by their name on the page, each with the runs that were evaluated on it."""
    pairs = [(run, s) for run in material.folders if run.evaluation for s in run.evaluation.sets]
    names = short_sources(list(dict.fromkeys(s.name for _, s in pairs)))
    result: dict[str, list[Measured]] = {name: [] for name in names.values()}
    for run, measured in pairs:
        result[names[measured.name]].append((run, measured))
    return result


def length_rules(measured: SetResult) -> dict[str, Estimate]:
    """What picking by length alone gets right."""
    length = measured.length
    return {"pick the longer": length.pick_longer, "pick the shorter": length.pick_shorter}


def accuracy_section(material: Material) -> PageSection | None:
    """Accuracy on every test set, beside what length alone gets right."""
    sets = evaluated_sets(material)
    if not sets:
        return None
    rows = [row for name, runs in sets.items() for row in _accuracy_rows(name, runs)]
    columns = (
        Column("test set"),
        *SCORER_COLUMNS,
        Column("log-loss", "decimal"),
        Column("ECE", "decimal"),
        Column("equal", "count"),
    )
    notes = (
        "log-loss: mean of \N{MINUS SIGN}log p(chosen) in nat; a coin gets 0.693. ECE: mean gap between "
        "predicted and observed probability. equal: comparisons with two equal scores, counted as wrong.",
    )
    table = Table("Accuracy by test set", columns, tuple(rows), notes)
    lead = (
        "How often the response that annotators prefer gets the higher score, with 95 % intervals. Grey "
        "rows are baselines that see only the length; the vertical line is 50 %."
    )
    return PageSection("accuracy", "Accuracy", lead, (Strips(table, ("accuracy [95 %]",)),))


def _accuracy_rows(name: str, runs: list[Measured]) -> Iterator[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = [_scorer_row(run.name, measured) for run, measured in runs]
    for run, measured in runs:
        others = {"implicit reward": measured.implicit, "fused": measured.fused}
        rows += [_scorer_row(f"{run.name}, {n}", m) for n, m in others.items() if m is not None]
    rules = length_rules(runs[0][1]).items()
    rows += [(rule, value, value.num, None, None, None) for rule, value in rules]
    yield from ((name if i == 0 else "", *row) for i, row in enumerate(rows))


def _scorer_row(name: str, measured: PairwiseMetrics) -> tuple[Cell, ...]:
    accuracy, fit = measured.accuracy, measured.calibration
    return (name, accuracy, accuracy.num, fit.log_loss, fit.ece, accuracy.num_equal)


def calibration_section(material: Material) -> PageSection | None:
    """Whether sigmoid(margin) is a probability: a reliability diagram for each test set."""
    scale = AxisScale("predicted probability", is_fraction=True, diagonal=True)
    plots = []
    for name, runs in evaluated_sets(material).items():
        series = [
            _reliability(run.name, measured.calibration, material.colours[run.name])
            for run, measured in runs
        ]
        plots.append(chart(name, series, scale, "observed frequency"))
    lead = (
        "On the dashed line a model is calibrated: where it gives a response 80 %, annotators prefer that "
        "response in 80 % of comparisons. Below the line it is overconfident."
    )
    return _plots_section("calibration", "Calibration", lead, plots, material)


def _reliability(name: str, fit: Calibration, colour: int) -> Series:
    # both sides of each comparison are in the bins, so the lower half mirrors the upper one
    bins = [b for b in fit.bins if b.confidence >= 0.5]
    values = [Estimate(b.accuracy, *wilson(b.accuracy, b.num), b.num, "wilson") for b in bins]
    return estimates(name, [b.confidence for b in bins], values, colour, style="dots")


def length_section(material: Material) -> PageSection | None:
    """Accuracy by the length of the chosen response against the rejected one."""
    ticks = [name.replace("much ", "much\n").removeprefix("about ") for name in LENGTH_SLICES]
    scale = AxisScale("chosen response", is_fraction=True, reference=0.5, ticks=ticks)
    plots, rows = [], list[tuple[Cell, ...]]()
    for name, runs in evaluated_sets(material).items():
        series = []
        for run, measured in runs:
            length = measured.length
            places = [float(i) for i in range(len(LENGTH_SLICES))]
            values = [length.slices[band] for band in LENGTH_SLICES]
            colour = material.colours[run.name]
            series.append(estimates(run.name, places, values, colour, style="dots"))
            row = (run.name, length.pick_longer, length.pearson, length.spearman)
            rows.append((name if run is runs[0][0] else "", *row))
        plots.append(chart(name, series, scale, "accuracy"))
    columns = (
        Column("test set"),
        Column("model"),
        Column("annotators prefer the longer", "percent"),
        Column("Pearson", "decimal"),
        Column("Spearman", "decimal"),
    )
    note = "Correlation of the margin with length(chosen) \N{MINUS SIGN} length(rejected); 0: none."
    table = Table("Margin and length", columns, tuple(rows), (note,))
    lead = (
        "A model that depends on length is right where the chosen response is longer, and wrong where it "
        "is shorter. A flat row of dots is best."
    )
    return _plots_section("length", "Length", lead, plots, material, table)


def _plots_section(
    key: str,
    title: str,
    lead: str,
    plots: list[Plot | None],
    material: Material,
    *tables: Table,
) -> PageSection | None:
    shown = tuple(plot for plot in plots if plot is not None)
    if not shown:
        return None
    evaluated = [run for run in material.folders if run.evaluation is not None]
    return PageSection(key, title, lead, (Plots(shown, material.key(evaluated)), *tables))


def agreement_section(material: Material) -> PageSection | None:
    """How often the two heads of a model prefer the same response."""
    rows: list[tuple[Cell, ...]] = []
    for name, runs in evaluated_sets(material).items():
        for run, measured in runs:
            both = measured.agreement
            if both is not None:
                rows.append((name, run.name, both.same_sign, both.pearson, both.spearman))
    if not rows:
        return None
    columns = (
        Column("test set"),
        Column("model"),
        Column("same preference [95 %]", "percent"),
        Column("Pearson", "decimal"),
        Column("Spearman", "decimal"),
    )
    table = Table("Reward and implicit reward of one model", columns, tuple(rows))
    lead = (
        "The reward head and the language-model head share one backbone: how often they prefer the same "
        "response."
    )
    blocks = (Strips(table, ("same preference [95 %]",)),)
    return PageSection("agreement", "Agreement", lead, blocks)


def diagnosis_section(material: Material) -> PageSection | None:
    """Every table of each diagnosis, with margins, label noise and spectra as plots."""
    blocks: list[Block] = []
    for run in material.folders:
        if run.diagnosis is None:
            continue
        plots = tuple(plot for plot in _diagnosis_plots(run, material) if plot is not None)
        blocks += [Plots(plots, note="Margins above zero are correct.")] if plots else []
        for table in run.diagnosis.tables():
            # texts, whose tables have no headings, have a section of their own; margins are plots here
            if any(c.name for c in table.columns) and "|margin|, from" not in table.title:
                blocks.append(_with_strips(table))
    lead = "Where a model is right, how confident it is, and which labels may be wrong."
    return PageSection("diagnosis", "Diagnosis", lead, tuple(blocks)) if blocks else None


def _with_strips(table: Table) -> Table | Strips:
    """The table with a strip of its first intervals; of annotators too, where it has both."""
    has_interval = [
        any(isinstance(row[number], Estimate) for row in table.rows)
        for number in range(len(table.columns))
    ]
    names = [c.name for c, has in zip(table.columns, has_interval, strict=True) if has]
    if not names:
        return table
    annotators = [name for name in names[1:2] if name.startswith("annotators:")]
    first = next(row[has_interval.index(True)] for row in table.rows)
    is_fraction = isinstance(first, Estimate) and first.proportion
    return Strips(table, (names[0], *annotators), 0.5 if is_fraction else None)


def _diagnosis_plots(run: RunFiles, material: Material) -> Iterator[Plot | None]:
    diagnosis, colour = run.diagnosis, material.colours[run.name]
    assert diagnosis is not None
    names = short_sources([s.name for s in diagnosis.sets])
    for s in diagnosis.sets:
        margins = s.margins
        title = f"Margins on {names[s.name]}, {run.name}"
        yield histogram(title, margins.edges, margins.right, margins.wrong, "comparisons")
    noise = diagnosis.label_noise
    if noise is not None:
        bands = noise.by_disagreement
        places = [band.low for band in bands]
        for title, values, reference in (
            ("Accuracy by disagreement", [band.accuracy for band in bands], 0.5),
            ("Annotators split", [band.split for band in bands], None),
        ):
            scale = AxisScale("disagreement of models", is_fraction=True, reference=reference)
            series = estimates("comparisons", places, values, colour, style="dots")
            yield chart(f"{title}, {run.name}", [series], scale)
    spectra = {r.model: r.spectrum for r in diagnosis.representations}
    lines = [
        _spectrum(name, spectrum, colour + number)
        for number, (name, spectrum) in enumerate(spectra.items())
    ]
    if diagnosis.base is not None:
        lines.append(_spectrum("base", diagnosis.base.spectrum, colour, style="dashed"))
    scale = AxisScale("principal direction", x_log=2, y_log=True)
    yield chart(f"Spectrum, {run.name}", lines, scale, "fraction of variance; dashed: base")


def _spectrum(name: str, spectrum: tuple[float, ...], colour: int, **options: str) -> Series:
    positive = [value for value in spectrum if value > 0]  # a logarithm has no zero
    places = [float(i) for i in range(1, len(positive) + 1)]
    return Series(name, places, positive, colour, **options)  # type: ignore[arg-type]
