"""What a study's cells got right, as arrays: the step between stored scores and statistics.

A *row* is a way to judge: a method by its own score, and where both heads were trained also by its
implicit reward and by the fused score of both. Where `bt` and `dpo` take part, the two models fused are
one more row.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray

from hafrm.errors import CheckpointError
from hafrm.evaluation.evaluate import scored_comparisons
from hafrm.evaluation.metrics import ScoredComparisons
from hafrm.evaluation.study.cell import REWARD_MARGINS, TOKEN_MARGINS, TestSets, read_scores
from hafrm.evaluation.study.plan import Entrant, StudyPlan, method_of
from hafrm.scoring.fused import fit_fused, fused_scores, per_token
from hafrm.scoring.scorer import ImplicitRule
from hafrm.training.methods import Method, get_method


@dataclass(frozen=True)
class Outcome:
    """One row on one test set, after training on one set: every seed's answers."""

    correct: Bool[np.ndarray, "seeds comparisons"]
    margins: Float[np.ndarray, "seeds comparisons"]
    prompts: Shaped[np.ndarray, " comparisons"]


APART = "bt + dpo (fused)"
"""The row of two models trained apart and scored together: the control for one backbone with two heads."""


class Parts(NamedTuple):
    """What a finished cell stores of each head; None for a head that it did not train."""

    reward: NDArray[np.float32] | None
    implicit: NDArray[np.float32] | None
    reward_margins: NDArray[np.float32] | None
    token_margins: NDArray[np.float32] | None
    """On validation data, per token."""


Outcomes = Mapping[tuple[str, str, str], Outcome]
"""By (training set, row, test set)."""


def rows_of(entrant: Entrant) -> dict[str, str]:
    """The rows of a method, and the head that each is scored with; its own score comes first."""
    method = method_of(entrant)
    rows: dict[str, str] = {entrant.name: method.scores_with}
    if method.trains_reward and method.trains_policy:
        rows |= {f"{entrant.name} (implicit)": "implicit", f"{entrant.name} (fused)": "fused"}
    return rows


def row_scores(
    plan: StudyPlan, rates: Mapping[str, float], sets: TestSets, root: Path
) -> dict[tuple[str, str], list[NDArray[np.float32]]]:
    """The scores of all finished cells: by (training set, row), an array for each seed.

    Raises CheckpointError where scores do not fit the test sets: these have changed since.
    """
    lengths = np.array([len(ids) for group in sets.encoded for ids in group.response_ids])
    scores: dict[tuple[str, str], list[NDArray[np.float32]]] = defaultdict(list)
    single: dict[tuple[str, int], dict[str, Parts]] = defaultdict(dict)
    for cell in plan.cells(rates):
        stored = read_scores(cell.folder(root))
        parts = Parts(
            stored.get("reward"),
            stored.get("implicit"),
            stored.pop(REWARD_MARGINS, None),
            stored.pop(TOKEN_MARGINS, None),
        )
        if any(len(values) != len(lengths) for values in stored.values()):
            raise CheckpointError(
                f"{cell.folder(root)} holds scores of other test sets or benchmarks; give another --out"
            )
        method = method_of(cell.entrant)
        if (fused := _fused(parts, parts, method, lengths)) is not None:
            stored["fused"] = fused
        for row, head in rows_of(cell.entrant).items():
            scores[cell.train.name, row].append(stored[head])
        single[cell.train.name, cell.seed][cell.entrant.name] = parts
    for (train, _), by_method in single.items():
        if {"bt", "dpo"} <= by_method.keys():
            fused = _fused(by_method["bt"], by_method["dpo"], get_method("dpo"), lengths)
            if fused is not None:
                scores[train, APART].append(fused)
    return scores


def _fused(
    reward: Parts, policy: Parts, method: Method, lengths: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """The reward of one run fused with the implicit reward of another or the same; None without both."""
    if (
        reward.reward is None
        or policy.implicit is None
        or reward.reward_margins is None
        or policy.token_margins is None
    ):
        return None
    rule = fit_fused(reward.reward_margins, policy.token_margins)
    implicit_rule = ImplicitRule(None, method.beta, method.scores_per_token)
    by_token = per_token(policy.implicit, lengths, implicit_rule)
    return fused_scores(reward.reward, by_token, rule)


def outcomes_of(
    scores: Mapping[tuple[str, str], Sequence[NDArray[np.float32]]], sets: TestSets
) -> dict[tuple[str, str, str], Outcome]:
    """What every row got right on every test set, training sets and rows in their order."""
    parts = _parts(sets)
    return {
        (train, row, test): _outcome(sets, part, by_seed)
        for (train, row), by_seed in scores.items()
        for test, part in parts.items()
    }


def pick_longer(sets: TestSets) -> dict[str, ScoredComparisons]:
    """The comparisons of each test set, scored by the length of the response in characters."""
    lengths = np.array([len(text) for group in sets.groups for text in group.responses], np.float32)
    return {
        name: scored_comparisons(sets.groups, sets.encoded, part, lengths)
        for name, part in _parts(sets).items()
    }


def _parts(sets: TestSets) -> dict[str, list[int]]:
    """The indices of each test set's groups."""
    names = dict.fromkeys(group.source for group in sets.groups if group.comparisons)
    return {name: [i for i, g in enumerate(sets.groups) if g.source == name] for name in names}


def _outcome(
    sets: TestSets, part: Sequence[int], by_seed: Sequence[NDArray[np.float32]]
) -> Outcome:
    scored = [scored_comparisons(sets.groups, sets.encoded, part, values) for values in by_seed]
    decided = ~scored[0].ties
    margins = np.array([each.margins[decided] for each in scored])
    return Outcome(margins > 0, margins, scored[0].prompts[decided])


def stacked(
    outcomes: Sequence[tuple[str, Outcome]],
) -> tuple[Float[np.ndarray, "seeds comparisons"], Shaped[np.ndarray, " comparisons"]]:
    """[seeds, comparisons] whose mean is the mean of the test sets' accuracies, and their clusters.

    A set's right answers are scaled so that each set counts alike, whatever its size. Prompts of one test
    set are one cluster each, also where models of several training sets answered them.
    """
    total = sum(each.correct.shape[1] for _, each in outcomes)
    values = [
        each.correct * (total / (len(outcomes) * each.correct.shape[1])) for _, each in outcomes
    ]
    clusters = [np.char.add(f"{test} ", each.prompts.astype(str)) for test, each in outcomes]
    return np.concatenate(values, axis=1), np.concatenate(clusters)
