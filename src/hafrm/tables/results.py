"""Tables of what `hafrm evaluate` finds: metrics, benchmarks, comparisons of models."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from hafrm.evaluation.benchmarks.run import BenchmarkResult, Benchmarks
from hafrm.evaluation.compare import ModelComparison
from hafrm.evaluation.evaluate import Evaluation, SetResult
from hafrm.tables.cells import stacked, with_count


def result_tables(
    result: Evaluation | ModelComparison | Benchmarks,
) -> Iterator[RenderableType]:
    """The tables of whatever `hafrm evaluate` found."""
    if isinstance(result, Benchmarks):
        return benchmark_tables(result)
    if isinstance(result, ModelComparison):
        return comparison_tables(result)
    return evaluation_tables(result)


def evaluation_tables(result: Evaluation) -> Iterator[RenderableType]:
    """Accuracy of every set with its interval beside pick-longer, then accuracy by length."""
    main = Table(
        title=f"{result.model}, scored with the {result.scored_with}", title_justify="left"
    )
    columns = ("set", "comparisons", "accuracy [95 %]", "pick longer [95 %]")
    for name in (*columns, "mean margin", "log-loss", "ECE", "equal", "ties"):
        wide = "[95 %]" in name
        main.add_column(name, justify="left" if name == "set" else "right", no_wrap=wide)
    for each in result.sets:
        m = each.metrics
        main.add_row(
            each.name,
            str(m.accuracy.num),
            str(m.accuracy.estimate),
            str(m.length.pick_longer.estimate),
            f"{m.mean_margin:.3f}",
            f"{m.calibration.log_loss:.3f}",
            f"{m.calibration.ece:.3f}",
            str(m.accuracy.num_equal),
            str(m.ties.num),
        )
    yield main
    yield _by_length(result.sets)
    if any(each.implicit for each in result.sets):
        yield _heads(result.sets)
    if result.fused is not None:
        yield f"fused score, fitted on the run's validation data: {result.fused}"
    report = result.encoding
    for reason, number in result.left_out.items():
        yield f"left out: {reason}: {number} rows"
    yield (
        f"bad rows {result.num_bad_rows}, responses cut {report.responses_cut}, "
        f"prompts cut {report.prompts_cut}, seam merges {report.seam_merges}"
    )


def _by_length(sets: tuple[SetResult, ...]) -> Table:
    title = "accuracy by length of the chosen response [95 %]"
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    for name in sets[0].metrics.length.slices:
        table.add_column(name, justify="right")
    for each in sets:
        slices = each.metrics.length.slices.values()
        table.add_row(each.name, *map(with_count, slices))
    return table


def _heads(sets: tuple[SetResult, ...]) -> Table:
    """Each head's accuracy, and that of both together, one below the other."""
    table = Table(title="both heads", title_justify="left")
    headings = ("accuracy [95 %]", "less the reward's [95 %]", "same sign [95 %]", "Spearman")
    table.add_column("set")
    table.add_column("scorer", no_wrap=True)
    for name in headings:
        table.add_column(name, justify="right")
    for each in sets:
        table.add_row(each.name, "reward", str(each.metrics.accuracy.estimate))
        if each.implicit is not None and each.agreement is not None:
            agree = each.agreement
            cells = (str(agree.same_sign), f"{agree.spearman:.3f}")
            table.add_row("", "implicit reward", str(each.implicit.accuracy.estimate), "", *cells)
        if each.fused is not None:
            accuracy = each.fused.accuracy.estimate
            table.add_row("", "fused", str(accuracy), str(each.fused_gain))
    return table


def benchmark_tables(found: Benchmarks) -> Iterator[RenderableType]:
    """The line that papers quote, for the model's heads and the length baselines; then its sections."""
    line = Table(title=f"{found.model} on published benchmarks [95 %]", title_justify="left")
    line.box, line.padding, line.pad_edge = SIMPLE_HEAD, (0, 1, 0, 0), False
    line.add_column("scorer", no_wrap=True)
    for result in found.results:
        title, mark = result.loaded.benchmark.title, "*" if result.missing else ""
        line.add_column(title.replace(" ", "\n") + mark, justify="right", no_wrap=True)
    averages = found.averages
    if averages:
        line.add_column("Avg.", justify="right", no_wrap=True)
    for scorer in found.results[0].scores:
        numbers = [result.scores[scorer].overall for result in found.results]
        cells = map(stacked, [*numbers, *([averages[scorer]] if averages else [])])
        # eight columns of these leave no room for a blank
        line.add_row(scorer.replace(" ", "\n"), *(cell.replace(", ", ",") for cell in cells))
    yield line
    for result in found.results:
        yield _sections(result)
        yield from _notes(result)


def _sections(result: BenchmarkResult) -> Table:
    table = Table(title=result.loaded.benchmark.title, title_justify="left")
    table.add_column("section")
    for scorer in result.scores:
        table.add_column(scorer, justify="right")
    scores = result.scores.values()
    some = next(iter(scores))
    for name in some.sections if len(some.sections) > 1 or result.missing else ():
        table.add_row(name, *(str(score.sections[name]) for score in scores))
    for name in some.extras:
        table.add_row(name, *(str(score.extras[name]) for score in scores))
    table.add_row("all", *(str(score.overall) for score in scores))
    table.add_row("equal scores", *(str(score.num_equal) for score in scores))
    return table


def _notes(result: BenchmarkResult) -> Iterator[str]:
    """What the numbers of a benchmark rest on."""
    loaded = result.loaded
    published = loaded.benchmark.num_rows
    of_all = "" if published in (None, loaded.num_rows) else f" of {published} published"
    yield f"{loaded.num_rows} rows{of_all} from {loaded.data}"
    for reason, number in loaded.left_out.items():
        yield f"not counted by the benchmark: {reason}: {number} rows"
    for head, report in result.encodings.items():
        yield f"{head}: responses cut {report.responses_cut}, prompts cut {report.prompts_cut}"
    if result.missing:
        named = ", ".join(result.missing[:6]) + (", ..." if len(result.missing) > 6 else "")
        yield f"* not the published score: no rows of {named}"


def comparison_tables(found: ModelComparison) -> Iterator[RenderableType]:
    """Accuracy of both sides on every set, their difference, and how surprising it is."""
    for side, paths in (("first", found.first), ("second", found.second)):
        if paths:
            yield f"{side}: {', '.join(paths)}"
    title = "accuracy [95 %]" + (" over seeds" if len(found.first) > 1 else "")
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    others = ("second", "difference", "p", "p (Holm)") if found.second else ()
    for name in ("comparisons", "first", *others):
        table.add_column(name, justify="right")
    for each in found.sets:
        cells = [each.name, str(each.num), str(each.first)]
        if each.difference is not None:
            adjusted = "" if each.p_adjusted is None else f"{each.p_adjusted:.3g}"
            cells += [str(each.second), str(each.difference.estimate)]
            cells += [f"{each.difference.p_value:.3g}", adjusted]
        table.add_row(*cells)
    yield table
