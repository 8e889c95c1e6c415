"""Pool the blocks of docs/evidence.md: every scorer minus the first, mean over the blocks' test sets.

    python tools/study_pool.py OUT.json FOLDER...

A FOLDER holds what `hafrm compare --out FOLDER` wrote: recipe.yaml, comparison.json and its runs' scores.
The recipe's data and base model must be there too. Each test set of a block counts alike, and each block.
A prompt that several blocks test on is one cluster; the seeds of two blocks are treated as independent.
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hafrm.errors import ConfigError
from hafrm.recipe_file import load_recipe
from hafrm.statistics import holm, seeded_sum
from hafrm.study.method_comparison import COMPARISON_FILE, outcomes_of, scores_of_runs
from hafrm.study.run_grid import plan_study
from hafrm.study.study_result import Answers, Outcomes, domains, stack_answers
from hafrm.study.study_runs import StudyData, read_study_data

KINDS = ("in domain", "held out")


def main(out: Path, folders: list[Path]) -> None:
    """Print the pooled accuracies and differences, and write them to a file."""
    blocks = [block_outcomes(folder) for folder in folders]
    scorers = [list(dict.fromkeys(scorer for _, scorer, _ in block)) for block in blocks]
    baseline, *others = (s for s in scorers[0] if all(s in names for names in scorers))
    rows = []
    for kind in KINDS:
        sides, prompts = {}, np.array([])
        for scorer in (baseline, *others):
            sides[scorer], prompts = pooled([answers(b, scorer, kind) for b in blocks])
        minus = [-side for side in sides[baseline]]
        for scorer, own in sides.items():
            mean = seeded_sum(own, prompts).estimate
            row = {"tests": kind, "scorer": scorer, "accuracy": [mean.value, mean.low, mean.high]}
            text = f"{kind}: {scorer} {mean}"
            if scorer != baseline:
                gap = seeded_sum([*own, *minus], prompts)
                low, high = gap.estimate.low, gap.estimate.high
                row |= {"minus_baseline": [gap.estimate.value, low, high], "p": gap.p_value}
                text += f", minus {baseline} {gap.estimate}, p {gap.p_value:.2g}"
            rows.append(row)
            print(text)
    tested = [row for row in rows if "p" in row]
    for row, p_value in zip(tested, holm(np.array([row["p"] for row in tested])), strict=True):
        row["p_holm"] = float(p_value)
    result = {"blocks": [folder.name for folder in folders], "baseline": baseline, "pooled": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")


def block_outcomes(folder: Path) -> Outcomes:
    """Margins of every scorer of a finished comparison on all its test sets."""
    scores, data = read_block(folder)
    return outcomes_of(scores, data.comparisons)


def read_block(folder: Path) -> tuple[dict[tuple[str, str], list[NDArray[np.float32]]], StudyData]:
    """The scores of a finished comparison by training set and scorer, a row per seed, and its test sets."""
    recipe = load_recipe(folder / "recipe.yaml")
    comparison = json.loads((folder / COMPARISON_FILE).read_text())
    rates = {tuning["method"]: tuning["chosen"] for tuning in comparison["learning_rates"]}
    plan = plan_study(recipe, [*rates], num_seeds=len(comparison["seeds"]))
    data = read_study_data(recipe)
    made_from = json.loads((folder / "manifest.json").read_text())["outputs"]["runs"]["test data"]
    if data.digest != made_from:
        raise ConfigError(f"the test data of {folder} are not those that its scores were made from")
    return scores_of_runs(plan.runs(rates), folder), data


def answers(block: Outcomes, scorer: str, kind: str) -> Answers:
    """One scorer's right answers on a block's test sets of a kind, each of which counts alike."""
    trains, _, tests = (list(dict.fromkeys(key[i] for key in block)) for i in range(3))
    pairs = domains(trains, tests).get(kind)
    if pairs is None:
        raise ConfigError(f"the block that is trained on {trains} has no test set {kind}")
    return stack_answers([(test, block[train, scorer, test]) for train, test in pairs])


def pooled(blocks: list[Answers]) -> tuple[list[np.ndarray], np.ndarray]:
    """(seeds x all blocks' comparisons of every block, 0 at those of the others; their prompts): the sum of
    the means is the mean of the blocks' accuracies."""
    sizes = [len(prompts) for _, prompts in blocks]
    total, ends = sum(sizes), np.cumsum(sizes)
    sides = []
    for (right, _), size, end in zip(blocks, sizes, ends, strict=True):
        side = np.zeros((len(right), total))
        side[:, end - size : end] = right * (total / (len(blocks) * size))
        sides.append(side)
    return sides, np.concatenate([prompts for _, prompts in blocks])


if __name__ == "__main__":
    main(Path(sys.argv[1]), [*map(Path, sys.argv[2:])])
