"""The benchmarks on a GPU: rows are on disk as they come, and none takes the others along."""

import json

from support.scripts import load_script


def test_a_row_that_fails_keeps_its_error_and_the_next_ones_are_measured(tmp_path):
    def fail() -> dict[str, float]:
        raise RuntimeError("no kernel image")

    rows = load_script("benchmarks/workload").Rows(tmp_path / "out", "train")
    rows.add({"contender": "a"}, lambda: {"seconds": 1.0})
    rows.add({"contender": "b"}, fail)
    on_disk = [json.loads(line) for line in (tmp_path / "out/train.jsonl").open()]
    assert on_disk == [
        {"contender": "a", "seconds": 1.0},
        {"contender": "b", "error": "RuntimeError: no kernel image"},
    ]
    rows.add({"contender": "c"}, lambda: {"seconds": 2.0})
    assert rows.rows[2] == {"contender": "c", "seconds": 2.0}
