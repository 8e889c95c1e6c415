"""Tables of what `hafrm best-of-n` finds: how good the picks are, for every n, and against each other."""

import math
from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from hafrm.alignment.results import BestOfN, ModelResult
from hafrm.statistics import Estimate
from hafrm.tables.cells import stacked


def best_of_n_tables(found: BestOfN) -> Iterator[RenderableType]:
    """Picks by the gold score, the curves, wins, and what the candidates were."""
    yield _picks(found)
    yield from _curves(found)
    if found.wins:
        yield _wins(found)
    yield from _notes(found)


def _picks(found: BestOfN) -> Table:
    """One row for each model: its own score and the gold score of what it picks."""
    table = Table(
        title=f"best of {found.num_candidates} on {found.num_prompts} prompts [95 %]",
        title_justify="left",
    )
    table.add_column("picked by", no_wrap=True)
    golden = found.gold is not None
    headers = ["its own score"]
    headers += ["gold score", "above a random one", "picks the gold best"] if golden else []
    ranked = found.models[0].top1_agreement_judge is not None
    headers += ["picks the judge's best"] if ranked else []
    for name in headers:
        table.add_column(name, justify="right")
    for model in found.models:
        table.add_row(model.name, *_cells(model, golden=golden, ranked=ranked))
    blank = [""] * ranked
    for baseline in found.baselines:
        table.add_row(baseline.name, "", _number(baseline.gold[-1]), "", "", *blank)
    if golden or ranked:
        one = _number(found.models[0].curve[0].gold)
        chances = [_share(found.top1_chance)] if golden else []
        chances += [_share(found.top1_chance_judge)] if ranked else []
        table.add_row("a random one", "", *([one, ""] if golden else []), *chances)
    return table


def _cells(model: ModelResult, *, golden: bool, ranked: bool) -> list[str]:
    last = model.curve[-1]
    cells = [_number(last.proxy)]
    if golden:
        cells += [_number(last.gold), _number(model.gain), _number(model.top1_agreement)]
    return [*cells, _number(model.top1_agreement_judge)] if ranked else cells


def _curves(found: BestOfN) -> Iterator[Table]:
    """Score and gold score of the best of n, for n = 1, 2, 4, ... and all."""
    num = found.num_candidates
    shown = sorted({2**k for k in range(num.bit_length()) if 2**k <= num} | {num})
    kinds = (("gold score of the best of n", True), ("own score of the best of n", False))
    for title, golden in kinds:
        if golden and found.gold is None:
            continue
        table = Table(title=f"{title} [95 %]", title_justify="left")
        for name in ("n", "KL", *(model.name for model in found.models)):
            table.add_column(name, justify="right")
        extras = found.baselines if golden else ()
        for baseline in extras:
            table.add_column(baseline.name, justify="right")
        for n in shown:
            points = [model.curve[n - 1] for model in found.models]
            cells = [_number(point.gold if golden else point.proxy) for point in points]
            cells += [_number(baseline.gold[n - 1]) for baseline in extras]
            table.add_row(str(n), f"{points[0].kl:.2f}", *cells)
        yield table


def _wins(found: BestOfN) -> Table:
    table = Table(
        title=f"picks against each other, by {found.wins[0].judge} [95 %]", title_justify="left"
    )
    asked = any(each.conduct for each in found.wins)
    names = ("first", "second", "first wins", "tie", "second wins", "wins - losses", "same pick")
    for name in (*names, *(("position bias", "not judged") if asked else ())):
        table.add_column(name, justify="left" if name in ("first", "second") else "right")
    for each in found.wins:
        shares = (each.win, each.tie, each.lose, each.difference)
        cells = [each.first, each.second, *map(_number, shares), _share(each.same)]
        if asked:
            bias = None if each.conduct is None else each.conduct.position_bias
            cells += [_share(bias), str(each.num_not_judged)]
        table.add_row(*cells)
    return table


def _notes(found: BestOfN) -> Iterator[str]:
    """What the numbers rest on."""
    counts = found.counts
    yield (
        f"candidates: {counts.mean_candidates:.1f} a prompt; prompts with fewer than "
        f"{found.num_candidates}: {counts.num_fewer}; draws that hit the token limit: "
        f"{counts.num_unended}, that were blank: {counts.num_blank}"
    )
    for reason, number in counts.left_out.items():
        yield f"left out: {number} prompts: {reason}"
    for model in found.models:
        if found.gold is not None:
            yield (
                f"{model.name}: gold(n) - gold(1) = d ({model.alpha:.3f} - {model.beta:.3f} d), "
                f"d = sqrt(KL); highest at n = {model.peak}"
                + (f", since then {model.since_peak}" if model.peak != found.num_candidates else "")
            )
    said = [each.conduct for each in found.wins if each.conduct is not None]
    if said:
        kinds = {name: sum(each.said[name] for each in said) for name in said[0].said}
        yield "the judge said: " + ", ".join(f"{name} {number}" for name, number in kinds.items())


def _number(estimate: Estimate | None) -> str:
    return "" if estimate is None else stacked(estimate)


def _share(share: float | None) -> str:
    return "n/a" if share is None or math.isnan(share) else f"{100 * share:.1f} %"
