"""How alike both heads judge, and whether a reward model likes what its own policy head writes."""

from collections.abc import Iterator, Mapping
from typing import Any

from hafrm.reporting.blocks import Block, Cell, Column, Rows, Section, Table, words
from hafrm.reporting.folders import Json, Material, parts
from hafrm.reporting.numbers import bounds, decimal, number, per_cent, share, significant
from hafrm.reporting.sections.accuracy import measured_sets
from hafrm.reporting.sections.calibration import diagnosed_sets
from hafrm.reporting.strips import Mark, axis_of, heading, whiskers


def section(material: Material) -> Section | None:
    """Agreement on comparisons, and on continuations."""
    blocks: list[Block] = []
    rows = tuple(
        (
            words(name),
            Cell(run, colour=material.colour(run)),
            Cell(share(number(found.get("same_sign"))), is_strong=True),
            Cell(decimal(found.get("pearson"), 2)),
            Cell(decimal(found.get("spearman"), 2)),
        )
        for run, name, found in _judged_twice(material)
    )
    if rows:
        columns = (
            *(Column("set", "word"), Column("model", "word"), Column("same preference")),
            *(Column("Pearson"), Column("Spearman")),
        )
        caption = "Reward head and implicit reward of the policy head"
        blocks.append(Table(caption, columns, (Rows(rows),)))
    for folder, found in material.having("diagnostics"):
        if found.get("own_policy"):
            blocks += _consistency(folder.name, found["own_policy"], material)
    if not blocks:
        return None
    lead = (
        "Both heads were trained on one backbone: how often they prefer the same response says how much of "
        "what one learnt the other knows."
    )
    return Section("agreement", "Agreement", lead, tuple(blocks))


def _judged_twice(material: Material) -> Iterator[tuple[str, str, Json]]:
    seen = set()
    for run, name, diagnosed in diagnosed_sets(material):
        if diagnosed.get("agreement"):
            seen.add((run, name))
            yield run, name, diagnosed["agreement"]
    for name, found in measured_sets(material).items():
        for each in found:
            if each.data.get("agreement") and (each.run, name) not in seen:
                yield each.run, name, each.data["agreement"]


def _consistency(name: str, found: Json, material: Material) -> Iterator[Table]:
    wins = parts(found, "preferences")
    if wins:
        yield _wins(name, wins, material)
        return
    rows = tuple((words(key), Cell(text)) for key, text in _leaves("", found))
    yield Table(f"Consistency, {name}", (Column("", "word"), Column("")), (Rows(rows),))


def _wins(name: str, wins: list[Json], material: Material) -> Table:
    """Whose continuations reward models prefer."""
    axis = axis_of([number(each.get("win")) for each in wins], 0.5)
    groups: dict[str, list[tuple[Cell, ...]]] = {}
    for each in wins:
        own, judge = bool(each.get("is_own")), str(each.get("reward_model"))
        win = number(each.get("win"))
        groups.setdefault(f"judged by {judge}", []).append(
            (
                words(
                    f"{each.get('policy')} over {each.get('against')}" + (" (own)" if own else "")
                ),
                Cell(per_cent(win), is_strong=own),
                Cell(bounds(win)),
                Cell(strip=whiskers(axis, [Mark(win, material.colour(judge) if own else None)])),
                Cell(share(number(each.get("length_matched")))),
                Cell(share(number(each.get("longer")))),
            )
        )
    columns = (
        *(Column("continuations of", "word"), Column("preferred"), Column("95 % interval")),
        *(Column("", "strip", heading(axis)), Column("of like length"), Column("longer")),
    )
    note = (
        "Preferred: share of prompts on which the first policy's continuation has the higher reward; the "
        "same where both are of like length; share on which it is the longer one. Own: the judge's policy."
    )
    rows = tuple(Rows(tuple(each), title) for title, each in groups.items())
    return Table(
        f"Does a reward model like what its own policy writes, {name}", columns, rows, note
    )


def _leaves(prefix: str, found: Any) -> Iterator[tuple[str, str]]:
    """A line for each number, called by the keys that lead to it."""
    estimate = number(found)
    if estimate is not None:
        yield prefix, share(estimate)
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _leaves(f"{prefix}, {key}" if prefix else str(key), value)
    elif isinstance(found, str | bool):
        yield prefix, str(found).lower() if isinstance(found, bool) else found
    elif isinstance(found, int | float):
        yield prefix, significant(found)
