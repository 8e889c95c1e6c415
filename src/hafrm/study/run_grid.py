"""Which runs a study has: methods with options, training sets, seeds, learning rates.

A run's recipe is the study's recipe with its own training set, method, seed and learning rate. Methods
differ in nothing else: same steps, same comparisons, same order. Nothing is run here.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from hafrm.data.reader import parse_sources
from hafrm.errors import ConfigError
from hafrm.recipe import MethodSection, Recipe
from hafrm.recipe_file import with_values
from hafrm.study.study_result import MIXED
from hafrm.training.methods import Method, get_method

RATE_FACTORS = (1 / 3, 1.0, 3.0)
"""Learning rates to try, as multiples of the recipe's, unless others are given."""


@dataclass(frozen=True)
class StudyMethod:
    """A method as written by users: "bt", "haf:alpha=0.05", "haf:policy_loss=ipo:alpha=1"."""

    name: str
    section: Mapping[str, Any] = field(compare=False)  # the `method` section of its recipes

    @property
    def method(self) -> Method:
        """The objective."""
        return get_method(**MethodSection.model_validate(self.section).model_dump())


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    train: str  # the training set's name
    method: StudyMethod
    rate: float
    seed: int
    is_scored: bool = field(default=True, compare=False)
    """Whether to score the test sets; not for runs that only help to choose a learning rate."""

    def folder(self, root: Path) -> Path:
        """The run's folder; its name has everything in which the run differs from others."""
        # some file systems do not allow ":" in names
        method = self.method.name.replace(":", ",").replace("/", "_")
        return root / "runs" / self.train / method / f"rate-{self.rate:g}-seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.method.name} on {self.train}, rate {self.rate:.3g}, seed {self.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """Everything that a study will train."""

    recipe: Recipe
    methods: tuple[StudyMethod, ...]
    train_sets: Mapping[str, tuple[str, ...]]
    """The entries of `data.train` by the set's name; learning rates are chosen on the last set."""
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    def recipe_of(self, run: StudyRun) -> Recipe:
        """The study's recipe, for this run."""
        changes = {
            "data.train": self.train_sets[run.train],
            "method": run.method.section,
            "training.seed": run.seed,
            "training.learning_rate": run.rate,
        }
        return with_values(self.recipe, changes, name=f"the recipe of {run}")

    def tuning_runs(self) -> list[StudyRun]:
        """One run for each method and learning rate, with the first seed."""
        train = [*self.train_sets][-1]  # the mixed one if there are several
        pairs, seed = itertools.product(self.methods, self.rates), self.seeds[0]
        return [StudyRun(train, method, rate, seed, is_scored=False) for method, rate in pairs]

    def runs(self, rates: Mapping[str, float]) -> list[StudyRun]:
        """All runs that make up the result, given each method's learning rate."""
        # runs on the same data follow each other, so that a process prepares it once
        grid = itertools.product(self.train_sets, self.seeds, self.methods)
        return [StudyRun(train, m, rates[m.name], seed) for train, seed, m in grid]


def plan_study(
    recipe: Recipe,
    methods: Sequence[str],
    *,
    num_seeds: int,
    rates: Sequence[float] = (),
    mixed: bool = True,
) -> StudyPlan:
    """The plan for these methods; each entry of the recipe's `data.train` is a separate training set.

    Raises ConfigError for an unknown method or option, and for a recipe that does not fit a comparison.
    """
    if not recipe.data.test:
        raise ConfigError("data.test names no source: a comparison of methods needs held-out data")
    if recipe.data.weights is not None:
        raise ConfigError("leave out data.weights: a comparison trains on each set alone too")
    names = [set_name(entry) for entry in recipe.data.train]
    _refuse_doubles(names, "training sets")
    entries: list[tuple[str, ...]] = [(entry,) for entry in recipe.data.train]
    sets = dict(zip(names, entries, strict=True))
    if mixed and len(sets) > 1:
        if MIXED in sets:
            raise ConfigError(
                f"a training set is called {MIXED}, as is that of all sets: rename it"
            )
        sets[MIXED] = recipe.data.train
    # the recipe's own seed is the first one
    first, rate = recipe.training.seed, recipe.training.learning_rate
    return StudyPlan(
        recipe,
        parse_methods(methods),
        sets,
        seeds=tuple(range(first, first + num_seeds)),
        rates=tuple(rates) or tuple(rate * factor for factor in RATE_FACTORS),
    )


def parse_methods(written: Sequence[str]) -> tuple[StudyMethod, ...]:
    """Methods from their names with options; raises ConfigError for unknown ones and duplicates."""
    methods = tuple(_parse_method(text.strip()) for text in written if text.strip())
    if not methods:
        raise ConfigError("no methods are given; name them, such as haf,bt,dpo")
    _refuse_doubles([method.name for method in methods], "methods")
    return methods


def _parse_method(text: str) -> StudyMethod:
    name, *options = text.split(":")
    section: dict[str, Any] = {"name": name}
    # values are YAML, as in a recipe
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"method {text!r}: write {option!r} as key=value (alpha=0.05)")
        section[key] = YAML(typ="safe", pure=True).load(value)
    try:
        checked = MethodSection.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"method {text!r}: {first['loc'][0]}: {first['msg']}") from error
    result = StudyMethod(text, checked.model_dump(exclude_unset=True))
    _ = result.method  # raises for an unknown method, and for an option that it does not use
    return result


def parse_rates(written: str | None) -> tuple[float, ...]:
    """Learning rates from a comma-separated text; raises ConfigError for other texts."""
    try:
        return tuple(float(part) for part in (written or "").split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"--learning-rates {written!r}: {error}; write 1e-4,3e-4") from error


def set_name(entry: str) -> str:
    """The name of a source's results, which is the source name of its groups."""
    # an entry may stand for several named sets, whose groups have different names
    sources = parse_sources(entry)
    name = sources[0].name if len(sources) == 1 else entry.partition("#")[0].removeprefix("set:")
    return re.sub(r"[^\w.-]", "_", name)


def _refuse_doubles(names: Sequence[str], what: str) -> None:
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ConfigError(f"{what} must have different names; twice: {', '.join(doubles)}")
