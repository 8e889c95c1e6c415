"""What the command line shows, as rich tables and lines; nothing is computed or printed here."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from hafrm.data.describe import Description, Lengths
from hafrm.evaluation.evaluate import Evaluation, SetResult
from hafrm.evaluation.metrics import Accuracy


def evaluation_tables(result: Evaluation) -> Iterator[RenderableType]:
    """Accuracy of every set with its interval beside pick-longer, then accuracy by length."""
    main = Table(
        title=f"{result.model}, scored with the {result.scored_with}", title_justify="left"
    )
    columns = ("set", "comparisons", "accuracy [95 %]", "pick longer [95 %]")
    for name in (*columns, "mean margin", "log-loss", "ECE", "equal", "ties"):
        main.add_column(name, justify="left" if name == "set" else "right")
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


def _of(accuracy: Accuracy) -> str:
    """An accuracy over the number of comparisons that it is of."""
    return f"{accuracy.estimate}\nof {accuracy.num}"
