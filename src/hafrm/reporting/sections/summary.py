"""The first screen: the number that matters, what it says, what was trained, what to be careful about."""

from collections.abc import Iterator, Sequence

from hafrm.reporting.blocks import (
    Block,
    Cell,
    Column,
    Headline,
    Points,
    Rows,
    Section,
    Table,
    Text,
    words,
)
from hafrm.reporting.cautions import cautions
from hafrm.reporting.folders import Folder, Material, dig, source_names
from hafrm.reporting.numbers import bounds, count, counted, per_cent, significant
from hafrm.reporting.sections.accuracy import Measured
from hafrm.reporting.strips import Mark, axis_of, heading, whiskers
from hafrm.reporting.verdicts import length_baseline, overall, verdicts


def section(material: Material) -> Section:
    """The summary; every part of it only where its data is there."""
    blocks: list[Block] = []
    measured = overall(material)
    blocks += _numbers(measured, material)
    blocks.append(Text(tuple(verdicts(material))))
    trained = tuple(_what_was_trained(material))
    if trained:
        blocks.append(Points("What was trained", trained))
    careful = tuple(cautions(material))
    if careful:
        blocks.append(Points("Be careful", careful))
    return Section("summary", "Summary", "", tuple(blocks))


def _numbers(measured: Sequence[Measured], material: Material) -> Iterator[Block]:
    """One run's number large; those of several runs in a table."""
    if len(measured) == 1:
        (each,) = measured
        found = each.accuracy
        if found is not None:
            label = f"of {count(found.num)} held-out comparisons judged right, {_set_name(each)}"
            yield Headline(per_cent(found), bounds(found), label)
    elif measured:
        yield _table(measured, material)


def _set_name(each: Measured) -> str:
    name = str(each.data.get("name"))
    return "all test sets together" if name == "all" else source_names([name])[name]


def _table(measured: Sequence[Measured], material: Material) -> Table:
    baseline = length_baseline(measured[0])
    numbers = [each.accuracy for each in measured]
    axis = axis_of([*numbers, baseline[1]], 0.5)
    rows = [
        (
            words(each.run, colour=material.colour(each.run)),
            Cell(per_cent(each.accuracy), is_strong=True),
            Cell(bounds(each.accuracy)),
            Cell(strip=whiskers(axis, [Mark(each.accuracy, material.colour(each.run))])),
            Cell(count(each.accuracy.num if each.accuracy else None)),
        )
        for each in measured
    ]
    name, number = baseline
    if number is not None:
        strip = whiskers(axis, [Mark(number)])
        rows.append(
            (
                words(name),
                Cell(per_cent(number)),
                Cell(bounds(number)),
                Cell(strip=strip),
                Cell(count(number.num)),
            )
        )
    columns = (
        *(Column("scorer", "word"), Column("accuracy"), Column("95 % interval")),
        *(Column("", "strip", heading(axis)), Column("comparisons")),
    )
    sets = {_set_name(each) for each in measured}
    caption = f"Accuracy on {sets.pop()}" if len(sets) == 1 else "Accuracy on each run's test sets"
    return Table(caption, columns, (Rows(tuple(rows)),))


def _what_was_trained(material: Material) -> Iterator[str]:
    for folder in material.folders:
        if folder.recipe.get("method") and folder.metrics:
            yield _trained(folder)
    for folder, found in material.having("comparison"):
        methods = ", ".join(map(str, found.get("methods") or ()))
        trains, tests = (len(found.get(key) or ()) for key in ("train_sets", "test_sets"))
        seeds = len(found.get("seeds") or ())
        yield (
            f"{folder.name}: {methods}, trained on {counted(trains, 'set')} and tested on {tests}, "
            f"with {counted(seeds, 'seed')}."
        )


def _trained(run: Folder) -> str:
    method = run.get("method", "name")
    alpha, loss = run.get("method", "alpha"), run.get("method", "policy_loss")
    options = [f"alpha {significant(alpha)}"] if alpha is not None else []
    options += [str(loss)] if loss else []
    named = f"{method} ({', '.join(options)})" if options else str(method)
    base = str(run.get("model", "path") or "an unknown model").rstrip("/").rpartition("/")[2]
    sources = run.get("data", "train") or ()
    sets = ", ".join(source_names([str(s) for s in sources]).values())
    counts = dig(run.sessions[-1], "counts") if run.sessions else None
    comparisons = dig(counts, "train_comparisons")
    many = f"{count(comparisons)} comparisons of {sets}" if comparisons else sets
    steps = max((r.get("step", 0) for r in run.metrics), default=0)
    rate = significant(run.get("training", "learning_rate"))
    lora = run.get("lora", "rank")
    how = f"LoRA of rank {lora}, " if lora else ""
    return (
        f"{run.name}: method {named}, from {base}, on {many}; {how}{count(steps)} steps of "
        f"{run.get('training', 'batch_size')} comparisons, peak learning rate {rate}."
    )
