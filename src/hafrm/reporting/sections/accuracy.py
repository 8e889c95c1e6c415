"""Accuracy on every test set, beside what length alone gets right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hafrm.reporting.blocks import Block, Cell, Column, Rows, Section, Table, words
from hafrm.reporting.folders import Json, Material, dig, parts, source_names
from hafrm.reporting.numbers import Number, bounds, count, decimal, number, per_cent
from hafrm.reporting.strips import Axis, Mark, axis_of, heading, whiskers


@dataclass(frozen=True)
class Measured:
    """What one run got on one test set."""

    run: str
    data: Json
    """As `hafrm evaluate` or `hafrm diagnose` writes it."""

    @property
    def accuracy(self) -> Number | None:
        """Of what the run is judged by."""
        return number(self.data.get("accuracy"))

    @property
    def implicit(self) -> Number | None:
        """Of the policy head, where the reward head judges."""
        return number(dig(self.data, "implicit", "accuracy"))

    def length_rule(self, name: str) -> Number | None:
        """What `pick_longer` or `pick_shorter` gets right."""
        return number(dig(self.data, "length", name))


def measured_sets(material: Material) -> dict[str, list[Measured]]:
    """Test sets by the name that the page gives them, each with the runs that were measured on it.

    `hafrm diagnose` measures accuracy too; where a run has both, its test results count.
    """
    found = [(f.name, s) for f, test in material.having("test") for s in parts(test, "sets")]
    tested = {(run, each.get("name")) for run, each in found}
    found += [
        (f.name, s)
        for f, diagnosed in material.having("diagnostics")
        for s in parts(diagnosed, "sets")
        if number(s.get("accuracy")) is not None and (f.name, s.get("name")) not in tested
    ]
    names = source_names(list(dict.fromkeys(str(each.get("name")) for _, each in found)))
    result: dict[str, list[Measured]] = {name: [] for name in names.values()}
    for run, each in found:
        result[names[str(each.get("name"))]].append(Measured(run, each))
    return result


def section(material: Material) -> Section | None:
    """One table for all runs and sets."""
    sets = measured_sets(material)
    if not sets:
        return None
    lead = (
        "How often the response that people preferred gets the higher score, with 95 % intervals. "
        "The grey rows look at length only; the line is one half."
    )
    blocks: tuple[Block, ...] = (_table(sets, material),)
    return Section("accuracy", "Accuracy", lead, blocks)


def _table(sets: dict[str, list[Measured]], material: Material) -> Table:
    rows = {name: list(_numbers(found)) for name, found in sets.items()}
    axis = axis_of([row.number for each in rows.values() for row in each], 0.5)
    is_several = len({m.run for found in sets.values() for m in found}) > 1
    columns = (
        Column("scorer", "word"),
        Column("accuracy"),
        Column("95 % interval"),
        Column("", "strip", heading(axis)),
        Column("comparisons"),
        Column("log-loss"),
        Column("ECE"),
        Column("equal"),
    )
    groups = tuple(
        Rows(tuple(_cells(row, axis, material, is_several) for row in each), name)
        for name, each in rows.items()
    )
    note = (
        "log-loss: mean of \N{MINUS SIGN}log p(chosen) in nat, a coin gets 0.693. ECE: mean gap between "
        "stated and observed probability. equal: comparisons with two equal scores, which are wrong."
    )
    return Table("Accuracy by test set", columns, groups, note)


@dataclass(frozen=True)
class _Row:
    scorer: str
    number: Number | None
    run: str | None
    """None for a baseline."""
    calibration: Json
    num_equal: int | None = None
    is_implicit: bool = False


def _numbers(found: Sequence[Measured]) -> Iterator[_Row]:
    for each in found:
        calibration = dig(each.data, "calibration") or {}
        equal = dig(each.data, "accuracy", "num_equal")
        yield _Row("", each.accuracy, each.run, calibration, equal)
    for each in found:
        if each.implicit is not None:
            calibration = dig(each.data, "implicit", "calibration") or {}
            equal = dig(each.data, "implicit", "accuracy", "num_equal")
            yield _Row("implicit reward", each.implicit, each.run, calibration, equal, True)
    for name in ("pick_longer", "pick_shorter"):
        if found and found[0].length_rule(name) is not None:
            text = name.replace("_", " the ")
            yield _Row(text, found[0].length_rule(name), None, {})


def _cells(row: _Row, axis: Axis, material: Material, is_several: bool) -> tuple[Cell, ...]:
    colour = None if row.run is None else material.colour(row.run)
    scorer = row.scorer
    if row.run is not None and (is_several or not scorer):
        scorer = f"{row.run}, {scorer}" if scorer else row.run
    is_model = row.run is not None
    return (
        words(scorer, colour=colour),
        Cell(per_cent(row.number), is_strong=is_model),
        Cell(bounds(row.number)),
        Cell(strip=whiskers(axis, [Mark(row.number, colour, row.is_implicit)])),
        Cell(count(row.number.num if row.number else None)),
        Cell(decimal(row.calibration.get("log_loss")) if is_model else ""),
        Cell(decimal(row.calibration.get("ece")) if is_model else ""),
        Cell(count(row.num_equal) if is_model else ""),
    )
