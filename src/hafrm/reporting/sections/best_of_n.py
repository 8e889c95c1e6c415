"""Best of n: what the proxy gains when it picks among n answers, against what the gold reward does."""

from collections.abc import Iterator, Sequence

from hafrm.reporting.axes import Scale, Series
from hafrm.reporting.blocks import (
    Block,
    Cell,
    Column,
    Figure,
    More,
    Panels,
    Rows,
    Section,
    Table,
    words,
)
from hafrm.reporting.folders import Json, Material, dig, parts
from hafrm.reporting.numbers import MINUS, count, decimal, finite, number, share, with_bounds
from hafrm.reporting.plots import chart, end_label
from hafrm.reporting.sections.wins import win_tables


def section(material: Material) -> Section | None:
    """Proxy and gold reward of the answer that is picked, over n and over KL."""
    blocks: list[Block] = []
    for _, found in material.having("best_of_n"):
        models = parts(found, "models")
        figures = tuple(_figures(models, material))
        key = tuple((str(m.get("name")), material.colour(str(m.get("name")))) for m in models)
        if figures:
            blocks.append(Panels(figures, key if len(key) > 1 else (), _note(found)))
        if any(parts(model, "curve") for model in models):
            blocks.append(More("Numbers of the curves", (_curve_table(models, material),)))
        blocks += win_tables(found)
    if not blocks:
        return None
    lead = (
        "The answer that a model likes best of n. The proxy is the model's own reward, which rises by "
        "construction (shown as its gain over one answer); the gold reward says whether people "
        f"would agree. KL = log n {MINUS} (n {MINUS} 1)/n."
    )
    return Section("best-of-n", "Best of n", lead, tuple(blocks))


def _figures(models: Sequence[Json], material: Material) -> Iterator[Figure]:
    for x_key, over, scale in (("n", "n", Scale("n", x_log=2)), ("kl", "KL", Scale("KL, nat"))):
        for y_key, title in (("gold", "Gold reward"), ("proxy", "Proxy reward, gain")):
            series = [s for m in models if (s := _curve(m, x_key, y_key, material)) is not None]
            figure = chart(f"{title} over {over}", series, scale)
            if figure is not None:
                yield figure


def _curve(model: Json, x_key: str, y_key: str, material: Material) -> Series | None:
    points = [p for p in parts(model, "curve") if number(p.get(y_key)) is not None]
    numbers = [n for p in points if (n := number(p.get(y_key))) is not None]
    if not numbers:
        return None
    # rewards have no zero of their own: only their gain can be compared
    start = numbers[0].value if y_key == "proxy" else 0.0
    name = str(model.get("name"))
    return Series(
        name=name,
        x=[finite(p.get(x_key)) for p in points],
        y=[n.value - start for n in numbers],
        colour=material.colour(name),
        low=[n.low - start for n in numbers],
        high=[n.high - start for n in numbers],
        label=end_label(name),
    )


def _note(found: Json) -> str:
    """What the curves are of, and how often the pick of all answers is the gold reward's best."""
    prompts, answers = (count(found.get(f"num_{key}")) for key in ("prompts", "candidates"))
    note = f"{prompts} prompts, {answers} answers each."
    known = [
        (m.get("name"), top)
        for m in parts(found, "models")
        if (top := number(m.get("top1_agreement")))
    ]
    if known:
        told = ", ".join(f"{name} {share(top)}" for name, top in known)
        note += f" Of all answers the gold reward's best is picked by: {told}."
        chance = finite(found.get("top1_chance"))
        note += f" Chance: {100 * chance:.1f} %." if chance == chance else ""  # noqa: PLR0124
    gold = dig(found, "gold")
    return f"{note} Gold: {gold}." if isinstance(gold, str) else note


def _curve_table(models: Sequence[Json], material: Material) -> Table:
    groups = []
    for model in models:
        name = str(model.get("name"))
        rows = tuple(
            (
                words(count(p.get("n")), colour=material.colour(name)),
                Cell(decimal(p.get("kl"), 2)),
                Cell(with_bounds(number(p.get("proxy")))),
                Cell(with_bounds(number(p.get("gold"))), is_strong=True),
            )
            for p in parts(model, "curve")
        )
        groups.append(Rows(rows, name))
    columns = (
        *(Column("n", "word"), Column("KL"), Column("proxy reward [95 %]")),
        Column("gold reward [95 %]"),
    )
    return Table("Reward of the picked answer", columns, tuple(groups))
