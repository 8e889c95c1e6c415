"""Benchmarks from folders and from the hub: the right files, all rows, and clear errors."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hafrm.benchmarks.benchmark_run import length_scores, load_benchmark, run_benchmarks
from hafrm.benchmarks.benchmark_scores import score_benchmark
from hafrm.benchmarks.definitions import BENCHMARKS, find_benchmarks
from hafrm.errors import ConfigError, DataError
from support.benchmark_rows import RMB_PAIR, ROWS, write_all, write_lines


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("benchmarks"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_gives_every_subset_of_every_benchmark(name: str, everything: Path) -> None:
    loaded = load_benchmark(BENCHMARKS[name], everything / name)
    score_benchmark(loaded.benchmark, loaded.items, length_scores(loaded.items))
    assert loaded.num_rows == len(loaded.items) + sum(loaded.left_out.values())
    assert loaded.source == str(everything / name)


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("rewardbench", 23), ("rm-bench", 5), ("judgebench", 4), ("rewardbench2", 9), ("rmb", 6)],
)
def test_files_beside_those_of_the_benchmark_are_not_read(
    name: str, num_rows: int, everything: Path
) -> None:
    """The raw rows of RewardBench, a domain of RM-Bench beside the whole, Claude's JudgeBench."""
    assert load_benchmark(BENCHMARKS[name], everything / name).num_rows == num_rows


def test_rows_that_the_benchmark_does_not_count_are_counted(everything: Path) -> None:
    loaded = load_benchmark(BENCHMARKS["ppe-preference"], everything / "ppe-preference")
    assert (loaded.num_rows, loaded.left_out) == (4, {"tie": 2})


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[Any] | Exception) -> list[object]:
    calls: list[object] = []

    def load(name: str, config: object, *, split: str, revision: object) -> list[Any]:
        calls.append((name, config, split))
        if isinstance(rows, Exception):
            raise rows
        return rows

    fake = ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_benchmark_on_the_hub_loads_its_evaluation_split(monkeypatch, name: str) -> None:
    calls = fake_hub(monkeypatch, [ROWS[name]])
    loaded = load_benchmark(BENCHMARKS[name])
    assert len(calls) == len(BENCHMARKS[name].parts) == len(loaded.items)
    assert all(f"hub:{call[0]}" in loaded.source for call in calls)
    where = {
        "rewardbench": ("allenai/reward-bench", None, "filtered"),
        "rewardbench2": ("allenai/reward-bench-2", None, "test"),
        "ppe-preference": ("lmarena-ai/PPE-Human-Preference-V1", None, "test"),
        "ppe-correctness": ("lmarena-ai/PPE-MMLU-Pro-Best-of-K", None, "train"),
        "rm-bench": ("THU-KEG/RM-Bench", None, "train"),
        "judgebench": ("ScalerLab/JudgeBench", None, "gpt"),
    }
    assert calls[0] == where[name]


def test_what_the_hub_does_not_give_says_where_to_get_it(monkeypatch) -> None:
    with pytest.raises(DataError, match=r"RMB is not on the hub; get it from github\.com/Zhou"):
        load_benchmark(BENCHMARKS["rmb"])
    fake_hub(monkeypatch, ConnectionError("Couldn't reach the Hub"))
    with pytest.raises(DataError, match=r"Couldn't reach the Hub; .*give their folder as DATA"):
        load_benchmark(BENCHMARKS["rm-bench"])


def test_all_stands_for_the_quoted_table_and_no_name_counts_twice() -> None:
    assert [b.title for b in find_benchmarks(["all"])] == [
        "RewardBench v1", "RewardBench v2", "PPE Preference", "PPE Correctness", "RMB", "RM-Bench",
        "JudgeBench",
    ]  # fmt: skip
    both = find_benchmarks(["judgebench", "all", "rewardbench"])
    assert (len(both), both[0].name) == (7, "judgebench")
    with pytest.raises(ConfigError, match=r"'rmbench'; did you mean rm-bench\? .*judgebench, all"):
        find_benchmarks(["rmbench"])


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("rewardbench2", "test.jsonl", json.dumps({"id": 1, "chosen": ["a"]}),
         r"row 0 of .*test.jsonl breaks .* of RewardBench v2: missing column: no `rejected`"),
        # left out, a row would change the published number without a word
        ("judgebench", "gpt.jsonl", json.dumps(ROWS["judgebench"] | {"label": "?"}),
         r"row 0 of .*gpt.jsonl breaks the published form of JudgeBench: bad number"),
        ("judgebench", "gpt.jsonl", "{", r"row 0 of .*gpt.jsonl .*unreadable row: not JSON"),
        ("judgebench", "gpt.jsonl", "[1]", "not an object"),
        ("rmb", "BoN_set/Helpfulness/x.jsonl", json.dumps(RMB_PAIR), "no `loser_list`"),
    ],
)  # fmt: skip
def test_a_row_that_breaks_the_form_stops_the_loading(
    tmp_path: Path, name: str, file: str, text: str, message: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text + "\n")
    with pytest.raises(DataError, match=message):
        load_benchmark(BENCHMARKS[name], tmp_path)


def test_a_folder_without_rows_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows of RM-Bench to score"):
        load_benchmark(BENCHMARKS["rm-bench"], tmp_path)
    ties = [ROWS["ppe-preference"] | {"winner": "tie"}]
    write_lines(tmp_path / "test.jsonl", ties)
    with pytest.raises(DataError, match="has no rows of PPE Preference to score"):
        load_benchmark(BENCHMARKS["ppe-preference"], tmp_path)


def test_a_benchmark_is_looked_for_in_the_folder_of_its_name_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", [ROWS["rewardbench"]])
    with pytest.raises(DataError, match=r"no rows of alpacaeval-length"):
        run_benchmarks("no-model", ["rewardbench"], folder=tmp_path)
    with pytest.raises(DataError, match=r"no folder .*rmb with the files of RMB"):
        run_benchmarks("no-model", ["rmb", "rewardbench"], folder=tmp_path)
    (tmp_path / "rewardbench").mkdir()
    with pytest.raises(DataError, match=r"rewardbench has no rows of RewardBench"):
        run_benchmarks("no-model", ["rewardbench"], folder=tmp_path)
