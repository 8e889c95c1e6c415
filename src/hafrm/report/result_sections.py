"""Sections about results: evaluations, diagnoses, studies, best of n, RLHF policies; texts to read."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress

from hafrm.diagnostics.label_noise import cut_text
from hafrm.evaluation.metrics import LENGTH_SLICES, PairwiseMetrics, SetResult
from hafrm.report.html import Block, Details, PageSection, Strips, Text, drawn
from hafrm.report.plots import AxisScale, Plot, chart, estimates
from hafrm.report.run_files import Material, RunFiles, Sample, short_sources
from hafrm.results import Cell, Table, columns
from hafrm.statistics import Estimate, wilson
from hafrm.study.study_result import Contrast

MAX_TEXTS = 20
"""Of one kind from one folder."""
MAX_ROWS = 24
"""Of a table that is shown without being opened."""


def evaluated_sets(material: Material) -> dict[str, list[tuple[RunFiles, SetResult]]]:
    """Test sets by their name on the page, each with the runs that were evaluated on it."""
    pairs = [(run, s) for run in material.folders if run.evaluation for s in run.evaluation.sets]
    names = short_sources(list(dict.fromkeys(s.name for _, s in pairs)))
    result: dict[str, list[tuple[RunFiles, SetResult]]] = {name: [] for name in names.values()}
    for run, measured in pairs:
        result[names[measured.name]].append((run, measured))
    return result


def accuracy_section(material: Material) -> PageSection:
    """Accuracy on every test set, beside what length alone gets right."""
    rows: list[tuple[Cell, ...]] = []
    agreement: list[str] = []
    for name, runs in evaluated_sets(material).items():
        scorers: list[tuple[str, PairwiseMetrics]] = [(run.name, s) for run, s in runs]
        for run, s in runs:
            others = (("implicit reward", s.implicit), ("fused", s.fused))
            scorers += [(f"{run.name}, {head}", m) for head, m in others if m is not None]
        part: list[tuple[Cell, ...]] = []
        for scorer, m in scorers:
            fit, counts = m.calibration, (m.accuracy.num, m.accuracy.num_equal)
            part.append((scorer, m.accuracy, counts[0], fit.log_loss, fit.ece, counts[1]))
        length = runs[0][1].length
        for rule, value in (("longer", length.pick_longer), ("shorter", length.pick_shorter)):
            part.append((f"pick the {rule}", value, value.num, None, None, None))
        rows += [(name if i == 0 else "", *row) for i, row in enumerate(part)]
        agreement += [
            f"{run.name}, {name}: both heads prefer the same response in {s.same_sign}."
            for run, s in runs
            if s.same_sign is not None
        ]
    notes = (
        "log-loss: mean of \N{MINUS SIGN}log p(chosen) in nat; chance is 0.693. ECE: mean gap between "
        "predicted and observed probability. equal: comparisons with two equal scores, counted as wrong.",
        *agreement,
    )
    heads = columns(
        "test set | scorer | accuracy [95 %]: percent | comparisons: count | log-loss: decimal | "
        "ECE: decimal | equal: count"
    )
    table = Table("Accuracy by test set", heads, tuple(rows), notes)
    lead = (
        "How often the response that annotators prefer gets the higher score, with 95 % intervals. Grey "
        "rows are baselines that see only the length; the vertical line is 50 %."
    )
    blocks = (Strips(table, "accuracy [95 %]"),) if rows else ()
    return PageSection("accuracy", "Accuracy", lead, blocks)


def benchmarks_section(material: Material) -> PageSection:
    """What published benchmarks say of each model and of the two baselines."""
    results = [folder.benchmarks for folder in material.folders if folder.benchmarks is not None]
    lead = "Published benchmarks, each head beside baselines that see only the length."
    blocks = tuple(table for result in results for table in result.tables())
    return PageSection("benchmarks", "Benchmarks", lead, blocks)


def calibration_section(material: Material) -> PageSection:
    """Whether sigmoid(margin) is a probability: a reliability diagram for each test set."""
    scale = AxisScale("predicted probability", is_fraction=True, diagonal=True)
    plots = []
    for name, runs in evaluated_sets(material).items():
        series = []
        for run, measured in runs:
            # both sides of each comparison are in the bins, so the lower half mirrors the upper one
            bins = [b for b in measured.calibration.bins if b.confidence >= 0.5]
            values = [
                Estimate(b.accuracy, *wilson(b.accuracy, b.num), b.num, "wilson") for b in bins
            ]
            places, colour = [b.confidence for b in bins], material.colours[run.name]
            series.append(estimates(run.name, places, values, colour, style="dots"))
        plots.append(chart(name, series, scale, "observed frequency"))
    lead = (
        "On the dashed line a model is calibrated: where it gives a response 80 %, annotators prefer that "
        "response in 80 % of comparisons. Below the line it is overconfident."
    )
    blocks = drawn(plots, _evaluated_key(material))
    return PageSection("calibration", "Calibration", lead, blocks)


def length_section(material: Material) -> PageSection:
    """Accuracy by the length of the chosen response against the rejected one."""
    ticks = [name.replace("much ", "much\n").removeprefix("about ") for name in LENGTH_SLICES]
    scale = AxisScale("chosen response", is_fraction=True, reference=0.5, ticks=ticks)
    places = [float(i) for i in range(len(LENGTH_SLICES))]
    plots = []
    for name, runs in evaluated_sets(material).items():
        series = []
        for run, measured in runs:
            values = [measured.length.slices[band] for band in LENGTH_SLICES]
            colour = material.colours[run.name]
            series.append(estimates(run.name, places, values, colour, style="dots"))
        plots.append(chart(name, series, scale, "accuracy"))
    lead = (
        "A model that depends on length is right where the chosen response is longer, and wrong where it "
        "is shorter. A flat row of dots is best."
    )
    return PageSection("length", "Length", lead, drawn(plots, _evaluated_key(material)))


def _evaluated_key(material: Material) -> tuple[tuple[str, int], ...]:
    return material.key(run.name for run in material.folders if run.evaluation is not None)


def diagnosis_section(material: Material) -> PageSection:
    """Every table of each diagnosis."""
    diagnoses = [folder.diagnosis for folder in material.folders if folder.diagnosis is not None]
    lead = "Where a model is right, how confident it is, and which labels may be wrong."
    blocks = tuple(table for diagnosis in diagnoses for table in diagnosis.tables())
    return PageSection("diagnosis", "Diagnosis", lead, blocks)


def study_section(material: Material) -> PageSection:
    """Accuracies of methods, every difference from the baseline, learning rates."""
    blocks: list[Block] = []
    for folder in material.folders:
        study = folder.study
        if study is None:
            continue
        *accuracies, learning_rates = study.tables()
        blocks += map(_without_empty_columns, accuracies)
        differences = _differences((*study.average_differences, *study.differences))
        num = len(differences.table.rows)
        folded = Details(f"All {num} differences from the baseline", (differences,))
        blocks.append(folded if num > MAX_ROWS else differences)
        blocks.append(Details("Learning rates", (learning_rates,)))
    lead = (
        "Methods trained on the same data and tested on the same comparisons. A difference is "
        "significant if its p-value, adjusted for the number of tests (Holm), is below 0.05."
    )
    return PageSection("comparison", "Methods", lead, tuple(blocks))


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
    return Strips(
        Table("Differences from the baseline", heads, tuple(rows)), "difference [95 %]", 0.0
    )


def best_of_n_section(material: Material) -> PageSection:
    """Gold score of the answer that each model picks, over n and over KL; wins."""
    blocks: list[Block] = []
    for folder in material.folders:
        result = folder.best_of_n
        if result is None:
            continue
        plots: list[Plot | None] = []
        for x_name, scale in (("n", AxisScale("n", x_log=2)), ("KL", AxisScale("KL, nat"))):
            gold = []
            for model in result.models:
                places = [float(p.n) if x_name == "n" else p.kl for p in model.curve]
                colour = material.colours[model.name]
                gold.append(estimates(model.name, places, [p.gold for p in model.curve], colour))
            plots.append(chart(f"Gold score over {x_name}", gold, scale))
        blocks += drawn(plots, material.key(m.name for m in result.models))
        for table in result.tables():
            has_wins = any(column.name == "wins - losses" for column in table.columns)
            blocks.append(Strips(table, "wins - losses", 0.0) if has_wins else table)
    lead = (
        "Of n answers to each prompt, the one that a model scores highest: the gold score shows whether "
        "the answers improve."
    )
    return PageSection("best-of-n", "Best of n", lead, tuple(blocks))


def policies_section(material: Material) -> PageSection:
    """Policies trained by different reward models: scores and wins."""
    blocks: list[Block] = []
    for folder in material.folders:
        result = folder.rlhf_comparison
        if result is None:
            continue
        scores, wins = result.tables()
        blocks.append(Strips(scores, "gain over start [95 %]", 0.0))
        blocks.append(Strips(wins, "wins - losses", 0.0))
    lead = "Policies trained from the same start by different reward models, on held-out prompts."
    return PageSection("policies", "Policies", lead, tuple(blocks))


def examples_section(material: Material) -> PageSection:
    """Worst errors and RLHF samples; folded until opened."""
    blocks: list[Block] = []
    for folder in material.folders:
        for title, make in (("worst errors", _worst), ("RLHF samples", _samples)):
            texts = tuple(make(folder))[:MAX_TEXTS]
            blocks += [Details(f"{folder.name}: {title}", texts)] if texts else []
    lead = "The texts behind the numbers, exactly as they are in the data."
    return PageSection("examples", "Examples", lead, tuple(blocks))


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
    """Texts that open by the beginning of the first one."""
    line = " ".join(texts[0][1].split())
    title = line if len(line) <= 90 else line[:89].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    return Details(title, (Text(tuple((name, cut_text(text)) for name, text in texts)),), note)
