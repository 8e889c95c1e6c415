"""Analyses that the plan of docs/evidence.md did not name: what its pooled outcome depends on, and which
sentences both training and test texts have.

    python tools/study_checks.py FOLDER...

The FOLDERs are those of study_pool.py, with as many seeds in each.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from study_pool import KINDS, answers, pooled, read_block

from hafrm.recipe_file import load_recipe, with_values
from hafrm.statistics import seeded_sum
from hafrm.study.method_comparison import outcomes_of
from hafrm.study.study_result import Answers, Outcomes
from hafrm.study.study_runs import read_study_data
from hafrm.training.setup import read_splits

PER_TOKEN, LONGEST = "haf (implicit, per token)", "the longest"
PAIRS = (
    ("haf", "bt"),
    ("haf (implicit)", "bt"),
    (PER_TOKEN, "bt"),
    ("bt", LONGEST),
    ("haf", LONGEST),
)


def main(folders: list[Path]) -> None:
    """Print each difference, in points, with its interval."""
    blocks = [outcomes_with_more_scorers(folder) for folder in folders]
    for kind in KINDS:
        for first, second in PAIRS:
            ours, theirs = (
                [answers(b, scorer, kind) for b in blocks] for scorer in (first, second)
            )
            print_differences(f"{kind}, {first} minus {second}", ours, theirs)
        longest = seeded_sum(*pooled([answers(b, LONGEST, kind) for b in blocks]))
        print(f"{kind}, {LONGEST}: {longest.estimate}")
    easier = [{key: value for key, value in b.items() if "hard" not in key[2]} for b in blocks]
    ours, theirs = ([answers(b, scorer, KINDS[1]) for b in easier] for scorer in ("haf", "bt"))
    print_differences(f"{KINDS[1]} without ethics-hard, haf minus bt", ours, theirs)
    for folder, block in zip(folders, blocks, strict=True):
        print_overlap(folder, block)


def print_differences(name: str, ours: list[Answers], theirs: list[Answers]) -> None:
    """As planned, which treats all seeds as independent; and with what else could be assumed about them."""
    first, prompts = pooled(ours)
    second, _ = pooled(theirs)
    gaps = [one - other for one, other in zip(first, second, strict=True)]
    ways = {
        "as planned": [*first, *(-side for side in second)],
        "the seeds of both scorers paired": gaps,
        "a seed is the same in all blocks": [sum(first), -sum(second)],
    }
    for way, sides in ways.items():
        result = seeded_sum(sides, prompts)
        print(f"{name}, {way}: {result.estimate}, p {result.p_value:.2g}")


def outcomes_with_more_scorers(folder: Path) -> Outcomes:
    """Margins of the block's scorers, of HAF's policy head per token, and of the length in characters."""
    scores, data = read_block(folder)
    tokens = np.array([len(ids) for group in data.tokenized for ids in group.response_ids])
    texts = [text for group in data.comparisons.groups for text in group.responses]
    characters = np.array([len(text) for text in texts], np.float32)
    for train, scorer in list(scores):
        if scorer == "haf (implicit)":
            by_seed = scores[train, scorer]
            scores[train, PER_TOKEN] = [(s / tokens).astype(np.float32) for s in by_seed]
            scores[train, LONGEST] = [characters for _ in by_seed]
    return outcomes_of(scores, data.comparisons)


def print_overlap(folder: Path, block: Outcomes) -> None:
    """How many pairs of the first test set have a sentence of a training text, and how often `bt` is right
    on these and on the others, over all seeds."""
    recipe = load_recipe(folder / "recipe.yaml")
    (train, _, test), (margins, _) = next((k, v) for k, v in block.items() if k[1] == "bt")
    decided = read_study_data(recipe).comparisons.decided()
    pairs = decided.take(decided.by_source()[test])
    of_pairs = [sentences(pairs.groups[owner].responses) for owner in pairs.owner]
    shared = []
    for seed in range(len(margins)):
        seen = sentences(
            text
            for group in read_splits(with_values(recipe, {"training.seed": seed}))[1]
            for text in group.responses
        )
        shared.append([not seen.isdisjoint(own) for own in of_pairs])
    has, right = np.array(shared), margins > 0
    parts = f"{right[has].mean():.1%} right on these, {right[~has].mean():.1%} on the others"
    print(
        f"{folder.name}, {test} pairs with a sentence of {train}: {has.mean():.1%}; bt is {parts}"
    )


def sentences(texts: Iterable[str]) -> set[str]:
    """The sentences of some texts, in lower case."""
    return {s.lower() for text in texts for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s}


if __name__ == "__main__":
    main([*map(Path, sys.argv[1:])])
