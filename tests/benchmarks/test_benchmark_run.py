"""Benchmarks from end to end: files and rows, a prompt in one layout, the table that is quoted."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hafrm.benchmarks.benchmark_run import (
    LoadedBenchmark,
    _measure,
    group_by_prompt,
    length_scores,
    load_benchmark,
    run_benchmarks,
    score_items,
)
from hafrm.benchmarks.benchmark_scores import score_benchmark
from hafrm.benchmarks.definitions import BENCHMARKS, find_benchmarks
from hafrm.benchmarks.rules import Item
from hafrm.cli import app
from hafrm.data.encoding import Encoder
from hafrm.errors import ConfigError, DataError
from hafrm.evaluation.heads import EvaluationOptions
from hafrm.preferences import Message, TokenizedGroup
from hafrm.scoring.reward_model import RewardModel, Scorer
from support.benchmark_rows import RMB_PAIR, ROWS, write_all, write_lines, write_rewardbench2
from support.chat_tokenizers import GEMMA_LIKE, chat_tokenizer
from support.fake_hub import fake_datasets


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("benchmarks"))


class CountingScorer(Scorer):
    """Scores a response by its number of tokens, or by what `rule` says."""

    def __init__(self, max_length: int = 200, rule: Callable[[int], float] = float) -> None:
        self.encoder = Encoder(chat_tokenizer(), max_length=max_length)
        self.rule = rule
        self.seen: list[TokenizedGroup] = []

    def score_encoded(
        self, encoded: Sequence[TokenizedGroup], done: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        self.seen += encoded
        if done is not None:
            done(len(encoded), 0)
        lengths = [len(ids) for group in encoded for ids in group.response_ids]
        return np.array([self.rule(n) for n in lengths], np.float32)


def item(prompt: str, *candidates: str, name: str = "i") -> Item:
    return Item(name, "PPE Preference", (Message("user", prompt),), candidates)


def test_all_candidates_of_a_prompt_are_one_group_in_whatever_items_they_stand() -> None:
    items = [item("p", "a", "b"), item("q", "a", "c"), item("p", "b", "d", "b")]
    groups, places = group_by_prompt(items)
    assert [(g.prompt[0].content, g.responses) for g in groups] == [
        ("p", ("a", "b", "d")),
        ("q", ("a", "c")),
    ]
    assert places == [(0, [0, 1]), (1, [0, 1]), (0, [1, 2, 1])]


def test_scores_come_back_to_the_candidates_they_belong_to() -> None:
    scorer, calls = CountingScorer(), []
    texts = ["one", "one two three", "one two", "one"]
    items = [item("p", *texts), item("q", texts[1], texts[0])]
    scores, _ = score_items(scorer, items, lambda *counts: calls.append(counts))
    lengths = dict(zip(texts, scores[0].tolist(), strict=True))
    assert scores[0].tolist() == [lengths[text] for text in texts]
    assert lengths["one"] < lengths["one two"] < lengths["one two three"]
    assert scores[1].tolist() == [lengths[texts[1]], lengths["one"]]
    assert calls == [(2, 0)]
    assert [len(group.response_ids) for group in scorer.seen] == [3, 2]


def test_a_benchmark_scores_what_the_model_scores(exported: Path) -> None:
    """float32 packed in another company: within 1e-5 of scoring each prompt by itself."""
    items = [item(f"say sun {k}.", "sun", "the sea is wide", "no") for k in range(4)]
    scorer = RewardModel.from_pretrained(exported / "reward")
    scores, _ = score_items(scorer, items)
    for asked, values in zip(items, scores, strict=True):
        alone = scorer.score(asked.prompt[0].content, list(asked.candidates))
        assert values == pytest.approx(alone, abs=1e-5)


def test_answers_that_are_the_same_once_cut_tie_and_are_wrong() -> None:
    long = "sun " * 60
    items = [item("p", long + "sea", long + "no")]
    scores, report = score_items(CountingScorer(max_length=40), items)
    assert (report.responses_cut, report.prompts_cut) == (2, 0)
    got = score_benchmark(BENCHMARKS["ppe-preference"], items, scores)
    assert (got.overall.value, got.num_equal) == (0.0, 1)


def test_the_quoted_line_has_both_heads_the_baselines_and_their_average(
    exported, everything
) -> None:
    result = run_benchmarks(exported, ["all"], folder=everything)
    assert [one.name for one in result.benchmarks] == [*BENCHMARKS]
    for one in result.benchmarks:
        assert list(one.scores) == ["reward", "implicit reward", "pick longer", "pick shorter"]
        for score in one.scores.values():
            assert score.overall.low <= score.overall.value <= score.overall.high
    mean = np.mean([one.scores["reward"].overall.value for one in result.benchmarks])
    assert result.average["reward"].value == pytest.approx(mean)
    # our right answers are the shorter ones
    by_name = {one.name: one.scores for one in result.benchmarks}
    assert by_name["judgebench"]["pick shorter"].overall.value == 1.0
    assert by_name["rm-bench"]["pick longer"].overall.value < 0.5
    assert result.max_length == 128
    alone = run_benchmarks(exported / "reward", ["rewardbench2"], folder=everything)
    assert list(alone.benchmarks[0].scores) == ["reward", "pick longer", "pick shorter"]
    assert alone.average == {}


def test_data_is_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    write_lines(tmp_path / "filtered.jsonl", [ROWS["rewardbench"] | {"subset": "alpacaeval"}])
    with pytest.raises(ValueError, match="no subset 'alpacaeval'"):
        run_benchmarks(tmp_path / "no-model", ["rewardbench"], folder=tmp_path)


def test_the_command_prints_the_line_and_writes_all_numbers(exported, tmp_path) -> None:
    data = write_rewardbench2(tmp_path / "rb2")
    command = ["evaluate", str(exported), str(data), "--benchmark", "rewardbench2"]
    result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    for text in ("RewardBench v2", "pick longer", "Precise IF", "Ties", "equal scores"):
        assert text in result.output
    assert "9 rows of 1865 published" in result.output
    assert "responses cut 0, prompts cut 0" in result.output
    saved = json.loads((tmp_path / "out.json").read_text())
    (benchmark,) = saved["benchmarks"]
    assert benchmark["scores"]["reward"]["sections"]["Focus"]["num"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs DATA, or --benchmark"),
        (["x", "y", "--benchmark", "rmb"], "one folder as DATA"),
        (["--benchmark", "rmb", "--also", "other"], "allows no --also"),
        (["--benchmark", "rmb", "--diagnose"], "allows no --also"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message) -> None:
    result = CliRunner().invoke(app, ["evaluate", "model", *options])
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        *(("rewardbench", 23), ("rm-bench", 5), ("judgebench", 4), ("rewardbench2", 9)),
        *(("rmb", 6), ("ppe-preference", 4), ("ppe-correctness", 5)),
    ],
)
def test_a_folder_gives_every_subset_of_a_benchmark_and_no_file_beside_it(
    name: str, num_rows: int, everything: Path
) -> None:
    """The raw rows of RewardBench, a domain of RM-Bench beside the whole, Claude's JudgeBench."""
    loaded = load_benchmark(BENCHMARKS[name], everything / name)
    score_benchmark(loaded.benchmark, loaded.items, length_scores(loaded.items))
    assert loaded.num_rows == num_rows == len(loaded.items) + sum(loaded.left_out.values())
    assert loaded.left_out == ({"tie": 2} if name == "ppe-preference" else {})
    assert loaded.source == str(everything / name)


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[Any] | Exception) -> list[object]:
    calls: list[object] = []

    def load(name: str, config: object, *, split: str, revision: object) -> list[Any]:
        calls.append((name, config, split))
        if isinstance(rows, Exception):
            raise rows
        return rows

    fake_datasets(monkeypatch, load)
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


def test_an_item_that_the_template_refuses_is_left_out_and_the_others_keep_their_scores() -> None:
    scorer = CountingScorer()
    scorer.encoder = Encoder(chat_tokenizer(GEMMA_LIKE), max_length=200)
    refused = Item(
        "r", "PPE Preference", (Message("system", "s"), Message("user", "p")), ("a", "b")
    )
    items = [item("p", "one", "one two"), refused, item("q", "one two", "one")]
    options = EvaluationOptions(max_bad_fraction=0.5)
    scores, report = score_items(scorer, items, options=options)
    assert list(report.refused) == [1] and np.isnan(scores[1]).all()
    assert scores[0].tolist() == scores[2].tolist()[::-1]
    with pytest.raises(DataError, match="1 of 3 groups are not encodable"):
        score_items(scorer, items)
    data = LoadedBenchmark(BENCHMARKS["ppe-preference"], tuple(items), 3, {}, "memory")
    assert _measure(data, {"reward": scores})["reward"].overall.num == 2
    assert data.left_out == {"not encodable": 1}
