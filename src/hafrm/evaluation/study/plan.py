"""What a study trains: entrants (methods with options), training sets, seeds, and a cell for each run.

Nothing is run here. A cell's recipe is the study's with its own training set, method, seed and learning
rate, so that methods differ in nothing else: same steps, same comparisons, same order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from hafrm.data.sources import parse_sources
from hafrm.errors import ConfigError
from hafrm.recipe import MethodSection, Recipe
from hafrm.recipe_file import with_values
from hafrm.training.methods import Method, get_method

MIXED = "mixed"
"""The training set that is all of them together."""
RATE_FACTORS = (1 / 3, 1.0, 3.0)
"""Learning rates tried first, as multiples of the recipe's, unless others are given."""
MAX_WIDENINGS = 3
"""How often the rates are continued for a method that does best at the end of those tried."""


@dataclass(frozen=True)
class Entrant:
    """A method that takes part, as written: "bt", "haf:alpha=0.05", "haf:policy_loss=ipo:alpha=1"."""

    name: str
    section: Mapping[str, Any] = field(compare=False)
    """Its `method` section of a recipe."""


@dataclass(frozen=True)
class TrainSet:
    """What a run trains on."""

    name: str
    entries: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    train: TrainSet
    entrant: Entrant
    rate: float
    seed: int

    def folder(self, root: Path) -> Path:
        """Where the cell's run lies; the names say everything that tells it from other cells."""
        entrant = self.entrant.name.replace(":", ",").replace("/", "_")
        return root / "cells" / self.train.name / entrant / f"rate-{self.rate:g}-seed-{self.seed}"

    def recipe(self, base: Recipe) -> Recipe:
        """The study's recipe, for this cell."""
        changes = {
            "data.train": self.train.entries,
            "method": self.entrant.section,
            "training.seed": self.seed,
            "training.learning_rate": self.rate,
        }
        return with_values(base, changes, name=f"the recipe of {self}")

    def __str__(self) -> str:
        return f"{self.entrant.name} on {self.train.name}, rate {self.rate:.3g}, seed {self.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """Everything that a study will train."""

    recipe: Recipe
    entrants: tuple[Entrant, ...]
    train_sets: tuple[TrainSet, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    widenings: int = 0
    """How many rates beyond the ends of `rates` a method may try, as long as the last is its best."""

    @property
    def tuning_set(self) -> TrainSet:
        """Where learning rates are chosen: the last set, which is the mixed one where there is one."""
        return self.train_sets[-1]

    def tuning_cells(self) -> list[Cell]:
        """One run for each entrant and learning rate, with the first seed."""
        return [self.tuning_cell(entrant, rate) for entrant in self.entrants for rate in self.rates]

    def tuning_cell(self, entrant: Entrant, rate: float) -> Cell:
        """The run that says how well an entrant does at a learning rate."""
        return Cell(self.tuning_set, entrant, rate, self.seeds[0])

    def cells(self, rates: Mapping[str, float]) -> list[Cell]:
        """All runs that the result rests on, given each entrant's learning rate.

        Those on the same data stand together, so that a process prepares it once.
        """
        return [
            Cell(train, entrant, rates[entrant.name], seed)
            for train in self.train_sets
            for seed in self.seeds
            for entrant in self.entrants
        ]


def plan_study(
    recipe: Recipe,
    methods: Sequence[str],
    *,
    num_seeds: int,
    rates: Sequence[float] = (),
    mixed: bool = True,
) -> StudyPlan:
    """The plan for these methods; each entry of the recipe's `data.train` is a training set of its own.

    Raises ConfigError for an unknown method or option, methods named twice, a recipe without test sets,
    and one whose `data.weights` are numbers, which fit one list of sets only.
    """
    if not recipe.data.test:
        raise ConfigError("data.test names no source: a comparison of methods needs held-out data")
    if isinstance(recipe.data.weights, tuple):
        raise ConfigError(
            "data.weights lists numbers, which fit one list of sets; a comparison trains on each set "
            "alone too: take uniform, or leave it out"
        )
    if num_seeds < 1:
        raise ConfigError(f"--seeds is {num_seeds}; give 1 or more (2 tell how much seeds differ)")
    if any(not rate > 0 for rate in rates):
        raise ConfigError(f"learning rates must be above 0, got {list(rates)}")
    sets = [TrainSet(set_name(entry), (entry,)) for entry in recipe.data.train]
    if mixed and len(sets) > 1:
        sets.append(TrainSet(MIXED, recipe.data.train))
    _refuse_twice([each.name for each in sets], "training sets")
    first = recipe.training.seed
    return StudyPlan(
        recipe,
        tuple(parse_entrants(methods)),
        tuple(sets),
        seeds=tuple(range(first, first + num_seeds)),
        rates=tuple(rates) or tuple(recipe.training.learning_rate * f for f in RATE_FACTORS),
        widenings=0 if rates else MAX_WIDENINGS,
    )


def parse_entrants(methods: Sequence[str]) -> list[Entrant]:
    """Methods as people write them; raises ConfigError for what is no method, and for doubles."""
    entrants = [_entrant(method.strip()) for method in methods if method.strip()]
    if not entrants:
        raise ConfigError("no methods are given; name them, such as haf,bt,dpo")
    _refuse_twice([each.name for each in entrants], "methods")
    return entrants


def _entrant(written: str) -> Entrant:
    name, *options = written.split(":")
    section: dict[str, Any] = {"name": name}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(
                f"method {written!r}: {option!r} is no option; write name:key=value, such as "
                "haf:alpha=0.05"
            )
        section[key] = YAML(typ="safe", pure=True).load(value)
    try:
        known = MethodSection.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"method {written!r}: {first['loc'][0]}: {first['msg']}") from error
    entrant = Entrant(written, known.model_dump(exclude_unset=True))
    method_of(
        entrant
    )  # raises for a name that is no method, and for an option that it does not use
    return entrant


def method_of(entrant: Entrant) -> Method:
    """The objective itself."""
    return get_method(**MethodSection.model_validate(entrant.section).model_dump())


def parse_rates(written: str | None) -> tuple[float, ...]:
    """Learning rates as people write them, with commas; raises ConfigError for what is no number."""
    try:
        return tuple(float(part) for part in (written or "").split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"--learning-rates {written!r}: {error}; write 1e-4,3e-4") from error


def set_name(entry: str) -> str:
    """What a source's results are filed under: the name that its groups carry."""
    sources = parse_sources(entry)
    name = sources[0].name if len(sources) == 1 else entry.partition("#")[0].removeprefix("set:")
    return re.sub(r"[^\w.-]", "_", name)


def _refuse_twice(names: Sequence[str], what: str) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ConfigError(f"{what} must have different names; twice: {', '.join(double)}")
