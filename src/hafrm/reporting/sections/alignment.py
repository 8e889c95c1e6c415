"""Reward models put to use: best-of-n curves and RLHF, what the proxy gains against what the gold does."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
from hafrm.reporting.folders import Folder, Json, Material, parts
from hafrm.reporting.numbers import (
    MINUS,
    Number,
    count,
    decimal,
    difference,
    finite,
    number,
    per_cent,
    share,
    with_bounds,
)
from hafrm.reporting.plots import chart, end_label, thinned
from hafrm.reporting.strips import bar


def best_of_n(material: Material) -> Section | None:
    """Proxy and gold reward of the answer that is picked, over n and over KL."""
    blocks: list[Block] = []
    for _, found in material.having("best_of_n"):
        models = parts(found, "models")
        figures = tuple(_best_of_n_figures(models, material))
        key = tuple((str(m.get("name")), material.colour(str(m.get("name")))) for m in models)
        prompts, answers = (count(found.get(f"num_{key}")) for key in ("prompts", "candidates"))
        note = f"{prompts} prompts, {answers} answers each.{_top_answers(models)}"
        if figures:
            blocks.append(Panels(figures, key if len(key) > 1 else (), note))
        blocks += [More("Numbers of the curves", (_curve_table(models, material),)), *_wins(found)]
    if not blocks:
        return None
    lead = (
        "The answer that a model likes best of n. The proxy is the model's own reward, which rises by "
        "construction (shown as its gain over one answer); the gold reward says whether people "
        f"would agree. KL = log n {MINUS} (n {MINUS} 1)/n."
    )
    return Section("best-of-n", "Best of n", lead, tuple(blocks))


def _best_of_n_figures(models: Sequence[Json], material: Material) -> Iterator[Figure]:
    for x_key, x_name, log in (("n", "n", 2), ("kl", "KL, nat", 0)):
        for y_key, title in (("gold", "Gold reward"), ("proxy", "Proxy reward, gain")):
            series = [s for m in models if (s := _curve(m, x_key, y_key, material)) is not None]
            scale = Scale(x_name, x_log=log)  # type: ignore[arg-type]
            over = "n" if x_key == "n" else "KL"
            figure = chart(f"{title} over {over}", series, scale)
            if figure is not None:
                yield figure


def _curve(model: Json, x_key: str, y_key: str, material: Material) -> Series | None:
    points = [p for p in parts(model, "curve") if number(p.get(y_key)) is not None]
    if not points:
        return None
    numbers = [n for p in points if (n := number(p.get(y_key))) is not None]
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


def _top_answers(models: Sequence[Json]) -> str:
    """How often each model's favourite of all answers is the gold's too."""
    known = [(m.get("name"), top) for m in models if (top := number(m.get("top1_agreement")))]
    told = ", ".join(f"{name} {share(top)}" for name, top in known)
    return f" Of all answers the gold reward's best is picked by: {told}." if told else ""


def _wins(found: Json) -> Iterator[Table]:
    """Answers of two models put before a judge."""
    wins = parts(found, "wins")
    if not wins:
        return
    rows = []
    for each in wins:
        shares = [finite(each.get(key)) for key in ("win", "tie", "lose")]
        names = ("win", "tie", "lose")
        rows.append(
            (
                words(f"{each.get('first')} against {each.get('second')}"),
                *(Cell(per_cent(Number(value)) if value == value else "n/a") for value in shares),  # noqa: PLR0124
                Cell(strip=bar(list(zip(shares, names, strict=True)))),
                Cell(difference(number(each.get("difference"))), is_strong=True),
                Cell(decimal(each.get("position_bias"), 2)),
            )
        )
    columns = (
        *(Column("answers", "word"), Column("wins"), Column("ties"), Column("loses")),
        *(Column("", "strip"), Column(f"wins {MINUS} losses [95 %]"), Column("position bias")),
    )
    note = "Position bias: how much more often the judge takes the answer that it is shown first."
    yield Table("Judged answers", columns, (Rows(tuple(rows)),), note)


class _Panel(NamedTuple):
    name: str
    title: str
    unit: str = ""
    per_cent: bool = False


RLHF = (
    _Panel("reward", "Reward of the model trained on"),
    _Panel("gold", "Gold reward"),
    _Panel("kl", "KL from the start", "nat"),
    _Panel("length", "Response length", "tokens"),
    _Panel("entropy", "Entropy", "nat per token"),
    _Panel("clip_fraction", "Clipped updates", per_cent=True),
    _Panel("policy_loss", "Policy loss"),
    _Panel("value_loss", "Value loss"),
)


def rlhf(material: Material) -> Section | None:
    """Curves of RLHF runs over steps, and proxy against gold over KL."""
    blocks: list[Block] = []
    runs = [folder for folder in material.folders if folder.rlhf]
    figures = [
        chart(p.title, _over_steps(runs, p.name, material), Scale(per_cent=p.per_cent), p.unit)
        for p in RLHF
    ]
    figures += [
        chart(title, _over_kl(runs, name, material), Scale("KL, nat"))
        for name, title in (("reward", "Reward over KL"), ("gold", "Gold reward over KL"))
    ]
    shown = tuple(figure for figure in figures if figure is not None)
    if shown:
        key = tuple((run.name, material.colour(run.name)) for run in runs)
        blocks.append(Panels(shown, key if len(key) > 1 else ()))
    for _, found in material.having("rlhf_comparison"):
        blocks += [*_compared(found, material), *_wins(found)]
    if not blocks:
        return None
    lead = (
        "A policy is trained to please a reward model, the proxy. Where the proxy's reward goes on "
        "rising and the gold reward falls, the policy has learnt the model's mistakes."
    )
    return Section("rlhf", "RLHF", lead, tuple(blocks))


def _over_steps(runs: Sequence[Folder], name: str, material: Material) -> list[Series]:
    return [
        thinned(
            Series(
                name=run.name,
                x=[finite(r.get("step")) for r in run.rlhf],
                y=[finite(r.get(name)) for r in run.rlhf],
                colour=material.colour(run.name),
                label=end_label(run.name) if len(runs) > 1 else "",
            )
        )
        for run in runs
    ]


def _over_kl(runs: Sequence[Folder], name: str, material: Material) -> list[Series]:
    return [
        Series(
            name=run.name,
            x=[finite(r.get("kl")) for r in run.rlhf],
            y=[finite(r.get(name)) for r in run.rlhf],
            colour=material.colour(run.name),
            label=end_label(run.name) if len(runs) > 1 else "",
        )
        for run in runs
    ]


def _compared(found: Json, material: Material) -> Iterator[Block]:
    """Proxy and gold over KL of every model and seed, a line each."""
    curves = parts(found, "curves")
    figures = []
    for name, title in (("gold", "Gold reward over KL"), ("proxy", "Proxy reward over KL")):
        series, named = [], set()
        for each in curves:
            model = str(each.get("model"))
            points = parts(each, "points")
            series.append(
                Series(
                    name=f"{model}, seed {each.get('seed')}",
                    x=[finite(p.get("kl")) for p in points],
                    y=[finite(p.get(name)) for p in points],
                    colour=material.colour(model),
                    label="" if model in named else end_label(model),
                )
            )
            named.add(model)
        figures.append(chart(title, series, Scale("KL, nat")))
    shown = tuple(figure for figure in figures if figure is not None)
    models = list(dict.fromkeys(str(each.get("model")) for each in curves))
    if shown:
        key = tuple((model, material.colour(model)) for model in models)
        seeds = ", ".join(str(seed) for seed in found.get("seeds") or ())
        yield Panels(shown, key, f"A line for each seed ({seeds})." if seeds else "")
