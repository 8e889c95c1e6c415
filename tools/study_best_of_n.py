"""Best of n over the seeds of each method, from the scores of one `hafrm best-of-n --gold`.

    python tools/study_best_of_n.py FOLDER

The models are named METHOD-SEED; the first method is the baseline. A prompt's value is the mean gold score
of the pick over all subsets of n of its candidates.
"""

import json
import sys
from pathlib import Path

import numpy as np

from hafrm.best_of_n.picks import expected_picks
from hafrm.statistics import seeded_difference, seeded_mean

SIZES = (1, 2, 4, 8, 16)


def main(folder: Path) -> None:
    """Print each method's gold score at each n, and how far it is above the baseline."""
    scores = [
        json.loads(line)["scores"] for line in (folder / "scores.jsonl").read_text().splitlines()
    ]
    models = [name for name in scores[0] if name != "gold"]
    methods = list(dict.fromkeys(name.rpartition("-")[0] for name in models))
    # method: seeds x prompts x n
    picks = {
        method: np.array([curves(scores, m) for m in models if m.rpartition("-")[0] == method])
        for method in methods
    } | {"gold": np.array([curves(scores, "gold")])}
    spread = np.mean([np.std(s["gold"]) for s in scores])
    print(
        f"{len(scores)} prompts; standard deviation of gold among a prompt's candidates {spread:.3f}"
    )
    for method, own in picks.items():
        for i, n in enumerate(SIZES):
            text = f"{method} ({len(own)} seeds), n = {n}: "
            if method == "gold":
                text += f"{own[0, :, i].mean():.3f}"
            else:
                text += str(seeded_mean(own[:, :, i], proportion=False))
            if method not in (methods[0], "gold"):
                gap = seeded_difference(own[:, :, i], picks[methods[0]][:, :, i], proportion=False)
                text += f", minus {methods[0]} {gap.estimate}, p {gap.p_value:.2g}"
            print(text)


def curves(scores: list[dict[str, list[float]]], name: str) -> np.ndarray:
    """The gold score of a model's best of each of SIZES, for every prompt, all with as many candidates."""
    rows = [expected_picks(np.array(s[name]), np.array(s["gold"])) for s in scores]
    return np.array(rows)[:, np.array(SIZES) - 1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
