"""Sections about comparisons: methods of a study, best of n, policies of RLHF; and texts to read."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress

from hafrm.report.html import Block, Details, HeatMap, PageSection, Plots, Strips, Texts
from hafrm.report.plots import AxisScale, Plot, Series, chart, estimates
from hafrm.report.run_files import Material, RunFiles, Sample, short_sources
from hafrm.study.study_result import Contrast
from hafrm.table import Cell, Column, Table

MAX_CHARS = 1600
"""Of a text to read; a longer one is cut in the middle."""
MAX_TEXTS = 20
"""Of one kind from one folder."""
MAX_ROWS = 24
"""Of a table that is shown without being opened."""


def study_section(material: Material) -> PageSection | None:
    """Accuracies of methods as heat maps, every difference from the baseline, learning rates."""
    blocks: list[Block] = []
    for folder in material.folders:
        study = folder.study
        if study is None:
            continue
        *accuracies, learning_rates = study.tables()
        blocks += [HeatMap(_without_empty_columns(table)) for table in accuracies]
        differences = _differences(
            "Differences from the baseline", (*study.average_differences, *study.differences)
        )
        if len(differences.table.rows) > MAX_ROWS:
            num = len(differences.table.rows)
            blocks.append(Details(f"All {num} differences from the baseline", (differences,)))
        else:
            blocks.append(differences)
        blocks.append(Details("Learning rates", (learning_rates,)))
    lead = (
        "Methods trained on the same data and tested on the same comparisons. A difference is "
        "significant if its p-value, adjusted for the number of tests (Holm), is below 0.05."
    )
    return PageSection("comparison", "Methods", lead, tuple(blocks)) if blocks else None


def _without_empty_columns(table: Table) -> Table:
    has_text = [any(cells) for cells in zip(*table.rows, strict=True)]
    rows = tuple(tuple(compress(row, has_text)) for row in table.rows)
    return replace(table, columns=tuple(compress(table.columns, has_text)), rows=rows)


def _differences(title: str, contrasts: Sequence[Contrast]) -> Strips:
    rows: list[tuple[Cell, ...]] = []
    before = ""
    for c in contrasts:
        group = f"trained on {c.train}" if c.train else "averages"
        p_values = (c.p_value, c.p_adjusted, "yes" if c.is_significant else "no")
        name = f"{c.first} \N{MINUS SIGN} {c.second}"
        rows.append(("" if group == before else group, c.test, name, c.difference, *p_values))
        before = group
    columns = (
        *map(Column, ("trained on", "tested on", "methods")),
        Column("difference [95 %]", "percent"),
        Column("p", "p"),
        Column("p (Holm)", "p"),
        Column("significant"),
    )
    return Strips(Table(title, columns, tuple(rows)), ("difference [95 %]",), 0.0)


def best_of_n_section(material: Material) -> PageSection | None:
    """Own and gold score of the answer that each model picks, over n and over KL."""
    blocks: list[Block] = []
    for folder in material.folders:
        result = folder.best_of_n
        if result is None:
            continue
        plots: list[Plot | None] = []
        for x_name, scale in (("n", AxisScale("n", x_log=2)), ("KL", AxisScale("KL, nat"))):
            gold, own = list[Series](), list[Series]()
            for model in result.models:
                places = [float(p.n) if x_name == "n" else p.kl for p in model.curve]
                colour = material.colours[model.name]
                gold.append(estimates(model.name, places, [p.gold for p in model.curve], colour))
                own.append(estimates(model.name, places, [p.proxy for p in model.curve], colour))
            plots.append(chart(f"Gold score over {x_name}", gold, scale))
            # rewards have no zero of their own: only gains over one answer can be compared
            plots.append(chart(f"Own score over {x_name}", list(map(_gain, own)), scale, "gain"))
        key = tuple((m.name, material.colours[m.name]) for m in result.models)
        blocks.append(Plots(tuple(p for p in plots if p is not None), key))
        for table in result.tables():
            names = [column.name for column in table.columns]
            has_wins = "wins - losses" in names
            blocks.append(Strips(table, ("wins - losses",), 0.0) if has_wins else table)
    lead = (
        "Of n answers to each prompt, the one that a model scores highest. The model's own score rises by "
        "construction; the gold score shows whether the answers improve."
    )
    return PageSection("best-of-n", "Best of n", lead, tuple(blocks)) if blocks else None


def _gain(series: Series) -> Series:
    start = series.y[0]
    y, low, high = (
        [value - start for value in values] for values in (series.y, series.low, series.high)
    )
    return Series(series.name, series.x, y, series.colour, low, high)


def policies_section(material: Material) -> PageSection | None:
    """Policies trained by different reward models: scores and wins."""
    blocks: list[Block] = []
    for folder in material.folders:
        result = folder.rlhf_comparison
        if result is None:
            continue
        scores, wins = result.tables()
        blocks.append(Strips(scores, ("gain over start [95 %]",), 0.0))
        blocks.append(Strips(wins, ("wins - losses",), 0.0))
    lead = "Policies trained from the same start by different reward models, on held-out prompts."
    return PageSection("policies", "Policies", lead, tuple(blocks)) if blocks else None


def examples_section(material: Material) -> PageSection | None:
    """Worst errors and RLHF samples; folded until opened."""
    blocks: list[Block] = []
    for folder in material.folders:
        for title, make in (("worst errors", _worst), ("RLHF samples", _samples)):
            texts = tuple(make(folder))[:MAX_TEXTS]
            blocks += [Details(f"{folder.name}: {title}", texts)] if texts else []
    lead = "The texts behind the numbers, exactly as they are in the data."
    return PageSection("examples", "Examples", lead, tuple(blocks)) if blocks else None


def _worst(folder: RunFiles) -> Iterator[Details]:
    if folder.diagnosis is None:
        return
    names = short_sources([s.name for s in folder.diagnosis.sets])
    for example in folder.diagnosis.worst:
        note = f"{example.why}, margin {example.margin:.2f}, {names.get(example.set, example.set)}"
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
    return Details(title, (Texts(tuple((name, shortened(text)) for name, text in texts)),), note)


def shortened(text: str) -> str:
    """The text, cut in the middle if it is long; the number of characters left out is in its place."""
    if len(text) <= MAX_CHARS:
        return text
    head, tail = text[: MAX_CHARS * 3 // 4], text[-MAX_CHARS // 4 :]
    return f"{head}\n[{len(text) - len(head) - len(tail)} characters left out]\n{tail}"
