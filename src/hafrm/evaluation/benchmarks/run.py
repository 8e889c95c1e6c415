"""The verb behind `hafrm evaluate --benchmark`: load benchmarks, score them with a model, compare.

All candidates of a prompt, in whatever items they stand, are one group and so one layout: a text has one
score, whoever it is compared with. Everything that can be wrong with the data comes to light before a
model is loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hafrm.data.encoding import EncodedGroup, Encoder, EncodingReport
from hafrm.data.groups import Group, Message
from hafrm.evaluation.benchmarks.catalogue import QUOTED, find_benchmarks
from hafrm.evaluation.benchmarks.items import Item
from hafrm.evaluation.benchmarks.loading import Loaded, folder_of, load_benchmark
from hafrm.evaluation.benchmarks.rules import Scores
from hafrm.evaluation.benchmarks.scores import (
    PICK_LONGER,
    PICK_SHORTER,
    BenchmarkScore,
    length_scores,
    missing_terms,
    score_benchmark,
)
from hafrm.evaluation.composites import mean_of
from hafrm.evaluation.evaluate import Heads, find_heads
from hafrm.evaluation.metrics import plain
from hafrm.evaluation.statistics import Estimate
from hafrm.scoring.forward import first_responses
from hafrm.scoring.fused import FusedRewardModel
from hafrm.scoring.loading import AUTO, Placement
from hafrm.scoring.scorer import ImplicitRewardModel, RewardModel

MAX_CANDIDATES = 64
"""Most responses of one layout: a prompt with more of them is laid out again, never within an item."""


@runtime_checkable
class Judge(Protocol):
    """What is asked of a head: `RewardModel` and `ImplicitRewardModel` offer it."""

    encoder: Encoder

    def score_encoded(
        self, encoded: Sequence[EncodedGroup], done: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """The score of every response of encoded groups, in their order."""


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark: every scorer's numbers, and what its data came to."""

    loaded: Loaded
    missing: tuple[str, ...]
    """Subsets of which there are no rows: the score is then not the published benchmark's."""
    scores: dict[str, BenchmarkScore]
    """By scorer: the model's heads, then the two baselines."""
    encodings: dict[str, EncodingReport]
    """What each head's encoder had to cut."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        loaded = self.loaded
        return {
            "name": loaded.benchmark.name,
            "title": loaded.benchmark.title,
            "data": loaded.data,
            "num_rows": loaded.num_rows,
            "num_rows_published": loaded.benchmark.num_rows,
            "left_out": loaded.left_out,
            "missing": list(self.missing),
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "encodings": {name: asdict(report) for name, report in self.encodings.items()},
        }


@dataclass(frozen=True)
class Benchmarks:
    """All benchmarks of one run, and what their scores depend on."""

    model: str
    max_lengths: dict[str, int]
    """Tokens beyond which inputs were cut, by head."""
    templates: dict[str, str]
    """SHA-256 of each head's chat template."""
    results: tuple[BenchmarkResult, ...]

    @property
    def averages(self) -> dict[str, Estimate]:
        """Each scorer's mean over the quoted table; empty unless all of that table was run."""
        quoted = [r for r in self.results if r.loaded.benchmark.name in QUOTED]
        if len(quoted) < len(QUOTED):
            return {}
        names = quoted[0].scores
        return {name: mean_of([r.scores[name].overall for r in quoted]) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "model": self.model,
            "max_lengths": self.max_lengths,
            "template_sha256": self.templates,
            "average": {name: plain(asdict(each)) for name, each in self.averages.items()},
            "benchmarks": [result.to_dict() for result in self.results],
        }


def run_benchmarks(  # noqa: PLR0913 - the verb and its options
    path: str | Path,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    policy: str | Path | None = None,
    reference: str | Path | None = None,
    max_length: int | None = None,
    place: Placement = AUTO,
    done: Callable[[int, int], None] | None = None,
) -> Benchmarks:
    """The named benchmarks for the model at `path`, from the hub or from local files in `folder`.

    Every head of the model is a scorer of its own, beside the two baselines that pick by length. Raises
    ConfigError for an unknown name, DataError for unfit data, ModelError and NumericsError for the model.
    """
    chosen = find_benchmarks(names)
    places = [folder_of(each, folder, alone=len(chosen) == 1) for each in chosen]
    sets = [load_benchmark(each, place) for each, place in zip(chosen, places, strict=True)]
    absent = [missing_terms(each.benchmark, each.items) for each in sets]
    heads = find_heads(path)
    if policy is not None:
        heads = Heads(heads.reward, Path(policy))
    scores: list[dict[str, BenchmarkScore]] = [{} for _ in sets]
    reports: list[dict[str, EncodingReport]] = [{} for _ in sets]
    encoders: dict[str, Encoder] = {}
    for name, judge in _judges(heads, reference, place.options(max_length)):
        encoders[name] = judge.encoder
        for loaded, known, report in zip(sets, scores, reports, strict=True):
            found, report[name] = score_items(judge, loaded.items, done)
            known[name] = score_benchmark(loaded.benchmark, loaded.items, found)
    for loaded, known in zip(sets, scores, strict=True):
        for name, sign in ((PICK_LONGER, 1), (PICK_SHORTER, -1)):
            lengths = length_scores(loaded.items, sign=sign)
            known[name] = score_benchmark(loaded.benchmark, loaded.items, lengths)
    return Benchmarks(
        model=str(path),
        max_lengths={name: each.lengths.max_length for name, each in encoders.items()},
        templates={name: each.template_sha256 for name, each in encoders.items()},
        results=tuple(map(BenchmarkResult, sets, absent, scores, reports)),
    )


def score_items(
    judge: Judge,
    items: Sequence[Item],
    done: Callable[[int, int], None] | None = None,
) -> tuple[list[Scores], EncodingReport]:
    """One score for each candidate of each item, and what had to be cut.

    `done(responses, tokens)` hears of every finished row. Raises NumericsError for a score that is not
    finite.
    """
    groups, places = group_by_prompt(items)
    encoded, report = judge.encoder.encode(groups)
    flat = judge.score_encoded(encoded, done).astype(np.float64)
    first = first_responses(encoded)
    return [flat[first[group] + np.array(within)] for group, within in places], report


def group_by_prompt(items: Sequence[Item]) -> tuple[list[Group], list[tuple[int, list[int]]]]:
    """The groups of all items' prompts, and where each item's candidates are: (group, responses)."""
    responses: list[dict[str, int]] = []
    prompts: list[tuple[Message, ...]] = []
    open_group: dict[tuple[Message, ...], int] = {}
    places = []
    for item in items:
        group = open_group.get(item.prompt)
        if group is None or len({*responses[group], *item.candidates}) > MAX_CANDIDATES:
            group = open_group[item.prompt] = len(prompts)
            prompts.append(item.prompt)
            responses.append({})
        known = responses[group]
        places.append((group, [known.setdefault(t, len(known)) for t in item.candidates]))
    groups = [
        Group(f"prompt {i}", prompt, tuple(texts))
        for i, (prompt, texts) in enumerate(zip(prompts, responses, strict=True))
    ]
    return groups, places


def _judges(
    heads: Heads, reference: str | Path | None, options: dict[str, Any]
) -> Iterator[tuple[str, Judge]]:
    """The model's heads as scorers, one in memory at a time."""
    if heads.reward is not None:
        yield "reward", RewardModel.from_pretrained(heads.reward, **options)
    if heads.policy is not None:
        yield (
            "implicit reward",
            ImplicitRewardModel.from_pretrained(heads.policy, reference=reference, **options),
        )
    if heads.fused is not None:
        yield (
            "fused",
            FusedRewardModel.from_pretrained(heads.fused, reference=reference, **options),
        )
