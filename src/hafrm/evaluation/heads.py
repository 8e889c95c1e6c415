"""Models scored on the same comparisons by each of their heads: `evaluate` one, `compare_models` several.

Each head is a separate scorer: the reward, and the implicit reward of the policy. One model is in memory
at a time, and no model is changed.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.data.encoding import EncodingReport
from hafrm.data.reader import Source, file_digests, parse_sources
from hafrm.engine.model import longest_sequence
from hafrm.errors import ConfigError, DataError
from hafrm.evaluation.comparisons import (
    Comparisons,
    Data,
    Margins,
    ModelComparison,
    adjusted,
    compare_set,
    read_comparisons,
)
from hafrm.evaluation.metrics import Evaluation, SetResult, pairwise_metrics
from hafrm.preferences import Group, TokenizedGroup
from hafrm.progress import OnProgress, no_progress, over_passes
from hafrm.recipe_file import load_recipe
from hafrm.scoring.loading import Heads, find_heads
from hafrm.scoring.model_files import load_config
from hafrm.scoring.outputs import join_heads
from hafrm.scoring.reward_model import PolicyModel, RewardModel, Scorer
from hafrm.statistics import accuracy_interval
from hafrm.training import parallel

log = logging.getLogger("hafrm")

REWARD, IMPLICIT = "reward", "implicit reward"
Scores = dict[str, NDArray[np.float32]]
"""One score for each response of all groups, by head."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How data is read and models are loaded; `evaluate` explains each option."""

    reference: str | Path | None = None
    max_length: int | None = None
    dtype: str = "auto"
    device: str | None = None
    max_bad_fraction: float = 0.02
    max_prompt_length: int | None = None

    def cut_as_trained(self, heads: Heads) -> "EvaluationOptions":
        """The options with the lengths of the heads' run, unless a length is given, so that its validation,
        test result, comparison and evaluation see the same text."""
        exported = (heads.reward or heads.policy or Path()).parent
        if self.max_length is not None or exported.name != "model":
            return self
        try:
            data = load_recipe(exported.parent / "recipe.yaml").data
        except (ConfigError, OSError):  # another kind of run, or none: use the model's own limit
            return self
        limit = longest_sequence(load_config(heads.reward or heads.policy or exported))
        if limit is not None and limit < data.max_length:
            return self  # the model's own limit is the shorter one
        return replace(self, max_length=data.max_length, max_prompt_length=data.max_prompt_length)


def load_head(heads: Heads, name: str, options: EvaluationOptions) -> Scorer:
    """The head called REWARD or IMPLICIT, which the model has.

    Raises ConfigError for an unknown dtype or device, ModelError for a model that cannot be loaded.
    """
    names = ("dtype", "device", "max_length")
    arguments: dict[str, Any] = {name: getattr(options, name) for name in names}
    if name == REWARD:
        assert heads.reward is not None
        scorer: Scorer = RewardModel.from_pretrained(heads.reward, **arguments)
    else:
        arguments["reference"] = options.reference
        assert heads.policy is not None
        scorer = PolicyModel.from_pretrained(heads.policy, **arguments)
    if options.max_prompt_length is not None:
        lengths = scorer.encoder.lengths
        scorer.encoder.lengths = replace(lengths, max_prompt_length=options.max_prompt_length)
    if parallel.num_ranks() > 1:
        scorer.forward = partial(parallel.score_on_all_ranks, **scorer.forward.keywords)
    return scorer


def scorer_names(heads: Heads) -> list[str]:
    """The heads that the model has; the first one is its main head."""
    folders = {REWARD: heads.reward, IMPLICIT: heads.policy}
    return [name for name, folder in folders.items() if folder is not None]


def load_main_head(path: str | Path, options: EvaluationOptions) -> Scorer:
    """The model by its first head: the reward head, or the implicit reward of a policy."""
    heads = find_heads(path)
    return load_head(heads, scorer_names(heads)[0], options)


def evaluate(  # noqa: PLR0913 - every way to say what is measured
    model: str | os.PathLike[str],
    data: Data,
    *,
    reference: str | Path | None = None,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_bad_fraction: float = 0.02,
    max_prompt_length: int | None = None,
    on_progress: OnProgress = no_progress,
    **rows: Any,
) -> Evaluation:
    """Metrics of the model on each source and, if there are several, on all together.

    `reference` overrides the checkpoint that the policy names. Inputs longer than `max_length` tokens are
    cut; the default is the run's data.max_length, without a run the model's limit. Up to `max_bad_fraction`
    of a source's rows may be left out as bad; `rows` are more arguments of `read_preferences`, such as
    `columns`.

        result = hafrm.evaluate("run", "test.jsonl")
        result.accuracy.value, result.accuracy.low, result.accuracy.high

    Raises DataError for data without comparisons, ModelError for a model that cannot be scored with.
    """
    reading, comparisons = read_comparisons(data, max_bad_fraction, **rows)
    heads = find_heads(model)
    options = EvaluationOptions(
        reference, max_length, dtype, device, max_bad_fraction, max_prompt_length
    ).cut_as_trained(heads)
    trained_on = training_data(heads, data)
    scores, report = _score_all_heads(heads, comparisons, options, on_progress)
    comparisons = comparisons.scored_by(*scores.values())
    margins = {head: comparisons.margins(values) for head, values in scores.items()}
    return Evaluation(
        model=str(model),
        scored_with=next(iter(scores)),
        sets=tuple(
            _measure_set(name, comparisons.take(i), {head: m[i] for head, m in margins.items()})
            for name, i in comparisons.sets().items()
        ),
        num_bad_rows=len(reading.bad_rows) + len(report.refused),
        left_out=reading.left_out,
        prompts_cut=report.prompts_cut,
        responses_cut=report.responses_cut,
        seam_merges=report.seam_merges,
        trained_on=trained_on,
    )


def training_data(heads: Heads, data: Data) -> tuple[str, ...]:
    """Files that the heads' run was trained on, even if renamed; logs a warning for each."""
    run = (heads.reward or heads.policy or Path()).parent.parent
    given = [data] if isinstance(data, str | Path) else data
    try:
        recipe = load_recipe(run / "recipe.yaml")
        digests = json.loads((run / "provenance.json").read_bytes())["sessions"][-1]["data"]
        trained = [source for entry in recipe.data.train for source in parse_sources(entry)]
    except (ConfigError, DataError, OSError):  # no run, or one whose data are gone
        return ()
    paths = [entry for entry in given if isinstance(entry, str | Path)]
    tested = [source for entry in paths for source in parse_sources(entry)]
    now = file_digests(s.path for s in tested if s.path)
    files = dict[str, None]()
    for source in tested:
        digest = now.get(str(Path(source.path or "")))
        same = (s for s in trained if digest and digests.get(str(Path(s.path or ""))) == digest)
        if any(_overlap(source, other) for other in same):
            files[str(source.path)] = None
    for path in files:
        log.warning("%s was trained on: its accuracy says little about other data", path)
    return tuple(files)


def _overlap(one: Source, other: Source) -> bool:
    """Whether two selections of rows of a file may have rows in common, as those of two splits cannot."""
    return all(value == other.where.get(tag, value) for tag, value in one.where.items())


def _score_all_heads(
    heads: Heads, comparisons: Comparisons, options: EvaluationOptions, on_progress: OnProgress
) -> tuple[Scores, EncodingReport]:
    """Each head's scores, the main head's first, with its encoder's report."""
    scores, reports = Scores(), list[EncodingReport]()
    both, parts = _load_both(heads, options), attrgetter("rewards", "logps")
    names = scorer_names(heads) if both is None else [IMPLICIT]
    done = over_passes(on_progress, comparisons.num_responses * len(names))
    for name in names:
        scorer = load_head(heads, name, options) if both is None else both
        score = None if both is None else lambda *arguments: parts(both.score_heads(*arguments))
        own, _, report = score_groups(scorer, comparisons.groups, options, done, score)
        scores |= {name: own} if both is None else {REWARD: own[0], IMPLICIT: own[1]}
        reports.append(report)
        del scorer  # before the next one is loaded
    return scores, reports[0]


def _load_both(heads: Heads, options: EvaluationOptions) -> PolicyModel | None:
    """The policy with the reward head on the same backbone; None if the two exports do not share it."""
    if heads.reward is None or heads.policy is None:
        return None
    policy = load_head(heads, IMPLICIT, options)
    assert isinstance(policy, PolicyModel)
    return None if join_heads(heads, policy, options.max_length) is None else policy


def score_groups(
    scorer: Scorer,
    groups: Sequence[Group],
    options: EvaluationOptions,
    done: OnProgress,
    score: Callable[..., Any] | None = None,
) -> tuple[NDArray[np.float32], Sequence[TokenizedGroup], EncodingReport]:
    """(a score by `score_encoded` for each response of all groups, NaN in groups that cannot be encoded;
    the ids of the other groups; the encoder's report). DataError if more than max_bad_fraction of groups
    cannot be encoded."""
    tokenized, report = scorer.encoder.encode(groups)
    report.check(groups, options.max_bad_fraction)
    scores = np.asarray((score or scorer.score_encoded)(tokenized, done))
    is_encoded = [i not in report.refused for i in range(len(groups))]
    places = np.repeat(is_encoded, [len(group.responses) for group in groups])
    result = np.full((*scores.shape[:-1], len(places)), np.nan, np.float32)
    result[..., places] = scores
    return result, tokenized, report


def _measure_set(name: str, comparisons: Comparisons, margins: dict[str, Margins]) -> SetResult:
    metrics = {head: pairwise_metrics(comparisons, m) for head, m in margins.items()}
    decided = {head: m[~comparisons.ties] for head, m in margins.items()}
    main, prompts = next(iter(decided.values())), comparisons.prompts[~comparisons.ties]
    others: dict[str, Any] = {}
    if REWARD in margins and IMPLICIT in margins:
        others["implicit"] = metrics[IMPLICIT]
        same = np.sign(main) == np.sign(decided[IMPLICIT])
        others["same_sign"] = accuracy_interval(same, prompts)
    return SetResult(**vars(next(iter(metrics.values()))), name=name, **others)


def compare_models(
    first: Sequence[str | Path],
    second: Sequence[str | Path],
    data: Data,
    *,
    options: EvaluationOptions | None = None,
    on_progress: OnProgress = no_progress,
) -> ModelComparison:
    """Accuracy of each side on each source, and their difference; several models on a side are its seeds.

    Without a second side the result is the first one's accuracy over its seeds. Raises ConfigError for one
    seed against many, and what `evaluate` raises.
    """
    if second and (len(first) == 1) != (len(second) == 1):
        raise ConfigError(
            f"{len(first)} models against {len(second)}: give several seeds on both sides, or one model "
            "on each, because one seed does not tell how much seeds differ"
        )
    options = options or EvaluationOptions()
    comparisons = read_comparisons(data, options.max_bad_fraction)[1].decided()
    done = over_passes(on_progress, comparisons.num_responses * len([*first, *second]))

    def scores_of(path: str | Path) -> NDArray[np.float32]:
        own = options.cut_as_trained(find_heads(path))
        scorer = load_main_head(path, own)  # freed at the end
        return score_groups(scorer, comparisons.groups, own, done)[0]

    scores = [[scores_of(path) for path in paths] for paths in (first, second) if paths]
    comparisons = comparisons.scored_by(*(one for side in scores for one in side))
    # [seeds, comparisons] of each side
    sides = [np.array([comparisons.margins(one) > 0 for one in side]) for side in scores]
    results = [
        compare_set(name, comparisons.prompts[where], *(side[:, where] for side in sides))
        for name, where in comparisons.sets().items()
    ]
    return ModelComparison(tuple(map(str, first)), tuple(map(str, second)), adjusted(results))
