"""Draw the data of docs/evidence.md from folders of preference files, by prompt and with a fixed seed.

    python tools/study_data.py SOURCES OUT

SOURCES holds FILE.jsonl.gz for every file that `SETS` and `HELD_OUT` name (the sets of docs/evidence.md).
A set that is trained on becomes OUT/train/NAME.jsonl, OUT/validation/NAME.jsonl and OUT/test/NAME.jsonl,
which share no prompt; a set that is only tested on becomes OUT/test/NAME.jsonl. OUT/flipped-20 and
OUT/flipped-40 hold NOISY's training part with as many per cent of its labels turned around. The same files
give the same parts.
"""

import random
import sys
from dataclasses import replace
from pathlib import Path

from hafrm.data.reader import read_preferences
from hafrm.data.splits import split_by_prompt, write_groups
from hafrm.preferences import Group

TEST_SEED, VALIDATION_SEED = 1, 2
SETS = {  # name: (file to train on, comparisons to validate on, file to test on, comparisons to test on)
    "ethics": ("ethics-util-train", 200, "ethics-util-test", 300),
    "helpful": ("hh-helpful", 200, "hh-helpful", 300),
    "harmless": ("hh-harmless", 200, "hh-harmless", 300),
}
NOISY, FLIP_SEED = "ethics", 3
HELD_OUT = {
    "ethics-hard": ("ethics-util-hard", 300),
    "pandalm": ("pandalm", 300),
    "hhh": ("hhh", 221),
}


def main(sources: Path, out: Path) -> None:
    """Write all parts and print their sizes."""
    for name, (trained, num_validation, tested, num_test) in SETS.items():
        rest = groups_of(sources, trained)
        if tested == trained:
            rest, test = draw(rest, num_test, TEST_SEED)
        else:
            _, test = draw(groups_of(sources, tested), num_test, TEST_SEED)
        # Cut by one hash, the rest of a test split would have nothing left to validate on.
        train, validation = draw(rest, num_validation, VALIDATION_SEED)
        for part, some in (("train", train), ("validation", validation), ("test", test)):
            write(some, out / part / f"{name}.jsonl")
        for percent in (20, 40) if name == NOISY else ():
            write(flipped(train, percent), out / f"flipped-{percent}" / f"{name}.jsonl")
    for name, (file, num) in HELD_OUT.items():
        _, test = draw(groups_of(sources, file), num, TEST_SEED)
        write(test, out / "test" / f"{name}.jsonl")


def groups_of(sources: Path, name: str) -> list[Group]:
    """All usable groups; several of these sets hold doubles and empty responses, which are left out."""
    return list(read_preferences([str(sources / f"{name}.jsonl.gz")], max_bad_fraction=1.0).groups)


def draw(groups: list[Group], num: int, seed: int) -> tuple[list[Group], list[Group]]:
    """(rest, drawn): prompts with about `num` comparisons, all of them where there are no more."""
    total = sum(len(group.comparisons) for group in groups)
    return ([], groups) if num >= total else split_by_prompt(groups, num / total, seed)


def flipped(groups: list[Group], percent: int) -> list[Group]:
    """The groups with each comparison turned around at this probability."""
    draws = random.Random(FLIP_SEED)
    noisy = []
    for group in groups:
        pairs = [
            replace(c, chosen=c.rejected, rejected=c.chosen)
            if draws.random() < percent / 100
            else c
            for c in group.comparisons
        ]
        noisy.append(replace(group, comparisons=tuple(pairs)))
    return noisy


def write(groups: list[Group], file: Path) -> None:
    """Write groups as preference rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"{file}: {write_groups(groups, file)} comparisons of {len(groups)} prompts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
