"""Every check speaks where its result calls for it, and is silent otherwise."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hafrm.best_of_n.picks import PickerResult
from hafrm.evaluation.comparisons import ScoredComparisons
from hafrm.evaluation.metrics import Evaluation, SetResult, measure
from hafrm.report.cautions import cautions
from hafrm.report.run_files import Material, RunFiles
from hafrm.statistics import Estimate
from hafrm.study.study_result import Tuning

EMPTY = RunFiles("it", Path("it"), None, "", (), (), (), None, None, None, None, None)


def evaluation(
    margins: list[float], longer: list[bool], *, ties: int = 0, repeat: int = 50, **counts: object
) -> Evaluation:
    """Margins and whether the chosen response is much longer, many times over."""
    num = repeat * len(margins)
    lengths = np.where(np.tile(longer, repeat), 300, 20)
    scored = ScoredComparisons(
        np.tile(np.array(margins), repeat).astype(float),
        lengths,
        320 - lengths,
        np.arange(num).astype(str),
        np.arange(num) < ties,
    )
    result = SetResult(**vars(measure(scored)), name="test", num_groups=num)
    plain = {"num_bad_rows": 0, "left_out": {}, "prompts_cut": 0, "responses_cut": 0, **counts}
    return Evaluation("it", "reward", (result,), seam_merges=0, **plain)  # type: ignore[arg-type]


GOOD = evaluation([1, 2, 1, 2, 3, 1, 2, 1, 2, -0.1], [True, False] * 5, repeat=100)
"""90 % right, whatever the length."""


def sentences(**parts: object) -> list[str]:
    return list(cautions(Material((replace(EMPTY, **parts),))))


def test_a_good_evaluation_calls_for_nothing_but_another_seed():
    (sentence,) = sentences(evaluation=GOOD)
    assert sentence.startswith("One seed")
    assert sentences(evaluation=GOOD, study=SimpleNamespace(seeds=(0, 1), learning_rates=())) == []


@pytest.mark.parametrize(
    ("result", "part"),
    [
        (evaluation([1, 1, 1, -1], [True, True, True, False]), "not clearly better than picking"),
        (evaluation([1, 1, -1, -1], [True, True, False, False]), "it leans on length"),
        (evaluation([1, -3], [True, True]), "worse than a coin's (log-loss"),
        (evaluation([1, 2, 3, -0.1], [True, False] * 2, ties=200), "as sure on the 200 ties"),
        (evaluation([1, 2, 1, -1], [True, False] * 2, repeat=5), "20 comparisons only"),
        (replace(GOOD, num_bad_rows=3, left_out={"tie": 2}), "(rows left out: 5)"),
        (replace(GOOD, responses_cut=4), "(responses cut: 4)"),
    ],
)
def test_a_check_speaks_of_an_evaluation(result, part):
    assert any(part in sentence for sentence in sentences(evaluation=result))
    assert not any(part in sentence for sentence in sentences(evaluation=GOOD))


def test_length_bias_is_compared_with_annotators_where_a_diagnosis_is_there():
    for low, speaks in ((0.05, True), (-0.05, False)):
        excess = Estimate(0.1, low, 0.2, 50, "cluster-bootstrap")
        style = SimpleNamespace(feature="length", excess=excess)
        diagnosis = SimpleNamespace(sets=(SimpleNamespace(style=(style,)),))
        found = [s for s in sentences(diagnosis=diagnosis) if "than annotators do" in s]
        assert bool(found) is speaks


def test_over_optimisation_is_what_the_interval_since_the_peak_says():
    for high, speaks in ((-0.1, True), (0.1, False)):
        fall = Estimate(-0.3, -0.5, high, 9, "cluster-bootstrap", False)
        picker = PickerResult("bt", (), None, 4, fall, 0.0, 0.0, None, None, ())
        told = sentences(best_of_n=SimpleNamespace(models=(picker,)))
        assert any("beyond n = 4 the gold score falls" in s for s in told) is speaks


def test_stopped_policies_single_seeds_and_ends_of_a_search_are_named():
    standing = SimpleNamespace(name="bt", stopped=1)
    comparison = SimpleNamespace(standings=(standing,), seeds=(0, 1), models=())
    assert "1 of 2 RLHF runs of bt" in sentences(rlhf_comparison=comparison)[0]
    tried = Tuning("haf", "all", 3e-4, ((1e-4, 0.6), (3e-4, 0.5)))
    inside = replace(tried, method="bt", tried=(*tried.tried, (1e-3, 0.7)))
    study = SimpleNamespace(seeds=(0,), learning_rates=(tried, inside))
    seed, rate = sentences(study=study)
    assert seed.startswith("One seed") and "learning rate of haf is" in rate
