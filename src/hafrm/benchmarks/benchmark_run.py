"""Published benchmarks run for a model: load them, score their candidates with each head, compare.

All candidates of a prompt, of whatever items, are one group and so one packed sequence: a text has one
score, whatever it is compared with. The data is checked before a model is loaded.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hafrm.benchmarks.benchmark_files import find_benchmark_folder, load_benchmark
from hafrm.benchmarks.benchmark_scores import (
    PICK_LONGER,
    PICK_SHORTER,
    BenchmarkResult,
    BenchmarkResults,
    BenchmarkScore,
    length_scores,
    missing_terms,
    score_benchmark,
)
from hafrm.benchmarks.definitions import BENCHMARKS, find_benchmarks
from hafrm.benchmarks.rules import CandidateScores, Item
from hafrm.data.encoding import EncodingReport
from hafrm.evaluation.comparisons import response_offsets
from hafrm.evaluation.heads import EvaluationOptions, load_head, scorer_names
from hafrm.evaluation.weighted_means import mean_of
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

    Every head of the model is a scorer of its own, beside the two baselines that pick by length. Raises
    ConfigError for an unknown name, DataError for unfit data, ModelError and NumericsError for the model.
    """
    benchmarks = find_benchmarks(names)
    alone = len(benchmarks) == 1
    folders = [folder and find_benchmark_folder(b, folder, alone=alone) for b in benchmarks]
    loaded = [load_benchmark(b, place) for b, place in zip(benchmarks, folders, strict=True)]
    # raises for an unknown subset before any model is loaded
    missing = [missing_terms(data.benchmark, data.items) for data in loaded]
    heads = find_heads(model)
    head_names = scorer_names(heads)
    groups = (group for data in loaded for group in group_by_prompt(data.items)[0])
    num = sum(len(group.responses) for group in groups)
    done = over_passes(on_progress, num * len(head_names))
    scores: list[dict[str, BenchmarkScore]] = [{} for _ in loaded]
    reports: list[list[EncodingReport]] = [[] for _ in loaded]
    max_lengths = []
    for name in head_names:
        scorer = load_head(heads, name, options or EvaluationOptions())
        max_lengths.append(scorer.encoder.lengths.max_length)
        for i, data in enumerate(loaded):
            values, report = score_items(scorer, data.items, done)
            reports[i].append(report)
            scores[i][name] = score_benchmark(data.benchmark, data.items, values)
        del scorer  # before the next one is loaded
    results = []
    for i, data in enumerate(loaded):
        for name, sign in ((PICK_LONGER, 1), (PICK_SHORTER, -1)):
            lengths = length_scores(data.items, sign=sign)
            scores[i][name] = score_benchmark(data.benchmark, data.items, lengths)
        result = BenchmarkResult(
            name=data.benchmark.name,
            title=data.benchmark.title,
            data=data.data,
            num_rows=data.num_rows,
            num_rows_published=data.benchmark.num_rows,
            left_out=data.left_out,
            missing=missing[i],
            scores=scores[i],
            prompts_cut=reports[i][0].prompts_cut,
            responses_cut=reports[i][0].responses_cut,
        )
        results.append(result)
    average = {}
    if len(results) == len(BENCHMARKS):
        overalls = {name: [one[name].overall for one in scores] for name in scores[0]}
        average = {name: mean_of(values) for name, values in overalls.items()}
    return BenchmarkResults(str(model), max_lengths[0], average, tuple(results))


def score_items(
    scorer: Scorer, items: Sequence[Item], done: OnProgress = no_progress
) -> tuple[list[CandidateScores], EncodingReport]:
    """One score for each candidate of each item, and what had to be cut.

    Raises NumericsError for a score that is not finite.
    """
    groups, places = group_by_prompt(items)
    tokenized, report = scorer.encoder.encode(groups)
    scores = scorer.score_encoded(tokenized, done).astype(np.float64)
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
