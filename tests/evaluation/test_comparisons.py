"""Comparisons as flat arrays: margins by hand, ties, sources, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from hafrm.errors import DataError
from hafrm.evaluation.comparisons import Comparisons, read_comparisons
from hafrm.preferences import Comparison, Group, Message, TokenizedGroup
from hafrm.training.passes import decided_margins
from support.tiny_runs import write_preferences


def group(name: str, responses: list[str], **comparison: object) -> Group:
    pair = Comparison(1, 0, **comparison)  # type: ignore[arg-type]
    return Group(
        name, (Message("user", f"prompt {name}"),), tuple(responses), (pair,), source=name[0]
    )


def test_margins_follow_indices_and_ties_can_be_left_out() -> None:
    """Scores 0..5 of three groups; the second is a tie; chosen is response 1."""
    groups = [group("a", ["x", "y"]), group("b", ["x", "yy"], tie=True), group("c", ["p", "q"])]
    comparisons = Comparisons.of(groups)
    scores = np.array([0.0, 3, 2, 9, 7, 5])
    assert comparisons.margins(scores).tolist() == [3.0, 7.0, -2.0]
    assert comparisons.ties.tolist() == [False, True, False]
    assert comparisons.lengths.tolist() == [[1, 2, 1], [1, 1, 1]]
    decided = comparisons.decided()
    assert len(decided) == 2
    assert decided.margins(scores).tolist() == [3.0, -2.0]
    assert (decided.chosen_texts, decided.rejected_texts) == (["y", "q"], ["x", "p"])
    sets = {name: where.tolist() for name, where in decided.sets().items()}
    assert sets == {"a": [0], "c": [1], "all": [0, 1]}


def test_a_source_called_all_keeps_its_result_beside_that_of_all_sources() -> None:
    first, second = (replace(group(name, ["x", "y"]), source=name) for name in ("all", "b"))
    assert list(Comparisons.of([first]).sets()) == ["all"]
    sets = {name: where.tolist() for name, where in Comparisons.of([first, second]).sets().items()}
    assert sets == {"all": [0], "b": [1], "all sources": [0, 1]}


def test_comparisons_of_weight_0_count_in_no_metric_of_validation_or_evaluation() -> None:
    """Scores 0, 3, 2, 9, 7, 5: the margins are 3, 7 and -2, and the second is of weight 0."""
    groups = [group("a", ["x", "y"]), group("b", ["x", "y"], weight=0.0), group("c", ["p", "q"])]
    scores = np.array([0.0, 3, 2, 9, 7, 5])
    assert Comparisons.of(groups).margins(scores).tolist() == [3.0, -2.0]
    encoded = [TokenizedGroup(np.empty(0, np.int32), (), g.comparisons) for g in groups]
    assert decided_margins(encoded, scores, np.array([0, 2, 4])).tolist() == [3.0, -2.0]


def test_a_comparison_without_a_score_from_one_model_is_left_out_for_all() -> None:
    comparisons = Comparisons.of([group(name, ["x", "y"]) for name in "abc"])
    first, second = np.array([0.0, 1, np.nan, np.nan, 5, 3]), np.arange(6.0)
    both = comparisons.scored_by(first, second)
    assert both.margins(first).tolist() == [1.0, -2.0] and both.margins(second).tolist() == [1, 1]


def test_float32_scores_are_subtracted_in_float64() -> None:
    """1e8 - 0.5 is not a float32, both numbers are; rounded to float32 it would be 1e8."""
    margins = Comparisons.of([group("a", ["x", "y"])]).margins(np.array([0.5, 1e8], np.float32))
    assert margins.dtype == np.float64
    assert margins.tolist() == [99_999_999.5]


def test_data_is_a_file_several_or_a_list_of_rows(tmp_path) -> None:
    one = write_preferences(tmp_path / "one.jsonl", num=3)
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    assert len(read_comparisons(one)[1]) == len(read_comparisons([str(one)])[1]) == 3
    assert len(read_comparisons([row])[1]) == 1
    with pytest.raises(DataError, match="no comparison"):
        read_comparisons([row | {"label": "tie"}])
