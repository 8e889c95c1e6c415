"""What the command line shows, as rich tables and lines; nothing is computed or printed here."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from hafrm.data.describe import Description, Lengths
from hafrm.evaluation.evaluate import Evaluation, SetResult
from hafrm.evaluation.metrics import Accuracy
from hafrm.training.plan import Plan, gib


def evaluation_tables(result: Evaluation) -> Iterator[RenderableType]:
    """Accuracy of every set with its interval beside pick-longer, then accuracy by length."""
    main = Table(
        title=f"{result.model}, scored with the {result.scored_with}", title_justify="left"
    )
    columns = ("set", "comparisons", "accuracy [95 %]", "pick longer", "mean margin", "log-loss")
    for name in (*columns, "ECE", "equal", "ties"):
        main.add_column(name, justify="left" if name == "set" else "right")
    for each in result.sets:
        m = each.metrics
        main.add_row(
            each.name,
            str(m.accuracy.num),
            str(m.accuracy.estimate),
            percent(m.length.pick_longer),
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
    table = Table(title="accuracy by length of the chosen response", title_justify="left")
    table.add_column("set")
    for name in sets[0].metrics.length.slices:
        table.add_column(name, justify="right")
    for each in sets:
        slices = each.metrics.length.slices.values()
        table.add_row(each.name, *(f"{percent(part)} of {part.num}" for part in slices))
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
        (
            "all",
            need.total,
            f"of {gib(target.memory)}, {gib(target.memory - target.usable)} left free",
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


def percent(accuracy: Accuracy) -> str:
    """An accuracy without its interval."""
    return f"{100 * accuracy.num_correct / accuracy.num:.1f} %" if accuracy.num else "n/a"
