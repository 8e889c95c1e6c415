"""Replay a reward directory's golden scores in a process of its own, without hafrm's engine.

    python -m hafrm.export.golden_replay DIR [TOLERANCE]

Scores are those of plain transformers: one conversation at a time, and in batches padded on either side.
Prints one line of JSON and exits with 1 on disagreement.
"""

import json
import sys
from pathlib import Path

from hafrm.export.checklist import CLAUSES, check_clauses
from hafrm.export.golden import read_golden
from hafrm.export.plain_model import TOLERANCE, GoldenReplay, PlainModel

_SETTINGS = ("one label", "raw reward", "no fresh weights", "pad is not EOS", "BOS once")
"""Clauses without which a consumer gets other scores without an error."""


def replay_directory(directory: Path) -> GoldenReplay:
    """Largest differences to the golden scores, and what else is wrong with the directory."""
    plain = PlainModel(directory, read_golden(directory))
    # An adapter has no config of its own: it is its base model's.
    names = ("BOS once",) if plain.is_adapter else _SETTINGS
    failed = check_clauses(plain, [clause for clause in CLAUSES if clause.name in names]).failed
    if failed:
        return GoldenReplay({}, [f"{result.name}: {result.observed}" for result in failed])
    return plain.replay(("right", "left"))


def main() -> None:
    """Replay the directory that the command line names, within the tolerance that it gives."""
    result = replay_directory(Path(sys.argv[1]))
    tolerance = float(sys.argv[2]) if len(sys.argv) > 2 else TOLERANCE
    # "not all(x <= t)" instead of "any(x > t)": NaN must fail
    agree = all(difference <= tolerance for difference in result.differences.values())
    is_ok = agree and not result.faults
    sys.stdout.write(json.dumps({"ok": is_ok, **result._asdict()}) + "\n")
    sys.exit(0 if is_ok else 1)


if __name__ == "__main__":
    main()
