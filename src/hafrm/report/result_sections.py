"""Sections about results: evaluations, diagnoses, studies, best of n, RLHF policies; texts to read.

The page shows each section's docstring above it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import compress

from hafrm.diagnostics.breakdown import cut_text
from hafrm.evaluation.metrics import LENGTH_SLICES, PairwiseMetrics, SetResult
from hafrm.report.html import Block, Details, Plots, Strips, Text, drawn
from hafrm.report.plots import AxisScale, chart, estimates
from hafrm.report.run_files import Material, RunFiles, Sample, short_sources
from hafrm.results import Cell, Table, columns
from hafrm.statistics import Estimate, wilson
from hafrm.study.study_result import Contrast

MAX_TEXTS = 20  # of one kind from one folder
MAX_ROWS = 24  # of a table that is shown unfolded


def evaluated_sets(material: Material) -> dict[str, list[tuple[RunFiles, SetResult]]]:
    """Test sets by their name on the page, with the runs that were evaluated on each; other data of the
    same name get a row of their own, recognised by how many they are and by their lengths."""
    pairs = [(run, s) for run in material.folders if run.evaluation for s in run.evaluation.sets]
    names = short_sources(list(dict.fromkeys(s.name for _, s in pairs)))
    result: dict[str, list[tuple[RunFiles, SetResult]]] = {}
    titles: dict[tuple[str, int, str], str] = {}
    for run, measured in pairs:
        name = names[measured.name]
        data = name, measured.accuracy.num, str(measured.length.pick_longer)
        title = titles.setdefault(data, f"{name} of {run.name}" if name in result else name)
        result.setdefault(title, []).append((run, measured))
    return result


def accuracy_section(material: Material) -> Iterator[Block]:
    """How often the response that annotators prefer gets the higher score, with 95 % intervals. Grey rows
    are baselines that see only the length; the vertical line is 50 %."""
    rows: list[tuple[Cell, ...]] = []
    agreement: list[str] = []
    for name, runs in evaluated_sets(material).items():
        scorers: list[tuple[str, PairwiseMetrics]] = [(run.name, s) for run, s in runs]
        for run, s in runs:
            if s.implicit is not None:
                scorers.append((f"{run.name}, implicit reward", s.implicit))
        part: list[tuple[Cell, ...]] = []
        for scorer, m in scorers:
            fit, counts = m.calibration, (m.accuracy.num, m.accuracy.num_equal)
            part.append((scorer, m.accuracy, counts[0], fit.log_loss, fit.ece, counts[1]))
        length = runs[0][1].length
        for rule, value in (("longer", length.pick_longer), ("shorter", length.pick_shorter)):
            part.append((f"pick the {rule}", value, value.num, None, None, None))
        rows += [(name if i == 0 else "", *row) for i, row in enumerate(part)]
        same = [(run.name, s.same_sign) for run, s in runs if s.same_sign is not None]
        agreement += [f"{run}, {name}: both heads prefer one response in {e}." for run, e in same]
    notes = (
        "log-loss: mean of \N{MINUS SIGN}log p(chosen) in nat; chance is 0.693. ECE: mean gap between "
        "predicted and observed probability. equal: comparisons with two equal scores, counted as wrong.",
        *agreement,
    )
    heads = columns(
        "test set | scorer | accuracy [95 %]: percent | comparisons: count | log-loss: decimal | "
        "ECE: decimal | equal: count"
    )
    if rows:
        yield Strips(Table("Accuracy by test set", heads, tuple(rows), notes), "accuracy [95 %]")


def benchmarks_section(material: Material) -> Iterator[Block]:
    """Published benchmarks, each head beside baselines that see only the length."""
    for folder in material.folders:
        yield from folder.benchmarks.tables() if folder.benchmarks else ()


def calibration_section(material: Material) -> Iterator[Block]:
    """On the dashed line a model is calibrated: where it gives a response 80 %, annotators prefer that
    response in 80 % of comparisons. Below the line it is overconfident."""
    # both sides of each comparison are in the bins, so the lower half mirrors the upper one

    def points(measured: SetResult) -> Iterator[tuple[float, Estimate]]:
        for b in (b for b in measured.calibration.bins if b.confidence >= 0.5):
            bounds = wilson(b.accuracy, b.num)
            yield b.confidence, Estimate(b.accuracy, *bounds, b.num, "wilson")

    scale = AxisScale("predicted probability", is_fraction=True, diagonal=True)
    yield from _dots_by_set(material, points, scale, "observed frequency")


def length_section(material: Material) -> Iterator[Block]:
    """A model that depends on length is right where the chosen response is longer, and wrong where it is
    shorter. A flat row of dots is best."""
    ticks = [name.replace("much ", "much\n").removeprefix("about ") for name in LENGTH_SLICES]
    scale = AxisScale("chosen response", is_fraction=True, reference=0.5, ticks=ticks)

    def points(measured: SetResult) -> Iterator[tuple[float, Estimate]]:
        yield from ((float(i), measured.length.slices[s]) for i, s in enumerate(LENGTH_SLICES))

    yield from _dots_by_set(material, points, scale, "accuracy")


def _dots_by_set(
    material: Material,
    points: Callable[[SetResult], Iterator[tuple[float, Estimate]]],
    scale: AxisScale,
    unit: str,
) -> tuple[Plots, ...]:
    """A plot for each test set, with the points of every run that was evaluated on it."""
    plots = []
    for name, runs in evaluated_sets(material).items():
        series = []
        for run, measured in runs:
            places, values = zip(*points(measured), strict=True)
            colour = material.colours[run.name]
            series.append(estimates(run.name, places, values, colour, style="dots"))
        plots.append(chart(name, series, scale, unit))
    return drawn(plots, material.key(run.name for run in material.folders if run.evaluation))


def diagnosis_section(material: Material) -> Iterator[Block]:
    """Where a model is right, how confident it is, and which labels may be wrong."""
    for folder in material.folders:
        yield from folder.diagnosis.tables() if folder.diagnosis else ()


def study_section(material: Material) -> Iterator[Block]:
    """Methods trained on the same data and tested on the same comparisons. A difference is significant if
    its p-value, adjusted for the number of tests (Holm), is below 0.05."""
    for result in [folder.study for folder in material.folders if folder.study]:
        *accuracies, learning_rates = result.tables()
        yield from map(_without_empty_columns, accuracies)
        differences = _differences((*result.average_differences, *result.differences))
        num = len(differences.table.rows)
        folded = Details(f"All {num} differences from the baseline", (differences,))
        yield folded if num > MAX_ROWS else differences
        yield Details("Learning rates", (learning_rates,))


def _without_empty_columns(table: Table) -> Table:
    has_text = [any(cells) for cells in zip(*table.rows, strict=True)]
    rows = tuple(tuple(compress(row, has_text)) for row in table.rows)
    return replace(table, columns=tuple(compress(table.columns, has_text)), rows=rows)


def _differences(contrasts: Sequence[Contrast]) -> Strips:
    rows: list[tuple[Cell, ...]] = []
    before = ""
    for c in contrasts:
        group = f"trained on {c.train}" if c.train else "averages"
        p_values = (c.p_value, c.p_adjusted, "yes" if c.is_significant else "no")
        name = f"{c.first} \N{MINUS SIGN} {c.second}"
        rows.append(("" if group == before else group, c.test, name, c.difference, *p_values))
        before = group
    heads = columns(
        "trained on | tested on | methods | difference [95 %]: percent | p: p | p (Holm): p | "
        "significant"
    )
    table = Table("Differences from the baseline", heads, tuple(rows))
    return Strips(table, "difference [95 %]", 0.0)


def best_of_n_section(material: Material) -> Iterator[Block]:
    """Of n answers to each prompt, the one that a model scores highest: the gold score shows whether the
    answers improve."""
    for result in [folder.best_of_n for folder in material.folders if folder.best_of_n]:
        plots = []
        for x_name, scale in (("n", AxisScale("n", x_log=2)), ("KL", AxisScale("KL, nat"))):
            gold = []
            for model in result.models:
                places = [float(p.n) if x_name == "n" else p.kl for p in model.curve]
                colour = material.colours[model.name]
                gold.append(estimates(model.name, places, [p.gold for p in model.curve], colour))
            plots.append(chart(f"Gold score over {x_name}", gold, scale))
        yield from drawn(plots, material.key(m.name for m in result.models))
        for table in result.tables():
            has_wins = any(column.name == "wins - losses" for column in table.columns)
            yield Strips(table, "wins - losses", 0.0) if has_wins else table


def policies_section(material: Material) -> Iterator[Block]:
    """Policies trained from the same start by different reward models, on held-out prompts."""
    for result in [folder.rlhf_comparison for folder in material.folders if folder.rlhf_comparison]:
        scores, wins = result.tables()
        yield Strips(scores, "gain over start [95 %]", 0.0)
        yield Strips(wins, "wins - losses", 0.0)


def examples_section(material: Material) -> Iterator[Block]:
    """The texts behind the numbers, exactly as they are in the data."""
    for folder in material.folders:
        for title, make in (("worst errors", _worst), ("RLHF samples", _samples)):
            if texts := tuple(make(folder))[:MAX_TEXTS]:
                yield Details(f"{folder.name}: {title}", texts)


def _worst(folder: RunFiles) -> Iterator[Details]:
    if folder.diagnosis is None:
        return
    names = short_sources([s.name for s in folder.diagnosis.sets])
    for example in folder.diagnosis.worst:
        note = f"margin {example.margin:.2f}, {names.get(example.set, example.set)}"
        if example.num_against > 1:
            note += f", {example.num_against} models agree"
        if example.votes is not None:
            note += f", votes {' to '.join(map(str, example.votes))}"
        texts = [(n, getattr(example, n)) for n in ("prompt", "chosen", "rejected")]
        yield _passage(note, texts)


def _samples(folder: RunFiles) -> Iterator[Details]:
    """Each prompt with its first, middle and last response."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in folder.samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    for prompt, samples in by_prompt.items():
        shown = {s.step: s for s in (samples[0], samples[len(samples) // 2], samples[-1])}
        texts = [("prompt", prompt)]
        texts += [
            (f"step {s.step}, reward {s.reward:.2f}, KL {s.kl:.2f}", s.response)
            for s in shown.values()
        ]
        yield _passage(f"{len(samples)} samples", texts)


def _passage(note: str, texts: Sequence[tuple[str, str]]) -> Details:
    """Folded texts, titled by the beginning of the first one."""
    line = " ".join(texts[0][1].split())
    title = line if len(line) <= 90 else line[:89].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    return Details(title, (Text(tuple((name, cut_text(text)) for name, text in texts)),), note)
