"""What a reader should be careful about: sentences from checks of typed results and their intervals."""

import math
from collections.abc import Iterator

from hafrm.evaluation.metrics import LENGTH_SLICES, Evaluation
from hafrm.report.run_files import Material
from hafrm.statistics import training_alarms
from hafrm.study.study_result import StudyResult


def cautions(material: Material) -> Iterator[str]:
    """All sentences, folder by folder."""
    for run in material.folders:
        yield from (f"{run.name}: {problem}." for problem in run.unreadable)
        kinds = ("train", "validation")
        lines = [{"step": r.step, **r.values} for r in run.metrics if r.kind in kinds]
        warmup = run.recipe.training.warmup_fraction if run.recipe is not None else 0.0
        warmup *= max((line["step"] for line in lines), default=0)
        for _, text in training_alarms(lines, warmup):
            yield f"Training of {run.name}: {text}."
        if run.evaluation is not None:
            yield from _of_evaluation(run.name, run.evaluation, with_length=run.diagnosis is None)
        for style in run.diagnosis.sets[-1].style if run.diagnosis is not None else ():
            if style.feature == "length" and style.excess.low > 0:
                more = f"prefers longer responses more often than annotators do, by {style.excess}"
                yield f"{run.name} {more}."
        for model in run.best_of_n.models if run.best_of_n is not None else ():
            if model.since_peak is not None and model.since_peak.high < 0:
                change = f"the gold score changes by {model.since_peak} beyond n = {model.peak}"
                yield f"Best of n with {model.name} over-optimises: {change}."
        if run.study is not None:
            yield from _of_study(run.study)
    studies = [folder.study for folder in material.folders if folder.study is not None]
    has_one = any(len(study.seeds) == 1 for study in studies)
    if has_one or (not studies and any(folder.evaluation for folder in material.folders)):
        yield "Intervals of one seed leave out the variation between seeds."


def _of_evaluation(name: str, evaluation: Evaluation, *, with_length: bool) -> Iterator[str]:
    for file in evaluation.trained_on:
        yield f"{name} was trained on {file}: it has seen the answers there."
    is_one = len(evaluation.sets) == 1
    by_length, by_side, unsure = list[str](), list[str](), list[str]()
    for measured in evaluation.single_sets:
        accuracy, length = measured.accuracy, measured.length
        where = "" if is_one else f"{measured.name}: "
        rule = max(length.pick_longer, length.pick_shorter, key=lambda rule: rule.value)
        if accuracy.low <= rule.high:
            by_length.append(f"{where}{accuracy} against {rule}")
        # a diagnosis compares with annotators what is only suspected here
        shorter, longer = (length.slices[LENGTH_SLICES[i]] for i in (0, -1))
        if with_length and (longer.low > shorter.high or shorter.low > longer.high):
            by_side.append(f"{where}{shorter} against {longer}")
        loss = measured.calibration.log_loss
        if loss > math.log(2):
            unsure.append(f"{where}{loss:.3f}")
    if by_length:
        yield f"{name} is not clearly better than picking by length alone ({'; '.join(by_length)})."
    if by_side:
        yield (
            f"{name} depends on length: its accuracy where the chosen response is much shorter, against "
            f"where it is much longer, is {'; '.join(by_side)}."
        )
    if unsure:
        yield (
            f"The probabilities of {name} are worse than chance (log-loss {'; '.join(unsure)}, against "
            "0.693): fit a temperature before you read sigmoid(margin) as a probability."
        )
    counts = {
        "rows left out": evaluation.num_bad_rows + sum(evaluation.left_out.values()),
        "prompts cut": evaluation.prompts_cut,
        "responses cut": evaluation.responses_cut,
    }
    parts = [f"{what}: {num}" for what, num in counts.items() if num]
    if parts:
        yield f"The test data of {name} are incomplete ({', '.join(parts)})."


def _of_study(study: StudyResult) -> Iterator[str]:
    ends = []
    for tuning in study.learning_rates:
        rates = [rate for rate, _ in tuning.tried]
        if len(rates) > 1 and tuning.chosen in (min(rates), max(rates)):
            ends.append(tuning.method)
    if ends:
        why = "is the lowest or highest tried: a better one may lie beyond it"
        yield f"The best learning rate of {', '.join(ends)} {why}."
