"""Answers of two models put before a judge."""

import math
from collections.abc import Iterator

from hafrm.reporting.blocks import Cell, Column, Rows, Table, words
from hafrm.reporting.folders import Json, dig, parts
from hafrm.reporting.numbers import MINUS, Number, decimal, difference, finite, number, share
from hafrm.reporting.strips import bar

NAMES = ("win", "tie", "lose")


def win_tables(found: Json) -> Iterator[Table]:
    """One table of all pairs, where there are any."""
    wins = parts(found, "wins")
    if not wins:
        return
    judges = {str(each["judge"]) for each in wins if each.get("judge")}
    is_asked = any(math.isfinite(finite(each.get("position_bias"))) for each in wins)
    rows = []
    for each in wins:
        shares = [finite(each.get(name)) for name in NAMES]
        judge = f", judged by {each['judge']}" if len(judges) > 1 else ""
        rows.append(
            (
                words(f"{each.get('first')} against {each.get('second')}{judge}"),
                Cell(difference(number(each.get("difference"))), is_strong=True),
                Cell(strip=bar(list(zip(shares, NAMES, strict=True)))),
                *(Cell(share(_share(each, name))) for name in NAMES),
                *[Cell(decimal(each.get("position_bias"), 2))][: int(is_asked)],
            )
        )
    columns = (
        *(Column("answers of", "word"), Column(f"wins {MINUS} losses [95 %]"), Column("", "strip")),
        *(Column("wins"), Column("ties"), Column("losses")),
        *[Column("position bias")][: int(is_asked)],
    )
    title = f"Answers judged by {judges.pop()}" if len(judges) == 1 else "Judged answers"
    note = "Position bias: how much more often the judge takes the answer that it is shown first."
    yield Table(title, columns, (Rows(tuple(rows)),), note if is_asked else "")


def _share(each: Json, name: str) -> Number | None:
    """The share with its interval, where there is one."""
    value = finite(each.get(name))
    known = number(dig(each, "estimates", name))
    return known or (None if math.isnan(value) else Number(value))
