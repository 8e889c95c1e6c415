"""`hafrm rlhf-compare`: one start policy, one recipe, several reward models; whose policy is better.

Contenders differ in the reward model (or the algorithm) alone: same prompts, budgets and seeds. Each is
one cell, an ordinary RLHF run folder; a comparison that was killed goes on with the cells that are left.
The exported policies are judged on prompts that neither trained nor picked anything.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hafrm.alignment.judge import Pair, PairJudge, Verdict
from hafrm.alignment.results import Wins, measure_wins
from hafrm.alignment.rlhf.answers import Answers
from hafrm.alignment.rlhf.cells import START, Cell, CellRunner, cells_of
from hafrm.alignment.rlhf.recipe import RlhfRecipe
from hafrm.alignment.scorers import Gold
from hafrm.atomic import atomic_write
from hafrm.errors import ConfigError
from hafrm.process_pool import ProcessPool
from hafrm.results import to_plain
from hafrm.run_folder import read_json_lines
from hafrm.statistics import Estimate, clustered_bootstrap, seeded_difference, seeded_mean


@dataclass(frozen=True)
class Standing:
    """How one contender's answers were judged, over all seeds and prompts."""

    name: str
    score: Estimate | None
    """Mean gold reward or reward of evaluation.judge; None where there is neither."""
    gain: Estimate | None
    """Over the start policy's answers to the same prompts."""
    length: float
    """Characters per answer."""
    kl: float
    """From the start, nat per response, at the exported steps; 0 for the start."""
    stopped: int
    """Seeds that the watchdog stopped."""


@dataclass(frozen=True)
class RlhfComparison:
    """What `hafrm rlhf-compare` found."""

    models: list[str]
    seeds: list[int]
    scored_by: str
    """What gives the standings' scores: gold, evaluation.judge's path, or nothing."""
    standings: list[Standing]
    curves: list[dict[str, Any]]
    """{"model", "seed", "points": [{"step", "kl", "proxy", "gold"}]}, from held-out prompts."""
    wins: list[Wins]
    seconds: float
    """Of this call, to which cells that were there already are free."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        values = asdict(self) | {"wins": [each.to_dict() for each in self.wins]}
        found: dict[str, Any] = to_plain(_lists(values))
        return found


def _lists(value: Any) -> Any:
    """Dictionaries and lists all the way down, for `plain`, which leaves lists alone."""
    if isinstance(value, dict):
        return {key: _lists(each) for key, each in value.items()}
    return tuple(_lists(each) for each in value) if isinstance(value, list | tuple) else value


def compare(  # noqa: PLR0913 - what is compared, how, and who judges
    recipe: RlhfRecipe,
    models: Mapping[str, Sequence[str]],
    folder: Path,
    *,
    seeds: Sequence[int],
    algorithms: Sequence[str],
    test: Sequence[str],
    gold: Gold | None = None,
    judge: PairJudge | None = None,
    processes: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> RlhfComparison:
    """Run what is not yet there, judge the policies on the prompts of `test`, write rlhf_comparison.json.

    `processes` cells run at a time. Wins are `judge`'s verdicts where there is one, else follow from the
    scores. Raises ConfigError where nothing could judge: no gold reward, no judge, and no
    evaluation.judge in the recipe.
    """
    scored_by = "gold" if gold is not None else recipe.evaluation.judge
    if scored_by is None and judge is None:
        raise ConfigError(
            "nothing judges the policies: give --gold where the truth is known, --judge for a model that "
            "is asked, or name a reward model that is not compared in evaluation.judge"
        )
    began = time.perf_counter()
    cells = cells_of(models, algorithms, seeds)
    make_worker = partial(CellRunner, recipe, folder, tuple(test), gold)
    with ProcessPool(make_worker, processes) as pool:
        count = itertools.count(1)
        pool.run(cells, lambda cell, _: tell(f"{next(count)}/{len(cells)} {cell.folder} is done"))
    runner = make_worker()
    answers = {(START, seed): runner.answers_of_start(seed) for seed in seeds}
    answers |= {(cell.contender, cell.seed): runner.answers(cell) for cell in cells}
    found = RlhfComparison(
        list(dict.fromkeys(cell.contender for cell in cells)),
        list(seeds),
        scored_by or "nothing",
        standings(answers, cells, folder, seeds),
        [curve(cell, folder) for cell in cells],
        wins(answers, seeds, judge, scored_by or ""),
        time.perf_counter() - began,
    )
    atomic_write(folder / "rlhf_comparison.json", json.dumps(found.to_dict(), indent=1) + "\n")
    return found


def curve(cell: Cell, folder: Path) -> dict[str, Any]:
    """Proxy and gold reward of held-out prompts against the KL from the start, evaluation by evaluation."""
    records = read_json_lines(folder / "cells" / cell.folder / "metrics.jsonl")
    points = [
        {"step": r["step"], "kl": r["kl"], "proxy": r["reward"], "gold": r.get("gold")}
        for r in records
        if r.get("phase") == "held-out"
    ]
    return {"model": cell.contender, "seed": cell.seed, "points": points}


def standings(
    answers: Mapping[tuple[str, int], Answers],
    cells: Sequence[Cell],
    folder: Path,
    seeds: Sequence[int],
) -> list[Standing]:
    """Every contender, the start first."""
    found = []
    for name in dict.fromkeys(name for name, _ in answers):
        mine = [cell for cell in cells if cell.contender == name]
        results = [_result(folder / "cells" / cell.folder) for cell in mine]
        score = gain = None
        if answers[START, seeds[0]].scores:
            score, gain = _score_and_gain(
                *(np.array([answers[who, s].scores for s in seeds]) for who in (name, START))
            )
        texts = [text for seed in seeds for text in answers[name, seed].texts]
        found.append(
            Standing(
                name,
                score,
                None if name == START else gain,
                float(np.mean([len(text) for text in texts])),
                float(np.mean([result["best"]["kl"] for result in results])) if results else 0.0,
                sum(result["stopped"] is not None for result in results),
            )
        )
    return found


def _result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def _score_and_gain(
    scores: Float[np.ndarray, "seeds prompts"], base: Float[np.ndarray, "seeds prompts"]
) -> tuple[Estimate, Estimate]:
    """The mean score and its gain over `base`: over prompts, and over seeds where there are several."""
    if len(scores) == 1:
        return (
            clustered_bootstrap(scores[0], proportion=False),
            clustered_bootstrap(scores[0] - base[0], proportion=False),
        )
    gain = seeded_difference(scores, base, proportion=False)
    return seeded_mean(scores, proportion=False), gain.estimate


def wins(
    answers: Mapping[tuple[str, int], Answers],
    seeds: Sequence[int],
    judge: PairJudge | None,
    scored_by: str,
) -> list[Wins]:
    """Every two contenders, answer against answer, over all prompts and seeds."""
    names = list(dict.fromkeys(name for name, _ in answers))
    found = []
    for first, second in itertools.combinations(names, 2):
        sides = [(answers[first, seed], answers[second, seed]) for seed in seeds]
        pairs = [
            Pair(one.messages(i), one.texts[i], other.texts[i])
            for one, other in sides
            for i in range(len(one.texts))
        ]
        if judge is None:
            scores = [np.array([a.scores, b.scores]) for a, b in sides]
            signs = np.sign(np.concatenate([a - b for a, b in scores])).astype(int)
            verdicts = [Verdict(int(sign)) for sign in signs]
        else:
            verdicts = judge.compare(pairs)
        same = np.array([pair.first == pair.second for pair in pairs])
        name = scored_by if judge is None else judge.name
        found.append(measure_wins(first, second, name, same, verdicts, num_seeds=len(seeds)))
    return found
