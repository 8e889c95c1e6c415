"""`hafrm rlhf-compare`: one start policy, one recipe, several reward models; whose policy is better.

Contenders differ in the reward model (or the algorithm) alone: same prompts, budgets and seeds. Each is
one cell, an ordinary RLHF run folder; a comparison that was killed goes on with the cells that are left.
The exported policies are judged on prompts that neither trained nor picked anything.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.alignment.judge import Pair, PairJudge, Verdict
from hafrm.alignment.results import Wins, measure_wins
from hafrm.alignment.rlhf.answers import Answers, answer
from hafrm.alignment.rlhf.recipe import AlgorithmSection, RewardSection, RlhfRecipe, ppo_only
from hafrm.alignment.rlhf.run import rlhf
from hafrm.alignment.scorers import Gold
from hafrm.atomic import atomic_write
from hafrm.crew import Crew
from hafrm.errors import ConfigError
from hafrm.evaluation.metrics import plain
from hafrm.evaluation.statistics import Estimate, clustered_bootstrap
from hafrm.runs import read_metrics

START = "start"
"""The contender that was not trained."""


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    model: str
    """The reward model's name."""
    path: str
    algorithm: str
    seed: int
    contender: str
    """What its seeds have in common: the model, and the algorithm where there are several."""

    @property
    def folder(self) -> str:
        return f"{self.model}-{self.algorithm}-{self.seed}"


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

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        values = asdict(self) | {"wins": [each.to_dict() for each in self.wins]}
        found: dict[str, Any] = plain(_lists(values))
        return found


def _lists(value: Any) -> Any:
    """Dictionaries and lists all the way down, for `plain`, which leaves lists alone."""
    if isinstance(value, dict):
        return {key: _lists(each) for key, each in value.items()}
    return tuple(_lists(each) for each in value) if isinstance(value, list | tuple) else value


def cells_of(
    models: Mapping[str, str], algorithms: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    """All cells, seed by seed, so that a comparison that is stopped has something of every contender."""
    several = len(algorithms) > 1
    return [
        Cell(name, path, algorithm, seed, f"{name} {algorithm}" if several else name)
        for seed in seeds
        for algorithm in algorithms
        for name, path in models.items()
    ]


def compare(  # noqa: PLR0913 - what is compared, how, and who judges
    recipe: RlhfRecipe,
    models: Mapping[str, str],
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
    enlist = partial(CellRunner, recipe, folder, tuple(test), gold)
    with Crew(enlist, processes) as crew:
        count = itertools.count(1)
        crew.run(cells, lambda cell, _: tell(f"{next(count)}/{len(cells)} {cell.folder} is done"))
    runner = enlist()
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


@dataclass(frozen=True)
class CellRunner:
    """Trains the policies of a comparison and lets them answer; what is there already is not done again."""

    recipe: RlhfRecipe
    folder: Path
    test: tuple[str, ...]
    gold: Gold | None

    def __call__(self, cell: Cell) -> None:
        """The cell's run, started, resumed, or found done, and its answers; TRL's runs are started anew."""
        folder = self.folder / "cells" / cell.folder
        if not (folder / "model").is_dir():
            resume = (folder / "recipe.yaml").is_file()
            if resume and cell.algorithm != "ppo":
                shutil.rmtree(folder)
                resume = False
            rlhf(recipe_of(self.recipe, cell), folder, resume=resume, gold=self.gold)
        self.answers(cell)

    def answers(self, cell: Cell) -> Answers:
        """What the cell's exported policy answers to the test prompts."""
        folder = self.folder / "cells" / cell.folder
        return self._ask(str(folder / "model" / "policy"), folder / "answers.json", cell.seed)

    def answers_of_start(self, seed: int) -> Answers:
        """What the untrained policy answers with a seed."""
        file = self.folder / "cells" / f"{START}-{seed}.json"
        return self._ask(self.recipe.model.path, file, seed)

    def _ask(self, policy: str, file: Path, seed: int) -> Answers:
        return answer(self.recipe, policy, file, test=self.test, seed=seed, gold=self.gold)


def recipe_of(recipe: RlhfRecipe, cell: Cell) -> RlhfRecipe:
    """The shared recipe with the cell's reward model, algorithm and seed."""
    values = recipe.model_dump()
    values["reward"] |= {"models": (cell.path,), "kinds": ("auto",), "rule": "mean"}
    values["reward"] |= {"weights": None}
    values["algorithm"]["name"] = cell.algorithm
    values["training"]["seed"] = cell.seed
    if cell.algorithm != "ppo":
        reset_ppo_only(values)
    return RlhfRecipe.model_validate(values)


def reset_ppo_only(values: dict[str, Any]) -> None:
    """Put what only ppo looks at back to its default, so that one recipe serves all algorithms."""
    for section, kind in (("algorithm", AlgorithmSection), ("reward", RewardSection)):
        for name in ppo_only(kind):
            values[section][name] = kind.model_fields[name].default


def curve(cell: Cell, folder: Path) -> dict[str, Any]:
    """Proxy and gold reward of held-out prompts against the KL from the start, evaluation by evaluation."""
    records = read_metrics(folder / "cells" / cell.folder / "metrics.jsonl")
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
            scores, clusters = _pooled(answers, name, seeds)
            base, _ = _pooled(answers, START, seeds)
            score = clustered_bootstrap(scores, clusters, proportion=False)
            gain = clustered_bootstrap(scores - base, clusters, proportion=False)
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


def _pooled(
    answers: Mapping[tuple[str, int], Answers], name: str, seeds: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores of a contender over all seeds, and the prompt that each belongs to."""
    parts = [np.array(answers[name, seed].scores) for seed in seeds]
    return np.concatenate(parts), np.concatenate([np.arange(len(part)) for part in parts])


def wins(
    answers: Mapping[tuple[str, int], Answers],
    seeds: Sequence[int],
    judge: PairJudge | None,
    scored_by: str,
) -> list[Wins]:
    """Every two contenders, answer against answer, over all seeds; verdicts on one prompt go together."""
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
        prompts = np.concatenate([np.arange(len(one.texts)) for one, _ in sides])
        same = np.array([pair.first == pair.second for pair in pairs])
        name = scored_by if judge is None else judge.name
        found.append(measure_wins(first, second, name, same, verdicts, prompts))
    return found
