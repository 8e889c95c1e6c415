"""Run published benchmarks for a model: load them, score their candidates with each head, compare.

All candidates of a prompt, from any items, form one group: a text has one score, whatever it is compared
with. A row that breaks the published form is an error: a benchmark that lacks rows is another benchmark.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hafrm.benchmarks.benchmark_scores import (
    BenchmarkResult,
    BenchmarkResults,
    BenchmarkScore,
    mean_of,
    score_benchmark,
)
from hafrm.benchmarks.definitions import BENCHMARKS, Benchmark, BenchmarkPart, find_benchmarks
from hafrm.benchmarks.rules import CandidateScores, Item
from hafrm.data.encoding import EncodingReport
from hafrm.data.files import Refusal, RefusedError, find_files, read_file, read_hub
from hafrm.data.named_sets import LeftOut
from hafrm.errors import DataError
from hafrm.evaluation.comparisons import response_offsets
from hafrm.evaluation.heads import EvaluationOptions, load_head, score_groups, scorer_names
from hafrm.preferences import Group, Message
from hafrm.progress import OnProgress, no_progress, over_passes
from hafrm.scoring.loading import find_heads
from hafrm.scoring.reward_model import Scorer


def run_benchmarks(
    model: str | Path,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    options: EvaluationOptions | None = None,
    on_progress: OnProgress = no_progress,
) -> BenchmarkResults:
    """The named benchmarks for the model, from the hub or from local files in `folder`.

    Every head of the model is a separate scorer, beside the two baselines that pick by length. Raises
    ConfigError for an unknown name, DataError for unfit data, ModelError and NumericsError for the model.
    """
    benchmarks = find_benchmarks(names)
    loaded = []
    for benchmark in benchmarks:
        own = None if folder is None else folder / benchmark.name
        # a single benchmark's files may lie in the folder itself
        own = folder if own is not None and len(benchmarks) == 1 and not own.is_dir() else own
        loaded.append(load_benchmark(benchmark, own))
    for data in loaded:
        _measure(data, {})  # the baselines find what the data lacks before a model is loaded
    heads = find_heads(model)
    head_names = scorer_names(heads)
    groups = (group for data in loaded for group in group_by_prompt(data.items)[0])
    num = sum(len(group.responses) for group in groups)
    done = over_passes(on_progress, num * len(head_names))
    options = options or EvaluationOptions()
    values: list[dict[str, list[CandidateScores]]] = [{} for _ in loaded]
    reports: list[list[EncodingReport]] = [[] for _ in loaded]
    max_lengths = []
    for name in head_names:
        scorer = load_head(heads, name, options)
        max_lengths.append(scorer.encoder.lengths.max_length)
        for i, data in enumerate(loaded):
            values[i][name], report = score_items(scorer, data.items, done, options)
            reports[i].append(report)
        del scorer  # before the next one is loaded
    scores = [_measure(data, by_head) for data, by_head in zip(loaded, values, strict=True)]
    results = tuple(
        BenchmarkResult(
            name=data.benchmark.name,
            title=data.benchmark.title,
            data=data.source,
            num_rows=data.num_rows,
            num_rows_published=data.benchmark.num_rows,
            left_out=data.left_out,
            scores=scores[i],
            prompts_cut=reports[i][0].prompts_cut,
            responses_cut=reports[i][0].responses_cut,
        )
        for i, data in enumerate(loaded)
    )
    average = {}
    if len(results) == len(BENCHMARKS):
        scorers = results[0].scores
        average = {n: mean_of([one.scores[n].overall for one in results]) for n in scorers}
    return BenchmarkResults(str(model), max_lengths[0], average, results)


@dataclass(frozen=True)
class LoadedBenchmark:
    """The items of a benchmark, and where they come from; `BenchmarkResult` explains the fields."""

    benchmark: Benchmark
    items: tuple[Item, ...]
    num_rows: int
    left_out: dict[str, int]
    source: str


def load_benchmark(benchmark: Benchmark, folder: Path | None = None) -> LoadedBenchmark:
    """All items of a benchmark, from a folder in the published form or from the hub.

    Raises DataError for a folder without its files, an unreadable or unfit row, and no rows at all.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"there is no folder {folder} with the files of {benchmark.title}")
    rows = [
        _read_row(benchmark, part, row, place)
        for part in benchmark.parts
        for place, row in _rows(benchmark, part, folder)
    ]
    items = tuple(row for row in rows if isinstance(row, Item))
    left_out = Counter(row.reason for row in rows if isinstance(row, LeftOut))
    hubs = dict.fromkeys(str(part.hub) for part in benchmark.parts)
    source = ", ".join(hubs) if folder is None else str(folder)
    # a folder of another benchmark often has no file that matches
    if not items:
        raise DataError(f"{source} has no rows of {benchmark.title} to score")
    return LoadedBenchmark(benchmark, items, len(rows), dict(left_out), source)


def _measure(
    data: LoadedBenchmark, by_head: Mapping[str, Sequence[CandidateScores]]
) -> dict[str, BenchmarkScore]:
    """The result of each head and each baseline; an item that one cannot encode is left out for all."""
    of_items = zip(data.items, *by_head.values(), strict=True)
    scored = [row for row in of_items if not any(np.isnan(own).any() for own in row[1:])]
    items, *of_heads = (list(column) for column in zip(*scored, strict=True))
    if num := len(data.items) - len(items):
        data.left_out["not encodable"] = num
    values = dict(zip(by_head, of_heads, strict=True))
    values |= {"pick longer": length_scores(items), "pick shorter": length_scores(items, -1)}
    return {name: score_benchmark(data.benchmark, items, own) for name, own in values.items()}


def length_scores(items: Sequence[Item], sign: int = 1) -> list[CandidateScores]:
    """Scores that pick the longer candidate, or with sign -1 the shorter one: lengths in characters."""
    # in tokens, the baseline would depend on the model beside it
    return [sign * np.array([len(text) for text in item.candidates], np.float64) for item in items]


def score_items(
    scorer: Scorer,
    items: Sequence[Item],
    done: OnProgress = no_progress,
    options: EvaluationOptions | None = None,
) -> tuple[list[CandidateScores], EncodingReport]:
    """One score for each candidate of each item (NaN if it cannot be encoded), and what had to be cut.

    Raises NumericsError for a score that is not finite.
    """
    groups, places = group_by_prompt(items)
    exact, _, report = score_groups(scorer, groups, options or EvaluationOptions(), done)
    scores = exact.astype(np.float64)
    first = response_offsets(groups)
    return [scores[first[group] + np.array(within)] for group, within in places], report


def group_by_prompt(items: Sequence[Item]) -> tuple[list[Group], list[tuple[int, list[int]]]]:
    """A group for each prompt, and where each item's candidates are: (group, responses)."""
    # prompt -> its number, and its texts with their indices; equal texts share one
    prompts: dict[tuple[Message, ...], tuple[int, dict[str, int]]] = {}
    places = []
    for item in items:
        number, texts = prompts.setdefault(item.prompt, (len(prompts), {}))
        places.append((number, [texts.setdefault(t, len(texts)) for t in item.candidates]))
    groups = [
        Group(f"prompt {number}", prompt, tuple(texts))
        for prompt, (number, texts) in prompts.items()
    ]
    return groups, places


def _rows(
    benchmark: Benchmark, part: BenchmarkPart, folder: Path | None
) -> Iterator[tuple[str, object]]:
    """(its place in words, row) of every row of a part; a folder may lack a part."""
    if folder is not None:
        for file in find_files(folder, part.files):
            yield from ((f"row {number} of {file}", row) for number, row in read_file(file))
        return
    if part.hub is None:
        raise DataError(
            f"{benchmark.title} is not on the hub; get it from {benchmark.home} and give its folder as DATA"
        )
    # the hub is often unreachable from where models are evaluated
    try:
        yield from ((f"row {number} of {part.hub}", row) for number, row in read_hub(part.hub))
    except DataError as error:
        raise DataError(f"{error}; if you have the files, give their folder as DATA") from error


def _read_row(benchmark: Benchmark, part: BenchmarkPart, row: object, place: str) -> Item | LeftOut:
    try:
        if isinstance(row, Mapping):
            return benchmark.read_row(row, part.name)
        refusal = row if isinstance(row, Refusal) else Refusal("unreadable row", "not an object")
        raise RefusedError(refusal)
    except RefusedError as refused:
        reason, detail = refused.refusal
        raise DataError(
            f"{place} breaks the published form of {benchmark.title}: {reason}: {detail}"
        ) from None
