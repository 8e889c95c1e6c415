"""How often two scorers of one comparison prefer the same response.

    python tools/study_agreement.py FOLDER

FOLDER is as in study_pool.py. Both scorers are of one seed, except where a scorer is compared with itself.
HAF's two heads share a backbone; those of `bt` and `dpo`, the control, do not.
"""

import sys
from pathlib import Path

import numpy as np
from study_pool import block_outcomes

from hafrm.statistics import seeded_mean

PAIRS = (
    ("haf", "haf (implicit)"),
    ("bt", "dpo"),
    ("bt", "haf"),
    ("dpo", "haf (implicit)"),
    ("haf:alpha=2", "haf:alpha=2 (implicit)"),
    ("bt", "haf:alpha=2"),
    ("bt", "bt"),
)


def main(folder: Path) -> None:
    """Print the agreement of each pair on each test set, in % with its interval over prompts and seeds."""
    block = block_outcomes(folder)
    trains, scorers, tests = (list(dict.fromkeys(key[i] for key in block)) for i in range(3))
    for first, second in PAIRS:
        if {first, second} <= set(scorers):
            for test in tests:
                (ours, prompts), (theirs, _) = (block[trains[0], s, test] for s in (first, second))
                name = f"{first} and {second}"
                if first == second:
                    # every seed occurs in two pairs of seeds, so these have no interval
                    name, theirs = f"two seeds of {first}", np.roll(theirs, 1, axis=0)
                    means = 100 * (np.sign(ours) == np.sign(theirs)).mean(1)
                    result = f"{means.mean():.1f} % ({means.min():.1f} to {means.max():.1f})"
                else:
                    result = str(seeded_mean(np.sign(ours) == np.sign(theirs), prompts))
                print(f"{name}, {test}: {result}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
