"""Tables of what preference data holds."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from hafrm.data.describe import Description, Lengths


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
