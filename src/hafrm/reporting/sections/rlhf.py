"""RLHF: what a policy gains in the reward that it is trained on, against what the gold reward does."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hafrm.reporting.axes import Scale, Series
from hafrm.reporting.blocks import Block, Cell, Column, Figure, Panels, Rows, Section, Table, words
from hafrm.reporting.folders import Folder, Json, Material, parts
from hafrm.reporting.numbers import count, decimal, finite, number, with_bounds
from hafrm.reporting.plots import chart, end_label, thinned
from hafrm.reporting.sections.wins import win_tables

TRAINED, HELD_OUT = "rlhf", "held-out"
"""Phases of the records: of training batches, and of prompts that nothing is trained on."""


class _Panel(NamedTuple):
    name: str
    title: str
    unit: str = ""
    per_cent: bool = False


PANELS = (
    _Panel("reward", "Reward", "of the model trained on"),
    _Panel("gold", "Gold reward"),
    _Panel("kl", "KL from the start", "nat per response"),
    _Panel("length", "Response length", "tokens"),
    _Panel("ended", "Ended by themselves", "responses", per_cent=True),
    _Panel("entropy", "Entropy", "nat per token"),
    _Panel("clip_fraction", "Clipped updates", per_cent=True),
    _Panel("policy_loss", "Policy loss"),
    _Panel("value_loss", "Value loss"),
)


def section(material: Material) -> Section | None:
    """Curves of RLHF runs over steps, and proxy against gold over KL."""
    blocks: list[Block] = []
    runs = [folder for folder in material.folders if folder.rlhf]
    figures = [
        chart(p.title, _over_steps(runs, p.name, material), Scale(per_cent=p.per_cent), p.unit)
        for p in PANELS
    ]
    figures += [
        chart(title, _over_kl(runs, name, material), Scale("KL, nat"))
        for name, title in (("reward", "Reward over KL"), ("gold", "Gold reward over KL"))
    ]
    shown = tuple(figure for figure in figures if figure is not None)
    if shown:
        key = tuple((run.name, material.colour(run.name)) for run in runs)
        note = "Lines are training batches; dots are held-out prompts, with 95 % intervals."
        has_held_out = any(records(run, HELD_OUT) for run in runs)
        blocks.append(Panels(shown, key if len(key) > 1 else (), note if has_held_out else ""))
    comparisons = list(material.having("rlhf_comparison"))
    for folder, found in comparisons:
        which = f": {folder.name}" if len(comparisons) > 1 else ""
        blocks += [*_standings(found, material, which), *_compared(found, material)]
        blocks += win_tables(found)
    if not blocks:
        return None
    lead = (
        "A policy is trained to please a reward model, the proxy. Where the proxy's reward goes on rising "
        "and the gold reward falls, the policy has learnt the model's mistakes."
    )
    return Section("rlhf", "RLHF", lead, tuple(blocks))


def records(run: Folder, phase: str) -> list[Json]:
    """The records of one phase, by step."""
    return [record for record in run.rlhf if record.get("phase") == phase]


def _over_steps(runs: Sequence[Folder], name: str, material: Material) -> list[Series]:
    found = []
    for run in runs:
        batches = _series(run, TRAINED, "step", name, material)
        held_out = _series(run, HELD_OUT, "step", name, material)
        known = [s for s in (batches, held_out) if s is not None]
        found += [thinned(s) for s in known]
    return _labelled(found, len(runs))


def _over_kl(runs: Sequence[Folder], name: str, material: Material) -> list[Series]:
    """Of held-out prompts where there are some: those of a batch are noisy."""
    found = []
    for run in runs:
        series = _series(run, HELD_OUT, "kl", name, material)
        series = series or _series(run, TRAINED, "kl", name, material)
        found += [series] if series is not None else []
    return _labelled(found, len(runs))


def _labelled(found: Sequence[Series], num_runs: int) -> list[Series]:
    """A label at the last series of each run, where there are several runs."""
    last = {each.name: i for i, each in enumerate(found)}
    return [
        Series(
            *(each.name, each.x, each.y, each.colour, each.low, each.high, each.style),
            label=end_label(each.name) if num_runs > 1 and last[each.name] == i else "",
        )
        for i, each in enumerate(found)
    ]


def _series(run: Folder, phase: str, x: str, name: str, material: Material) -> Series | None:
    known = [r for r in records(run, phase) if finite(r.get(name)) == finite(r.get(name))]
    if not known:
        return None
    held_out = phase == HELD_OUT
    low, high = (
        [finite(r.get(f"{name}_{end}")) for r in known] if held_out else []
        for end in ("low", "high")
    )
    style = "dots" if held_out else "faint" if records(run, HELD_OUT) else "line"
    return Series(
        name=run.name,
        x=[finite(r.get(x)) for r in known],
        y=[finite(r.get(name)) for r in known],
        colour=material.colour(run.name),
        low=low,
        high=high,
        style=style,  # type: ignore[arg-type]
    )


def _standings(found: Json, material: Material, which: str) -> Iterator[Table]:
    """How each reward model's policy was judged."""
    standings = parts(found, "standings")
    if not standings:
        return
    colours = material.colours
    rows = tuple(
        (
            words(str(each.get("name")), colour=colours.get(str(each.get("name")))),
            Cell(with_bounds(number(each.get("score"))), is_strong=True),
            Cell(with_bounds(number(each.get("gain")))),
            Cell(decimal(each.get("kl"), 2)),
            Cell(decimal(each.get("length"), 0)),
            Cell(count(each.get("stopped"))),
        )
        for each in standings
    )
    columns = (
        *(
            Column("trained on", "word"),
            Column("score [95 %]"),
            Column("gain over the start [95 %]"),
        ),
        *(Column("KL"), Column("characters"), Column("stopped seeds")),
    )
    note = f"Answers to test prompts, scored by: {found.get('scored_by')}."
    title = f"Policies by the reward model that they were trained on{which}"
    yield Table(title, columns, (Rows(rows),), note)


def _compared(found: Json, material: Material) -> Iterator[Block]:
    """Proxy and gold over KL of every model and seed, a line each."""
    curves = parts(found, "curves")
    figures: list[Figure | None] = []
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
