"""Every check speaks where its result calls for it, and is silent otherwise."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from hafrm.diagnostics.breakdown import StyleBias
from hafrm.diagnostics.diagnosis import Diagnosis, SetDiagnosis
from hafrm.evaluation.comparisons import Comparisons
from hafrm.evaluation.metrics import Evaluation, SetResult, Temperature, pairwise_metrics
from hafrm.preferences import Comparison, Group, Message
from hafrm.report.cautions import cautions
from hafrm.report.run_files import Material, MetricsRecord, RunFiles
from hafrm.statistics import Estimate, training_alarms, with_bounds
from hafrm.study.study_result import StudyResult, Tuning

EMPTY = RunFiles("it", None, "", (), (), ())


def evaluation(
    margins: list[float],
    longer: list[bool],
    *,
    repeat: int = 50,
) -> Evaluation:
    """Margins and whether the chosen response is much longer, many times over."""
    groups = [
        Group(
            f"{i}",
            (Message("user", f"{i}"),),
            ("x" * 300, "x" * 20),
            (Comparison(1 - is_longer, int(is_longer)),),
        )
        for i, is_longer in enumerate(longer * repeat)
    ]
    metrics = pairwise_metrics(Comparisons.of(groups), np.tile(np.array(margins, float), repeat))
    result = SetResult(**vars(metrics), name="test")
    return Evaluation("it", "reward", (result,), 0, {}, 0, 0, 0)


GOOD = evaluation([1, 2, 1, 2, 3, 1, 2, 1, -0.1, -0.1], [True, False] * 5, repeat=100)
"""80 % right, whatever the length."""
NO_STUDY = StudyResult(
    "r.yaml",
    "loss",
    (0, 1),
    *((),) * 7,
    pick_longer={},
    learning_rates=(),
    seconds=1.0,
)


def sentences(**parts: object) -> list[str]:
    return list(cautions(Material((replace(EMPTY, **parts),))))


def test_a_good_evaluation_calls_for_nothing_but_another_seed():
    (sentence,) = sentences(evaluation=GOOD)
    assert sentence.startswith("Intervals of one seed")
    assert sentences(evaluation=GOOD, study=NO_STUDY) == []


@pytest.mark.parametrize(
    ("result", "part"),
    [
        (evaluation([1, 1, 1, -1], [True, True, True, False]), "not clearly better than picking"),
        (evaluation([1, 1, -1, -1], [True, True, False, False]), "depends on length: its accuracy"),
        (evaluation([1, -3], [True, True]), "worse than chance (log-loss"),
        (replace(GOOD, num_bad_rows=3, left_out={"tie": 2}), "(rows left out: 5)"),
        (replace(GOOD, responses_cut=4), "(responses cut: 4)"),
        (replace(GOOD, trained_on=("a.jsonl",)), "was trained on a.jsonl"),
    ],
)
def test_a_check_speaks_of_an_evaluation(result, part):
    assert any(part in sentence for sentence in sentences(evaluation=result))
    assert not any(part in sentence for sentence in sentences(evaluation=GOOD))


def test_sets_are_judged_one_by_one_and_not_all_together():
    """One good set and one bad one, of which the mean would look harmless or bad."""
    good, bad = GOOD.sets[0], evaluation([1, -3], [True, True]).sets[0]
    named = (replace(good, name="own"), replace(bad, name="other"), replace(bad, name="all"))
    spoken = sentences(evaluation=replace(GOOD, sets=named))
    (unsure,) = (sentence for sentence in spoken if "worse than chance" in sentence)
    assert re.search(r"\(log-loss other: \d\.\d{3}, against 0.693\)", unsure)
    assert not any("own: " in sentence or "all: " in sentence for sentence in spoken)


def test_length_bias_is_compared_with_annotators_where_a_diagnosis_is_there():
    good = GOOD.sets[0]
    for low, speaks in ((0.05, True), (-0.05, False)):
        excess = Estimate(0.1, low, 0.2, 50, "cluster-bootstrap")
        style = StyleBias("length", 50, *(good.accuracy,) * 2, excess, *(good.accuracy,) * 2)
        fit = Temperature(1.0, (0.0, 0.0), (0.0, 0.0), "")
        parts = SetDiagnosis("test", 50, good.accuracy, fit, (style,), ())
        diagnosis = Diagnosis("it", "reward", (parts,), None, (), None, 0, ())
        spoken = sentences(diagnosis=diagnosis)
        assert any("than annotators do" in sentence for sentence in spoken) is speaks


def test_over_optimisation_is_what_the_interval_since_the_peak_says():
    for high, speaks in ((-0.1, True), (0.1, False)):
        fall = Estimate(-0.3, -0.5, high, 9, "cluster-bootstrap", False)
        picker = SimpleNamespace(name="bt", peak=4, since_peak=fall)
        spoken = sentences(best_of_n=SimpleNamespace(models=(picker,)))
        assert (
            any(re.search(r"the gold score changes by .* beyond n = 4", s) for s in spoken)
            is speaks
        )


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (
            {"reward_loss": [0.70, 0.68] * 10, "accuracy": [0.45, 0.55] * 10},
            "no better than chance",
        ),
        ({"reward_loss": [0.70, 0.55] * 10, "accuracy": [0.5, 0.8] * 10}, ""),
        ({"reward_loss": [0.70, 0.68] * 4, "accuracy": [0.45, 0.55] * 4}, ""),
        ({"margin": [2.0] * 10 + [0.1] * 10}, "fell from 2 to 0.1, rewards collapse"),
        ({"equal_rewards": [0.1] * 10}, "10% of comparisons have two equal rewards"),
    ],
)
def test_what_a_training_log_warns_of_after_the_warm_up(values, part):
    """The mean of 0.70 and 0.68 is within 0.0067 (two standard errors of ten) of ln 2, that of 0.70 and
    0.55 below it by more than 0.02."""
    good = {"reward_loss": 0.3, "accuracy": 0.9, "margin": 1.0}
    num = len(next(iter(values.values())))
    lines = [good | {n: v[i] for n, v in values.items()} for i in range(num)]
    metrics = tuple(MetricsRecord(i, "train", line) for i, line in enumerate(lines, start=1))
    said = sentences(metrics=metrics)
    assert [part in said[0]] if part else said == []
    assert not list(training_alarms([{"step": i, **r.values} for i, r in enumerate(metrics)], 1e9))


def test_a_reward_that_one_repeated_token_earns_is_warned_of():
    """45 of 64 is 0.70 with 0.58 as the lower end of Wilson's interval, 36 of 64 is 0.56 with 0.44."""
    for num, speaks in ((45, True), (36, False)):
        values = with_bounds("repeated_wins", num / 64, 64)
        said = sentences(metrics=(MetricsRecord(10, "validation", values),))
        assert any("one token, repeated, gets more reward than 70%" in s for s in said) is speaks


def test_hidden_states_that_lose_their_spread_are_warned_of():
    """A third of the highest effective rank is where the warning begins."""
    for last, speaks in ((2.9, True), (3.1, False)):
        ranks = (9.0, 6.0, last)
        metrics = tuple(
            MetricsRecord(
                i, "validation", with_bounds("repeated_wins", 0.0, 64) | {"effective_rank": rank}
            )
            for i, rank in enumerate(ranks, start=1)
        )
        said = sentences(metrics=metrics)
        assert any("rewards are read from fell from 9 to 2.9" in s for s in said) is speaks


def test_single_seeds_and_ends_of_a_search_are_named():
    tried = Tuning("haf", "all", 3e-4, ((1e-4, 0.6), (3e-4, 0.5)))
    inside = replace(tried, method="bt", tried=(*tried.tried, (1e-3, 0.7)))
    study = replace(NO_STUDY, seeds=(0,), learning_rates=(tried, inside))
    rate, seed = sentences(study=study)
    assert seed.startswith("Intervals of one seed") and "learning rate of haf is" in rate
