"""What the command line shows, as rich tables and lines; nothing is computed or printed here."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from hafrm.data.describe import Description, Lengths
from hafrm.evaluation.benchmarks.run import BenchmarkResult, Benchmarks
from hafrm.evaluation.compare import ModelComparison
from hafrm.evaluation.evaluate import Evaluation, SetResult
from hafrm.evaluation.metrics import Accuracy
from hafrm.evaluation.statistics import Estimate
from hafrm.training.plan import Plan, gib


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
        yield _implicit(result.sets)
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
        table.add_row(each.name, *map(_of, slices))
    return table


def _implicit(sets: tuple[SetResult, ...]) -> Table:
    table = Table(title="the policy's implicit reward", title_justify="left")
    for name in ("set", "accuracy [95 %]", "same sign as the reward", "Spearman"):
        table.add_column(name, justify="left" if name == "set" else "right")
    for each in sets:
        if each.implicit is not None and each.agreement is not None:
            agree = each.agreement
            estimate = str(each.implicit.accuracy.estimate)
            table.add_row(each.name, estimate, str(agree.same_sign), f"{agree.spearman:.3f}")
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
        cells = map(_over, [*numbers, *([averages[scorer]] if averages else [])])
        # eight columns of these leave no room for a blank
        line.add_row(scorer.replace(" ", "\n"), *(cell.replace(", ", ",") for cell in cells))
    yield line
    for result in found.results:
        yield _sections(result)
        yield from _notes(result)


def _over(estimate: Estimate) -> str:
    """An estimate in per cent over its interval, which fits into a narrow column."""
    value, _, interval = str(estimate).partition(" [")
    return f"{value}\n[{interval}" if interval else value


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


def data_tables(found: Description) -> Iterator[RenderableType]:
    """What a reading holds, what is wrong with it, and its lengths."""
    yield _pairs("what is in it", dict(_contents(found)))
    if found.bad_rows:
        yield _pairs("bad rows", {k: str(v) for k, v in found.bad_rows.items()})
    lengths = {
        "user turns": found.user_turns,
        "prompt words": found.prompt_words,
        "chosen words": found.chosen_words,
        "rejected words": found.rejected_words,
    }
    if found.tokens is not None:
        lengths |= {
            "prompt tokens": found.tokens.prompt,
            "response tokens": found.tokens.response,
            "sequence tokens": found.tokens.sequence,
        }
    yield _lengths(lengths)


def _contents(found: Description) -> Iterator[tuple[str, str]]:
    yield "rows", f"{found.num_rows} ({sum(found.bad_rows.values())} bad)"
    for reason, number in found.left_out.items():
        yield f"left out: {reason}", str(number)
    yield "groups, prompts", f"{found.num_groups}, {found.num_prompts} distinct"
    yield "responses", str(found.num_responses)
    yield "comparisons", f"{found.num_comparisons} ({found.num_ties} ties)"
    yield "with margin, votes", f"{found.num_with_margin}, {found.num_with_votes}"
    if found.num_with_votes:
        yield "contested votes", str(found.num_contested)
    for name, number in found.sources.items():
        yield f"from {name}", f"{number} comparisons"
    for tag, values in found.tags.items():
        shown = ", ".join(f"{value or '(none)'}: {n}" for value, n in list(values.items())[:8])
        yield f"by {tag}", shown
    bias = found.length_bias
    interval = f"[{100 * bias.low:.1f}, {100 * bias.high:.1f}]"
    yield "longer is chosen", f"{100 * bias.share:.1f} % {interval}"
    if found.unread_columns:
        yield "columns not read", ", ".join(found.unread_columns[:12])
    if found.tokens is not None:
        yield "shared prompts save", f"{100 * found.tokens.shared:.1f} % of all tokens"
        for name, value in found.tokens.encoding.items():
            if value:
                yield f"encoding: {name.replace('_', ' ')}", str(value)


def _pairs(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _lengths(rows: dict[str, Lengths]) -> Table:
    table = Table(title="lengths", title_justify="left")
    for name in ("", "mean", "p50", "p95", "max"):
        table.add_column(name, justify="right" if name else "left")
    for name, lengths in rows.items():
        numbers = (lengths.p50, lengths.p95, lengths.max)
        table.add_row(name, f"{lengths.mean:.1f}", *map(str, numbers))
    return table


def plan_tables(plan: Plan, remedies: list[tuple[str, Plan]]) -> Iterator[RenderableType]:
    """What a run needs, where it does not fit what would, and the work of a micro-batch."""
    target, need, counts = plan.target, plan.bytes, plan.counts
    place = "a GPU" if target.device == "cuda" else "a CPU"
    share = f"each of {target.ranks} ranks" if target.ranks > 1 else "one process"
    table = Table(title=f"memory of {share} on {place}", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    table.add_column("made of")
    trained, frozen = f"{counts.trainable:,} weights trained", f"{counts.frozen:,} frozen"
    shards = "in shards" if plan.sharded else "whole"
    held = max(need.logprobs, need.temporaries)
    what = "logits, the head's gradient" if held == need.logprobs else "of the backward pass"
    rows = (
        ("weights", need.weights, f"{trained}, {frozen}, {shards}"),
        ("gradients", need.gradients, "float32"),
        ("optimiser", need.optimiser, "AdamW's two moments, float32"),
        (
            "exchange between ranks",
            need.exchange,
            "gathered layers" if plan.sharded else "DDP's buckets",
        ),
        ("activations", need.activations, f"a micro-batch of {plan.tokens:,} tokens"),
        ("working memory", held, what),
        ("a step in all", need.step, f"{gib(target.usable)} of {gib(target.memory)} may be used"),
        (
            "passes without gradients",
            need.passes,
            "the reference's over whole weights, validation's",
        ),
    )
    for name, size, note in rows:
        if size:
            table.add_row(name, gib(size), note)
    yield table
    budget = f"training.max_tokens {plan.max_tokens}"
    yield f"{'fits' if plan.fits else 'does NOT fit'} with {budget}; {plan.flops.total:.3g} FLOP each"
    if remedies:
        yield _remedies(remedies)


def _remedies(remedies: list[tuple[str, Plan]]) -> Table:
    table = Table(title="what would fit", title_justify="left")
    for name in ("with", "fits", "GiB", "tokens"):
        table.add_column(name, justify="left" if name == "with" else "right")
    for words, plan in remedies:
        fits = "yes" if plan.fits else "no"
        table.add_row(words, fits, gib(plan.bytes.total), str(plan.max_tokens))
    return table


def _of(accuracy: Accuracy) -> str:
    """An accuracy over its interval, over the number of comparisons that it is of."""
    return f"{_over(accuracy.estimate)}\nof {accuracy.num}" if accuracy.num else "n/a"
