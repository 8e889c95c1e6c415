"""What a reader should be careful about: at most ten checks, each one function and one plain sentence.

A check yields sentences about typed results. It decides no significance: results or their intervals do.
"""

import math
from collections.abc import Callable, Iterator

from hafrm.evaluation.metrics import LENGTH_SLICES, Evaluation
from hafrm.report.run_files import Material

COIN_LOSS = math.log(2)
WIDE = 0.04
"""Half an interval's width above which there are few comparisons."""


def cautions(material: Material) -> Iterator[str]:
    """All sentences, the most serious first."""
    for check in CHECKS:
        yield from check(material)


def _evaluations(material: Material) -> Iterator[tuple[str, Evaluation]]:
    for run in material.folders:
        if run.evaluation is not None:
            yield run.name, run.evaluation


def _not_above_length(material: Material) -> Iterator[str]:
    for name, evaluation in _evaluations(material):
        length = evaluation.sets[-1].length
        rule = max(length.pick_longer, length.pick_shorter, key=lambda rule: rule.value)
        if evaluation.accuracy.low <= rule.high:
            yield (
                f"{name} ({evaluation.accuracy}) is not clearly better than picking by length alone "
                f"({rule}): their intervals overlap."
            )


def _over_optimised(material: Material) -> Iterator[str]:
    for folder in material.folders:
        for model in folder.best_of_n.models if folder.best_of_n is not None else ():
            if model.since_peak is not None and model.since_peak.high < 0:
                yield (
                    f"Best of n with {model.name} over-optimises: beyond n = {model.peak} the gold score "
                    f"changes by {model.since_peak}."
                )


def _stopped_early(material: Material) -> Iterator[str]:
    for folder in material.folders:
        comparison = folder.rlhf_comparison
        for policy in comparison.standings if comparison is not None else ():
            if policy.stopped:
                yield (
                    f"RLHF runs with {policy.name} that stopped early, for example because the KL grew "
                    f"too large: {policy.stopped}."
                )


def _depends_on_length(material: Material) -> Iterator[str]:
    for run in material.folders:
        if run.diagnosis is not None:
            for style in run.diagnosis.sets[-1].style:
                if style.feature == "length" and style.excess.low > 0:
                    yield (
                        f"{run.name} prefers longer responses more often than annotators do, by "
                        f"{style.excess}."
                    )
        elif run.evaluation is not None:
            slices = run.evaluation.sets[-1].length.slices
            shorter, longer = slices[LENGTH_SLICES[0]], slices[LENGTH_SLICES[-1]]
            if longer.low > shorter.high or shorter.low > longer.high:
                yield (
                    f"{run.name} depends on length: its accuracy is {shorter} where the chosen response "
                    f"is much shorter, and {longer} where it is much longer."
                )


def _poor_probabilities(material: Material) -> Iterator[str]:
    for name, evaluation in _evaluations(material):
        loss = evaluation.sets[-1].calibration.log_loss
        if loss > COIN_LOSS:
            yield (
                f"The probabilities of {name} are worse than a coin toss (log-loss {loss:.3f} against "
                "0.693): fit a temperature before you read sigmoid(margin) as a probability."
            )


def _confident_on_ties(material: Material) -> Iterator[str]:
    for name, evaluation in _evaluations(material):
        ties = evaluation.sets[-1].ties
        if ties.num and ties.mean_abs_margin >= ties.mean_abs_margin_decided:
            yield (
                f"{name} is as confident on {ties.num} ties as on other comparisons: mean |margin| "
                f"{ties.mean_abs_margin:.3f} against {ties.mean_abs_margin_decided:.3f}."
            )


def _few_comparisons(material: Material) -> Iterator[str]:
    for name, evaluation in _evaluations(material):
        accuracy = evaluation.accuracy
        if accuracy.high - accuracy.low > 2 * WIDE:
            yield (
                f"{name} was tested on only {accuracy.num} comparisons: the interval of its accuracy is "
                f"{100 * (accuracy.high - accuracy.low):.0f} points wide."
            )


def _one_seed(material: Material) -> Iterator[str]:
    studies = [folder.study for folder in material.folders if folder.study is not None]
    has_one = any(len(study.seeds) == 1 for study in studies)
    if has_one or (not studies and any(_evaluations(material))):
        yield (
            "Only one seed was trained: the intervals cover the choice of test comparisons, but not the "
            "variation between seeds."
        )


def _at_the_end_of_the_search(material: Material) -> Iterator[str]:
    for folder in material.folders:
        tunings = folder.study.learning_rates if folder.study is not None else ()
        ends = [t.method for t in tunings if t.next_rate() is not None]
        if ends:
            yield (
                f"The best learning rate of {', '.join(ends)} is the lowest or the highest that was tried: "
                "a better one may lie beyond it."
            )


def _left_out(material: Material) -> Iterator[str]:
    for name, evaluation in _evaluations(material):
        counts = {
            "rows left out": evaluation.num_bad_rows + sum(evaluation.left_out.values()),
            "prompts cut": evaluation.prompts_cut,
            "responses cut": evaluation.responses_cut,
        }
        parts = [f"{what}: {num}" for what, num in counts.items() if num]
        if parts:
            yield f"The test data of {name} are incomplete ({', '.join(parts)})."


CHECKS: tuple[Callable[[Material], Iterator[str]], ...] = (
    _not_above_length,
    _over_optimised,
    _stopped_early,
    _depends_on_length,
    _poor_probabilities,
    _confident_on_ties,
    _few_comparisons,
    _one_seed,
    _at_the_end_of_the_search,
    _left_out,
)
