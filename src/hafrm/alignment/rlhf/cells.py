"""The runs of a comparison of reward models: one for each model, algorithm and seed, and their answers.

They differ in nothing else: same start, prompts, budgets. Each is an ordinary RLHF run folder, and what is
there already is not done again.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafrm.alignment.rlhf.answers import Answers, answer
from hafrm.alignment.rlhf.recipe import AlgorithmSection, RewardSection, RlhfRecipe, ppo_only
from hafrm.alignment.rlhf.run import open_run, rlhf
from hafrm.best_of_n.candidate_scores import GoldReward

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


def cells_of(
    models: Mapping[str, Sequence[str]], algorithms: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    """All cells, seed by seed, so that a comparison that is stopped has something of every contender.

    A name may stand for several reward models, trained with seeds of their own: each seed takes the next.
    """
    several = len(algorithms) > 1
    return [
        Cell(
            name, paths[k % len(paths)], algorithm, seed, f"{name} {algorithm}" if several else name
        )
        for k, seed in enumerate(seeds)
        for algorithm in algorithms
        for name, paths in models.items()
    ]


@dataclass(frozen=True)
class CellRunner:
    """Trains the policies of a comparison and lets them answer; what is there already is not done again."""

    recipe: RlhfRecipe
    folder: Path
    test: tuple[str, ...]
    gold: GoldReward | None

    def __call__(self, cell: Cell) -> None:
        """The cell's run, started, resumed, or found done, and its answers; TRL's runs are started anew.

        Raises CheckpointError where the folder is of a run with another recipe or reward model.
        """
        folder, recipe = self.folder / "cells" / cell.folder, recipe_of(self.recipe, cell)
        resume = (folder / "recipe.yaml").is_file()
        if (folder / "model").is_dir():
            open_run(recipe, folder, resume=True)
        else:
            if resume and cell.algorithm != "ppo":
                shutil.rmtree(folder)
                resume = False
            rlhf(recipe, folder, resume=resume, gold=self.gold)
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
