"""Pool the blocks of docs/evidence.md: every scorer less the first, mean over the blocks' test sets.

    python tools/study_pool.py OUT.json RECIPE=FOLDER...

FOLDER holds what `hafrm compare RECIPE --out FOLDER` wrote: comparison.json and the scores of its runs.
Each test set of a block counts alike, and each block. A prompt that several blocks test on is one cluster.
"""

import json
import sys
from pathlib import Path

from hafrm.evaluation.comparisons import accuracy_over_seeds, compare_correct
from hafrm.recipe_file import load_recipe
from hafrm.study.method_comparison import COMPARISON_FILE, outcomes_of, scores_of_runs
from hafrm.study.run_grid import plan_study
from hafrm.study.study_result import Answers, Outcomes, domains, stack_answers
from hafrm.study.study_runs import read_study_data

KINDS = ("in domain", "held out")


def main(out: Path, blocks: list[str]) -> None:
    """Print the pooled accuracies and differences, and write them to a file."""
    outcomes = [block_outcomes(*map(Path, block.split("="))) for block in blocks]
    own, *others = ({scorer for _, scorer, _ in block} for block in outcomes)
    scorers = [name for _, name, _ in outcomes[0] if name in own.intersection(*others)]
    baseline, *rest = dict.fromkeys(scorers)
    result = {"blocks": blocks, "baseline": baseline, "pooled": []}
    for kind in KINDS:
        answers = {s: pooled(outcomes, s, kind) for s in (baseline, *rest)}
        for scorer, (right, prompts) in answers.items():
            mean = accuracy_over_seeds(right, prompts)
            row = {"scorer": scorer, "tests": kind, "accuracy": mean.value, "of": len(prompts)}
            row |= {"low": mean.low, "high": mean.high}
            text = f"{kind}: {scorer} {mean}"
            if scorer != baseline:
                gap = compare_correct(right, *answers[baseline])
                less = gap.estimate
                row |= {"less_baseline": [less.value, less.low, less.high], "p": gap.p_value}
                text += f", less {baseline} {less}, p {gap.p_value:.2g}"
            result["pooled"].append(row)
            print(text)
    out.write_text(json.dumps(result, indent=1) + "\n")


def block_outcomes(recipe_file: Path, folder: Path) -> Outcomes:
    """Margins of every scorer of a finished comparison on all its test sets."""
    recipe = load_recipe(recipe_file)
    comparison = json.loads((folder / COMPARISON_FILE).read_text())
    rates = {tuning["method"]: tuning["chosen"] for tuning in comparison["learning_rates"]}
    plan = plan_study(recipe, [*rates], num_seeds=len(comparison["seeds"]))
    data = read_study_data(recipe)
    return outcomes_of(scores_of_runs(plan.runs(rates), data, folder), data.comparisons)


def pooled(blocks: list[Outcomes], scorer: str, kind: str) -> Answers:
    """One scorer's right answers on the test sets of a kind, weighted so that each block counts alike."""
    parts = []
    for outcomes in blocks:
        trains, _, tests = (list(dict.fromkeys(key[i] for key in outcomes)) for i in range(3))
        pairs = domains(trains, tests)[kind]
        parts += [(test, outcomes[train, scorer, test]) for train, test in pairs]
    return stack_answers(parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
