"""Tables of a comparison of methods."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from hafrm.evaluation.study.study import Study
from hafrm.evaluation.study.summary import Contrast, Summary
from hafrm.tables.cells import stacked


def study_tables(study: Study) -> Iterator[RenderableType]:
    """The averages first, then a table for each training set, then how learning rates were chosen."""
    summary = study.summary
    yield _averages(summary)
    for train in summary.train_sets:
        yield _matrix(study, train)
    if study.benchmarks:
        yield _benchmarks(study)
    yield _rates(study)
    yield _findings(summary)


def _averages(summary: Summary) -> Table:
    seeds = len(summary.cells[0].per_seed)
    table = Table(
        title=f"mean accuracy [95 % over prompts and {seeds} seeds]; * differs from {summary.methods[0]}",
        title_justify="left",
    )
    table.add_column("method")
    kinds = list(dict.fromkeys(each.kind for each in summary.averages))
    for kind in kinds:
        table.add_column(kind, justify="right")
    real = {(c.test, c.first) for c in summary.average_differences if is_real(c)}
    found = {(each.kind, each.method): each.accuracy for each in summary.averages}
    for method in summary.methods:
        marks = ["*" if (kind, method) in real else "" for kind in kinds]
        cells = [stacked(found[kind, method]) for kind in kinds]
        table.add_row(
            method,
            *(cell.replace("\n", f"{mark}\n") for cell, mark in zip(cells, marks, strict=True)),
        )
    return table


def _matrix(study: Study, train: str) -> Table:
    summary = study.summary
    table = Table(title=f"trained on {train}: accuracy [95 %]", title_justify="left")
    table.add_column("method")
    for test in summary.test_sets:
        table.add_column(test, justify="right")
    real = {(c.test, c.first) for c in summary.differences if c.train == train and is_real(c)}
    found = {(c.method, c.test): c.accuracy for c in summary.cells if c.train == train}
    for method in summary.methods:
        row = []
        for test in summary.test_sets:
            mark = "*" if (test, method) in real else ""
            row.append(stacked(found[method, test]).replace("\n", f"{mark}\n"))
        table.add_row(method, *row)
    table.add_row("pick longer", *(stacked(study.pick_longer[test]) for test in summary.test_sets))
    return table


def _benchmarks(study: Study) -> Table:
    table = Table(title="published benchmarks [95 %]", title_justify="left")
    table.add_column("trained on")
    table.add_column("method")
    names = list(dict.fromkeys(each.benchmark for each in study.benchmarks))
    for name in names:
        table.add_column(name, justify="right")
    found = {(each.train, each.method, each.benchmark): each.score for each in study.benchmarks}
    for train in study.summary.train_sets:
        for method in study.summary.methods:
            table.add_row(train, method, *(stacked(found[train, method, name]) for name in names))
    return table


def _rates(study: Study) -> Table:
    metric = study.plan.recipe.evaluation.metric
    table = Table(
        title=f"learning rates, chosen by validation {metric} on {study.plan.tuning_set.name}",
        title_justify="left",
    )
    for name in ("method", "chosen", "tried"):
        table.add_column(name)
    for each in study.tunings:
        tried = (
            f"{rate:.3g}: {'diverged' if value is None else f'{value:.3f}'}"
            for rate, value in each.tried.items()
        )
        table.add_row(each.method, f"{each.chosen:.3g}", "  ".join(tried))
    return table


def _findings(summary: Summary) -> str:
    lines = [
        f"{c.test}: {c.first} - {c.second} = {c.difference}, p {c.p_value:.2g} (Holm {c.p_adjusted:.2g})"
        for c in summary.average_differences
        if is_real(c)
    ]
    if lines:
        return "differences of averages that are real (Holm's p < 0.05):\n" + "\n".join(lines)
    return f"no average differs from that of {summary.methods[0]} (Holm's p >= 0.05 for all)"


def is_real(contrast: Contrast) -> bool:
    """Whether a difference stands after the adjustment for the number of tests."""
    return contrast.p_adjusted < 0.05
