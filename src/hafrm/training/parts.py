"""The data of a recipe as groups: read, mixed, split by prompt and checked for leakage; nothing is encoded.

The test set is only looked at to prove that no prompt of it is trained on.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hafrm.data.reader import PreferenceData, parse_sources, read_preferences
from hafrm.data.splits import check_leakage, mix, split_by_prompt, uniform_weights, without_prompts
from hafrm.preferences import Group
from hafrm.recipe import DataSection, Recipe

NUM_GOLDEN = 16
VALIDATION_SEED = 2**32
"""Apart from the seeds that people split with: cut by the same hash, the rest of a test split would
have nothing left to validate on."""


class Parts(NamedTuple):
    """What there is to train on and to validate on."""

    reading: PreferenceData
    train: Sequence[Group]
    validation: Sequence[Group]
    num_dropped: int
    """Groups left out because another part has their prompt."""


def held_out(recipe: Recipe) -> list[Group]:
    """The conversations whose scores a run of this recipe exports; raises DataError as `prepare_data`."""
    return list(read_parts(recipe, None).validation[:NUM_GOLDEN])


def read_parts(recipe: Recipe, bad_rows_file: Path | None) -> Parts:
    """Read and split by prompt; raises DataError for unusable data and for shared prompts."""
    data = recipe.data
    reading = read_preferences(
        data.train, max_bad_fraction=data.max_bad_fraction, bad_rows_file=bad_rows_file
    )
    train: Sequence[Group] = _mixed(reading, data, recipe.training.seed)
    if data.validation:
        validation: Sequence[Group] = read_preferences(
            data.validation, max_bad_fraction=data.max_bad_fraction
        ).groups
    else:
        train, validation = split_by_prompt(
            train, fraction=data.validation_fraction, seed=VALIDATION_SEED + recipe.training.seed
        )
    test: Sequence[Group] = (
        read_preferences(data.test, max_bad_fraction=data.max_bad_fraction).groups
        if data.test
        else ()
    )
    num_groups = len(train) + len(validation)
    if data.shared_prompts == "drop":
        validation = without_prompts(validation, test)
        train = without_prompts(train, [*validation, *test])
    check_leakage([*train, *validation], test, names=("data.train", "data.test"))
    check_leakage(train, validation, names=("data.train", "data.validation"))
    num_dropped = num_groups - len(train) - len(validation)
    return Parts(reading, train, validation, num_dropped)


def _mixed(reading: PreferenceData, data: DataSection, seed: int) -> list[Group]:
    """The training groups, capped and weighted set by set."""
    ends = list(itertools.accumulate(reading.num_groups))
    sets = [reading.groups[end - n : end] for end, n in zip(ends, reading.num_groups, strict=True)]
    if data.weights == "uniform":
        weights: list[float] | None = uniform_weights(sets, data.cap)
    elif data.weights is None:
        weights = None
    else:  # the members of a group of sets share the weight of its entry
        weights = [
            weight
            for entry, weight in zip(data.train, data.weights, strict=True)
            for _ in parse_sources(entry)
        ]
    return mix(sets, weights=weights, cap=data.cap, seed=seed)
