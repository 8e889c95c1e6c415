"""Benchmarks from folders and from the hub: the right files, all rows, and clear errors."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmark_rows import RMB_PAIR, ROWS, write_all, write_lines
from hafrm.benchmarks.benchmark_files import find_benchmark_folder, load_benchmark
from hafrm.benchmarks.benchmark_scores import missing_terms
from hafrm.benchmarks.definitions import BENCHMARKS, QUOTED, find_benchmarks
from hafrm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("benchmarks"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_gives_every_subset_of_every_benchmark(name: str, everything: Path) -> None:
    loaded = load_benchmark(BENCHMARKS[name], everything / name)
    assert missing_terms(BENCHMARKS[name], loaded.items) == ()
    assert loaded.num_rows == len(loaded.items) + sum(loaded.left_out.values())
    assert loaded.data == str(everything / name)


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("rewardbench", 23), ("rm-bench", 5), ("judgebench", 4), ("rewardbench2", 9), ("rmb", 6)],
)
def test_files_beside_those_of_the_benchmark_are_not_read(
    name: str, num_rows: int, everything: Path
) -> None:
    """The raw rows of RewardBench, a domain of RM-Bench beside the whole, Claude's JudgeBench."""
    assert load_benchmark(BENCHMARKS[name], everything / name).num_rows == num_rows


def test_what_a_benchmark_does_not_count_is_counted(everything: Path) -> None:
    loaded = load_benchmark(BENCHMARKS["ppe-preference"], everything / "ppe-preference")
    assert (loaded.num_rows, loaded.left_out) == (4, {"tie": 2})


def test_a_part_of_a_benchmark_is_read_and_the_rest_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "filtered.jsonl", [ROWS["rewardbench"]])
    loaded = load_benchmark(BENCHMARKS["rewardbench"], tmp_path)
    missing = missing_terms(BENCHMARKS["rewardbench"], loaded.items)
    assert "math-prm" in missing
    assert len(missing) == 22


# -- the hub ---------------------------------------------------------------------------------


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any]) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def load(name: str, config: object, *, split: str, revision: object) -> list[Any]:
        calls.append((name, config, split))
        return [rows]

    fake = ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_benchmark_on_the_hub_loads_its_evaluation_split(monkeypatch, name: str) -> None:
    calls = fake_hub(monkeypatch, ROWS[name])
    loaded = load_benchmark(BENCHMARKS[name])
    assert len(calls) == len(BENCHMARKS[name].parts) == len(loaded.items)
    assert all(f"hub:{call[0]}" in loaded.data for call in calls)
    where = {
        "rewardbench": ("allenai/reward-bench", None, "filtered"),
        "rewardbench2": ("allenai/reward-bench-2", None, "test"),
        "ppe-preference": ("lmarena-ai/PPE-Human-Preference-V1", None, "test"),
        "ppe-correctness": ("lmarena-ai/PPE-MMLU-Pro-Best-of-K", None, "train"),
        "rm-bench": ("THU-KEG/RM-Bench", None, "train"),
        "judgebench": ("ScalerLab/JudgeBench", None, "gpt"),
        "m-rewardbench": ("CohereLabsCommunity/multilingual-reward-bench", "arb_Arab", "test"),
    }
    assert calls[0] == where[name]


def test_what_is_not_on_the_hub_says_where_to_get_it() -> None:
    with pytest.raises(
        DataError, match=r"RMB is not on the hub; get it from github\.com/Zhou-Zoey"
    ):
        load_benchmark(BENCHMARKS["rmb"])


def test_a_hub_that_cannot_be_reached_says_how_to_do_without(monkeypatch) -> None:
    def load(*_: object, **__: object) -> object:
        raise ConnectionError("Couldn't reach the Hub")

    fake = ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(
        DataError, match=r"Couldn't reach the Hub; files of your own: --benchmark-d"
    ):
        load_benchmark(BENCHMARKS["rm-bench"])


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rewardbench-2", "unknown benchmark 'rewardbench-2'; did you mean rewardbench2?"),
        ("RewardBench2", "did you mean rewardbench2?"),
        ("judge-bench", "did you mean judgebench?"),
        ("ppe", "unknown benchmark 'ppe'; known are rewardbench, .*m-rewardbench, all"),
        ("xyz", "unknown benchmark 'xyz'; known are rewardbench, rewardbench2, ppe-preference"),
    ],
)
def test_an_unknown_name_tells_the_nearest_one(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_benchmarks([given])


def test_all_stands_for_the_quoted_table_and_no_name_counts_twice() -> None:
    assert [each.name for each in find_benchmarks(["all"])] == list(QUOTED)
    assert [each.title for each in find_benchmarks(["all"])] == [
        "RewardBench v1", "RewardBench v2", "PPE Preference", "PPE Correctness", "RMB", "RM-Bench",
        "JudgeBench",
    ]  # fmt: skip
    both = find_benchmarks(["m-rewardbench", "all", "rewardbench"])
    assert len(both) == 8
    assert both[0].name == "m-rewardbench"


def test_missing_columns_are_named_with_the_row_and_the_file(tmp_path: Path) -> None:
    row = {k: v for k, v in ROWS["rewardbench2"].items() if k != "subset"}
    file = write_lines(tmp_path / "test.jsonl", [ROWS["rewardbench2"], row])
    with pytest.raises(
        DataError, match=r"row 1 of .*test.jsonl is not in the published form of RewardBench v2, "
        r"which has columns id, prompt, chosen, rejected, subset; got id, prompt"
    ):  # fmt: skip
        load_benchmark(BENCHMARKS["rewardbench2"], tmp_path)
    assert file.exists()


def test_rmbs_two_forms_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "BoN_set/Helpfulness"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text(json.dumps([RMB_PAIR]))
    with pytest.raises(
        DataError, match="columns conversation_input, bon_uid, bon_best, loser_list"
    ):
        load_benchmark(BENCHMARKS["rmb"], tmp_path)


def test_a_row_that_breaks_the_form_stops_the_loading(tmp_path: Path) -> None:
    """Left out, it would change the published number without a word."""
    rows = [ROWS["judgebench"], ROWS["judgebench"] | {"label": "?"}]
    write_lines(tmp_path / "gpt.jsonl", rows)
    with pytest.raises(DataError, match=r"row 1 of .*gpt.jsonl breaks the form of JudgeBench: bad"):
        load_benchmark(BENCHMARKS["judgebench"], tmp_path)
    (tmp_path / "gpt.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"row 0 of .*gpt.jsonl: unreadable row: not JSON"):
        load_benchmark(BENCHMARKS["judgebench"], tmp_path)
    (tmp_path / "gpt.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="got list"):
        load_benchmark(BENCHMARKS["judgebench"], tmp_path)


def test_a_folder_without_rows_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows of RM-Bench to score"):
        load_benchmark(BENCHMARKS["rm-bench"], tmp_path)
    ties = [ROWS["ppe-preference"] | {"winner": "tie"}]
    write_lines(tmp_path / "test.jsonl", ties)
    with pytest.raises(DataError, match="has no rows of PPE Preference to score"):
        load_benchmark(BENCHMARKS["ppe-preference"], tmp_path)


def test_a_benchmark_is_looked_for_in_the_folder_of_its_name_first(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["rmb"]
    assert find_benchmark_folder(benchmark, None, alone=True) is None
    assert find_benchmark_folder(benchmark, tmp_path, alone=True) == tmp_path
    with pytest.raises(DataError, match="has no folder rmb with the files of RMB"):
        find_benchmark_folder(benchmark, tmp_path, alone=False)
    (tmp_path / "rmb").mkdir()
    assert find_benchmark_folder(benchmark, tmp_path, alone=True) == tmp_path / "rmb"
    with pytest.raises(DataError, match="is no folder; give one with the files of RMB"):
        find_benchmark_folder(benchmark, tmp_path / "missing", alone=True)
