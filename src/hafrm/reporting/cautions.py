"""What a reader should be careful about, found in the numbers themselves. Each rule is a function."""

import math
from collections.abc import Callable, Iterator

from hafrm.reporting.folders import Material, dig, parts
from hafrm.reporting.numbers import count, counted, decimal, finite, number, share
from hafrm.reporting.sections.accuracy import measured_sets
from hafrm.reporting.sections.bias import BANDS
from hafrm.reporting.sections.training import best_record
from hafrm.reporting.turning import peak_before_fall, turning_point
from hafrm.reporting.verdicts import is_above, listed, overall

COIN_LOSS = math.log(2)
WIDE = 0.04
"""Half an interval's width from which on a report says that it is wide."""
POSITION = 0.1
"""Position bias of a judge from which on a report mentions it."""
MUCH_CUT = 0.05
"""The same, of the share of training prompts or responses that were cut."""
LOSS_ROSE = 1.02
"""The same, of the last validation loss over the best one."""


def cautions(material: Material) -> Iterator[str]:
    """All of them, the gravest first."""
    for rule in RULES:
        yield from rule(material)


def _unfinished(material: Material) -> Iterator[str]:
    for run in material.runs:
        if run.recipe and run.metrics and not run.is_exported:
            yield f"{run.name} has not finished: it has no exported model yet."


def _untested(material: Material) -> Iterator[str]:
    tested = {each.run for each in overall(material)}
    runs = [run.name for run in material.runs if run.name not in tested]
    if runs:
        was = "was" if len(runs) == 1 else "were"
        yield (
            f"{listed(runs)} {was} not evaluated on a test set: validation chose the step, and flatters."
        )


def _wrong(material: Material) -> Iterator[str]:
    for name, found in measured_sets(material).items():
        for each in found:
            accuracy = each.accuracy
            if accuracy is not None and accuracy.high < 0.5:
                yield f"{each.run} is wrong more often than right on {name} ({share(accuracy)})."


def _wide(material: Material) -> Iterator[str]:
    halves = [
        ((each.accuracy.high - each.accuracy.low) / 2, each.accuracy.num or 0)
        for each in overall(material)
        if each.accuracy is not None and each.accuracy.has_interval
    ]
    half, num = max(halves, default=(0.0, 0))
    if half > WIDE:
        yield (
            f"{count(num)} test comparisons leave \N{PLUS-MINUS SIGN}{100 * half:.1f} points of doubt: "
            "smaller differences cannot be seen."
        )


def _one_seed(material: Material) -> Iterator[str]:
    seeds = [len(found.get("seeds") or ()) for _, found in material.having("comparison")]
    if (overall(material) and not seeds) or any(num == 1 for num in seeds):
        yield (
            "One seed: the intervals are over test comparisons, and what another seed would change is not "
            "in them."
        )


def _poor_probabilities(material: Material) -> Iterator[str]:
    told = [
        f"{each.run} {decimal(loss)}"
        for each in overall(material)
        if (loss := finite(dig(each.data, "calibration", "log_loss"))) > COIN_LOSS
    ]
    if told:
        yield (
            f"Probabilities worse than a coin's (log-loss: {listed(told)}; a coin 0.693): rank with it, "
            "and fit a temperature before reading sigmoid(margin) as a probability."
        )


def _leaning_on_length(material: Material) -> Iterator[str]:
    told = []
    for each in overall(material):
        short, long = (
            number(dig(each.data, "length", "slices", band)) for band in (BANDS[0], BANDS[-1])
        )
        if short is None or long is None or not (short.num and long.num):
            continue
        if is_above(long, short) or is_above(short, long):
            told.append(f"{each.run} {share(short)} and {share(long)}")
    if told:
        yield (
            "Scores lean on length. Right where the chosen response is much shorter, and where it is much "
            f"longer: {'; '.join(told)}."
        )


def _overfitting(material: Material) -> Iterator[str]:
    told = []
    for run in material.runs:
        records = [r for r in run.metrics if r.get("kind") == "validation"]
        best = best_record(run)
        if best is None or best is records[-1]:
            continue
        then, end = finite(best.get("loss")), finite(records[-1].get("loss"))
        if end > LOSS_ROSE * then:
            step = best.get("step")
            told.append(
                f"{run.name} from {decimal(then)} at step {step}, which was exported, to {decimal(end)}"
            )
    if told:
        yield f"Training went on into overfitting; validation loss rose: {'; '.join(told)}."


def _cut(material: Material) -> Iterator[str]:
    nouns = {"responses_cut": "response", "prompts_cut": "prompt", "num_bad_rows": "unusable row"}
    found: dict[str, list[str]] = {}
    for run, test in material.having("test"):
        told = [counted(test[key], noun) for key, noun in nouns.items() if test.get(key)]
        if told:
            found.setdefault(listed(told), []).append(run.name)
    for what, runs in found.items():
        yield f"Cut as too long, or left out, in the test sets of {listed(runs)}: {what}."


def _cut_in_training(material: Material) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for run in material.runs:
        encoding = dig(run.sessions[-1], "counts", "encoding") if run.sessions else None
        told = []
        for cut, whole, noun in (
            ("prompts_cut", "groups", "prompts"),
            ("responses_cut", "responses", "responses"),
        ):
            num, of = (finite(dig(encoding, key)) for key in (cut, whole))
            if num > MUCH_CUT * of:
                told.append(f"{count(int(num))} of {count(int(of))} {noun}")
        if told:
            found.setdefault(listed(told), []).append(run.name)
    for what, runs in found.items():
        yield f"Cut as too long in training ({listed(runs)}): {what}; data.max_length says how long."


def _at_the_edge(material: Material) -> Iterator[str]:
    for _, found in material.having("comparison"):
        searches = [
            each for each in parts(found, "learning_rates") if len(each.get("tried") or ()) > 1
        ]
        edges = []
        for each in searches:
            rates = [pair[0] for pair in each["tried"] if len(pair) == 2]
            if rates and each.get("chosen") in (min(rates), max(rates)):
                edges.append(f"{each.get('method')} on {each.get('train')}")
        if edges:
            shown = listed(edges) if len(edges) <= 4 else f"{', '.join(edges[:4])} and others"
            yield (
                f"In {len(edges)} of {len(searches)} searches the best learning rate was the largest or "
                f"the smallest that was tried, and a better one may lie beyond ({shown})."
            )


def _over_optimised(material: Material) -> Iterator[str]:
    for _, found in material.having("best_of_n"):
        for model in parts(found, "models"):
            golds = [(p.get("n"), g) for p in parts(model, "curve") if (g := number(p.get("gold")))]
            fall = peak_before_fall([g for _, g in golds])
            if fall is not None:
                yield (
                    f"Beyond n = {golds[fall][0]} the gold reward of what {model.get('name')} picks falls: "
                    "its own reward is over-optimised."
                )
    for folder in material.folders:
        step = turning_point(folder)
        if step is not None:
            yield (
                f"The gold reward of {folder.name} was highest about step {step} and fell while the reward "
                "rose: stop there, or hold it closer to its start."
            )


def _biased_judge(material: Material) -> Iterator[str]:
    for name in ("best_of_n", "rlhf_comparison"):
        for _, found in material.having(name):
            for each in parts(found, "wins"):
                if abs(finite(each.get("position_bias"))) > POSITION:
                    yield (
                        f"The judge of {each.get('first')} against {each.get('second')} minds the order of "
                        f"the answers (position bias {decimal(each['position_bias'], 2)})."
                    )


def _uncommitted(material: Material) -> Iterator[str]:
    changed = [
        f.name for f in material.folders for s in f.sessions[-1:] if dig(s, "git", "changed")
    ]
    if changed:
        yield f"Made with code changes that are in no commit: {listed(changed)}."


RULES: tuple[Callable[[Material], Iterator[str]], ...] = (
    *(_unfinished, _untested, _wrong, _over_optimised, _leaning_on_length, _poor_probabilities),
    *(_wide, _one_seed, _overfitting, _at_the_edge, _biased_judge, _cut_in_training, _cut),
    _uncommitted,
)
