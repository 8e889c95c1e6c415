"""What the numbers say, in sentences. A difference is claimed only where intervals or tests allow it."""

from collections.abc import Iterator, Sequence

from hafrm.reporting.folders import Json, Material, parts, source_names
from hafrm.reporting.numbers import (
    Number,
    count,
    decimal,
    difference,
    finite,
    number,
    share,
    with_bounds,
)
from hafrm.reporting.sections.accuracy import Measured, measured_sets
from hafrm.reporting.sections.comparison import better_and_worse, is_real
from hafrm.reporting.sections.rlhf import HELD_OUT, TRAINED, records

MOST_NAMED = 3
"""Real differences that are named in the summary; all stand in their table."""


def overall(material: Material) -> list[Measured]:
    """Each run's number that matters: of all test sets together, or of its only one."""
    found: dict[str, list[Measured]] = {}
    for measured in measured_sets(material).values():
        for each in measured:
            found.setdefault(each.run, []).append(each)
    order = [folder.name for folder in material.folders if folder.name in found]
    return [_together(found[run]) for run in order]


def _together(measured: Sequence[Measured]) -> Measured:
    return next((each for each in measured if each.data.get("name") == "all"), measured[0])


def length_baseline(each: Measured) -> tuple[str, Number | None]:
    """The better of the two rules that look at length only, by name, with what it gets right."""
    rules = [(n, each.length_rule(n)) for n in ("pick_longer", "pick_shorter")]
    known = [(n, found) for n, found in rules if found is not None]
    if not known:
        return "", None
    name, found = max(known, key=lambda rule: rule[1].value)
    return name.replace("_", " the "), found


def is_above(first: Number, second: Number) -> bool:
    """Whether the whole interval of the first lies above that of the second."""
    return first.low > second.high


def verdicts(material: Material) -> Iterator[str]:
    """A sentence or two about the runs, and about each comparison, best-of-n and RLHF output."""
    measured = overall(material)
    yield from _of_runs(measured)
    same = {
        (each.data.get("name"), each.accuracy.num if each.accuracy else None) for each in measured
    }
    if len(measured) > 1 and len(same) == 1 and not list(material.having("comparison")):
        yield _among(measured)
    for _, found in material.having("comparison"):
        yield from _of_comparison(found)
    for _, found in material.having("best_of_n"):
        yield from _of_best_of_n(found)
    yield from _of_rlhf(material)


def _of_runs(measured: Sequence[Measured]) -> Iterator[str]:
    """What can be said of several runs alike is said once."""
    found: dict[str, list[str]] = {}
    for each in measured:
        if each.accuracy is not None and each.accuracy.has_interval:
            found.setdefault(_against_rules(each, each.accuracy), []).append(each.run)
    for said, runs in found.items():
        who = "The model" if len(measured) == 1 else listed(runs)
        yield f"{who} {'is' if len(runs) == 1 else 'are'} {said}."


def _against_rules(each: Measured, accuracy: Number) -> str:
    said = {
        1: "right more often than a coin",
        0: "not told apart from a coin",
        -1: "wrong more often than right",
    }[_against(accuracy, Number(0.5, 0.5, 0.5))]
    name, rule = length_baseline(each)
    if rule is None:
        return said
    if _against(accuracy, rule) == 0 and said.startswith("not"):
        return f"told apart neither from a coin nor from length alone ({name}: {share(rule)})"
    known = {1: "better than", 0: "not told apart from", -1: "worse than"}
    compared = f"{known[_against(accuracy, rule)]} length alone ({name}: {share(rule)})"
    return f"{said}, and {compared}"


def _against(first: Number, second: Number) -> int:
    """1 where the first is surely higher, -1 where it is surely lower, 0 where nobody can tell."""
    return int(is_above(first, second)) - int(is_above(second, first))


def _among(measured: Sequence[Measured]) -> str:
    known = [(each.run, each.accuracy) for each in measured if each.accuracy is not None]
    best = max(known, key=lambda pair: pair[1].value)
    below = [run for run, found in known if is_above(best[1], found)]
    others = [run for run, _ in known if run != best[0] and run not in below]
    sentence = f"{best[0]} is right most often"
    if below:
        sentence += f", surely more often than {listed(below)}"
    if others:
        sentence += (
            f"; its interval overlaps that of {listed(others)}, and only a comparison pair by pair"
        )
        sentence += " (hafrm evaluate --against) could tell"
    return f"{sentence}."


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _of_comparison(found: Json) -> Iterator[str]:
    every = parts(found, "differences")
    if not every:
        return
    real = sorted((d for d in every if is_real(d)), key=lambda d: -abs(_value(d)))
    if not real:
        yield f"None of {count(len(every))} differences between methods is real: chance explains them all."
        return
    are = "is" if len(real) == 1 else "are"
    names = source_names([str(s) for k in ("train_sets", "test_sets") for s in found.get(k) or ()])
    told = []
    for each in real[:MOST_NAMED]:
        winner, loser = better_and_worse(each)
        train, test = (names.get(str(each.get(k)), str(each.get(k))) for k in ("train", "test"))
        told.append(
            f"{winner} over {loser} by {_size(each)} (trained on {train}, tested on {test})"
        )
    yield (
        f"{count(len(real))} of {count(len(every))} differences between methods {are} real. "
        f"The largest: {'; '.join(told)}."
    )
    for each in parts(found, "average_differences"):
        if is_real(each):
            winner, loser = better_and_worse(each)
            yield f"On average, {each.get('test')}: {winner} over {loser} by {_size(each)}."


def _size(each: Json) -> str:
    """By how much the better method is better, with the interval: "3.1 points [0.4, 5.8]"."""
    found = number(each.get("difference"))
    if found is not None and found.value < 0:
        found = Number(-found.value, -found.high, -found.low, found.num)
    return difference(found).removeprefix("+")


def _value(each: Json) -> float:
    found = number(each.get("difference"))
    return 0.0 if found is None else found.value


def _of_best_of_n(found: Json) -> Iterator[str]:
    for model in parts(found, "models"):
        golds = [(p.get("n"), g) for p in parts(model, "curve") if (g := number(p.get("gold")))]
        if len(golds) > 1:
            (n, first), (m, last) = golds[0], golds[-1]
            yield (
                f"Best of n by {model.get('name')}: a gold reward of {with_bounds(first)} for n = {n}, of "
                f"{with_bounds(last)} for n = {m}."
            )


def _of_rlhf(material: Material) -> Iterator[str]:
    for folder in material.folders:
        known = records(folder, HELD_OUT) or records(folder, TRAINED)
        told = [
            f"the {noun} went from {_at(known[0], key)} to {_at(known[-1], key)}"
            for key, noun in (("reward", "reward"), ("gold", "gold reward"))
            if len(known) > 1 and all(known[i].get(key) is not None for i in (0, -1))
        ]
        if told:
            steps, kl = count(known[-1].get("step")), decimal(known[-1].get("kl"), 2)
            yield f"{folder.name}: in {steps} steps of RLHF {' and '.join(told)}, at a KL of {kl} nat."
    for _, found in material.having("rlhf_comparison"):
        for each in parts(found, "wins"):
            gap = number(each.get("difference"))
            if gap is not None and (gap.low > 0 or gap.high < 0):
                winner, loser = str(each.get("first")), str(each.get("second"))
                if gap.value < 0:
                    winner, loser = loser, winner
                    gap = Number(-gap.value, -gap.high, -gap.low)
                yield f"The policy of {winner} is judged better than that of {loser} ({difference(gap)})."


def _at(record: Json, key: str) -> str:
    """A logged value, with its interval where it has one."""
    low, high = (finite(record.get(f"{key}_{end}")) for end in ("low", "high"))
    return with_bounds(Number(finite(record.get(key)), low, high))
