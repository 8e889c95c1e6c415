"""What a reader should be careful about: checks of typed results, each a plain sentence.

No significance is decided here: results or their intervals do.
"""

import math
from collections.abc import Callable, Iterator

from hafrm.evaluation.metrics import LENGTH_SLICES
from hafrm.report.run_files import Material, RunFiles

COIN_LOSS = math.log(2)


def cautions(material: Material) -> Iterator[str]:
    """All sentences, the most serious first."""
    for check in CHECKS:
        for folder in material.folders:
            yield from check(folder)
    studies = [folder.study for folder in material.folders if folder.study is not None]
    has_one = any(len(study.seeds) == 1 for study in studies)
    if has_one or (not studies and any(folder.evaluation for folder in material.folders)):
        yield (
            "Only one seed was trained: the intervals cover the choice of test comparisons, but not the "
            "variation between seeds."
        )


def _not_above_length(run: RunFiles) -> Iterator[str]:
    if run.evaluation is not None:
        length, accuracy = run.evaluation.sets[-1].length, run.evaluation.accuracy
        rule = max(length.pick_longer, length.pick_shorter, key=lambda rule: rule.value)
        if accuracy.low <= rule.high:
            yield (
                f"{run.name} ({accuracy}) is not clearly better than picking by length alone "
                f"({rule}): their intervals overlap."
            )


def _over_optimised(run: RunFiles) -> Iterator[str]:
    for model in run.best_of_n.models if run.best_of_n is not None else ():
        if model.since_peak is not None and model.since_peak.high < 0:
            yield (
                f"Best of n with {model.name} over-optimises: beyond n = {model.peak} the gold score "
                f"changes by {model.since_peak}."
            )


def _stopped_early(run: RunFiles) -> Iterator[str]:
    for policy in run.rlhf_comparison.standings if run.rlhf_comparison is not None else ():
        if policy.stopped:
            yield (
                f"RLHF runs with {policy.name} that stopped early, for example because the KL grew "
                f"too large: {policy.stopped}."
            )


def _depends_on_length(run: RunFiles) -> Iterator[str]:
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


def _poor_probabilities(run: RunFiles) -> Iterator[str]:
    if run.evaluation is not None:
        loss = run.evaluation.sets[-1].calibration.log_loss
        if loss > COIN_LOSS:
            yield (
                f"The probabilities of {run.name} are worse than a coin toss (log-loss {loss:.3f} against "
                "0.693): fit a temperature before you read sigmoid(margin) as a probability."
            )


def _confident_on_ties(run: RunFiles) -> Iterator[str]:
    if run.evaluation is not None:
        ties = run.evaluation.sets[-1].ties
        if ties.num and ties.mean_abs_margin >= ties.mean_abs_margin_decided:
            yield (
                f"{run.name} is as confident on {ties.num} ties as on other comparisons: mean |margin| "
                f"{ties.mean_abs_margin:.3f} against {ties.mean_abs_margin_decided:.3f}."
            )


def _at_the_end_of_the_search(run: RunFiles) -> Iterator[str]:
    ends = []
    for tuning in run.study.learning_rates if run.study is not None else ():
        rates = [rate for rate, _ in tuning.tried]
        if len(rates) > 1 and tuning.chosen in (min(rates), max(rates)):
            ends.append(tuning.method)
    if ends:
        yield (
            f"The best learning rate of {', '.join(ends)} is the lowest or the highest that was tried: "
            "a better one may lie beyond it."
        )


def _left_out(run: RunFiles) -> Iterator[str]:
    if run.evaluation is not None:
        counts = {
            "rows left out": run.evaluation.num_bad_rows + sum(run.evaluation.left_out.values()),
            "prompts cut": run.evaluation.prompts_cut,
            "responses cut": run.evaluation.responses_cut,
        }
        parts = [f"{what}: {num}" for what, num in counts.items() if num]
        if parts:
            yield f"The test data of {run.name} are incomplete ({', '.join(parts)})."


CHECKS: tuple[Callable[[RunFiles], Iterator[str]], ...] = (
    _not_above_length,
    _over_optimised,
    _stopped_early,
    _depends_on_length,
    _poor_probabilities,
    _confident_on_ties,
    _at_the_end_of_the_search,
    _left_out,
)
