"""Models scored on the same comparisons by each of their heads: `evaluate` one, `compare_models` several.

Takes a run folder, its `model/`, or any directory that stock transformers loads. Each head is a scorer of
its own: the reward, the implicit reward of the policy, and their fused score. One model is in memory at a
time, and no model is changed.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.data.encoding import EncodingReport
from hafrm.errors import ConfigError, ModelError
from hafrm.evaluation.comparisons import (
    Comparisons,
    Data,
    ScoredComparisons,
    read_comparisons,
)
from hafrm.evaluation.metrics import Evaluation, SetResult, agreement, pairwise_metrics
from hafrm.evaluation.paired import ModelComparison, adjusted, compare_set
from hafrm.preferences import TokenizedGroup
from hafrm.progress import OnProgress, no_progress
from hafrm.scoring.fused import (
    FusedRewardModel,
    find_fused,
    fused_scores,
    per_token,
    read_fused_rule,
)
from hafrm.scoring.loading import Placement, is_reward_directory
from hafrm.scoring.scorer import ImplicitRewardModel, RewardModel, Scorer
from hafrm.statistics import paired_bootstrap

REWARD, IMPLICIT, FUSED = "reward", "implicit reward", "fused"


@dataclass(frozen=True)
class Heads:
    """The directories that a model path refers to."""

    reward: Path | None
    policy: Path | None
    fused: Path | None = None
    """The folder with both heads and the rule of their fused score."""


@dataclass(frozen=True)
class LoadOptions:
    """How models are loaded for an evaluation."""

    reference: str | Path | None = None
    """The reference of a policy, if not the one it names."""
    max_length: int | None = None
    """Tokens beyond which inputs are cut; None: the model's limit."""
    dtype: str = "auto"
    device: str | None = None

    def arguments(self) -> dict[str, Any]:
        """For `from_pretrained`; raises ConfigError for an unknown dtype or device."""
        return Placement(self.dtype, self.device).options(self.max_length)


def find_heads(path: str | os.PathLike[str], policy: str | Path | None = None) -> Heads:
    """Reward and policy directories of a run folder, of its `model/`, or the directory itself.

    `policy` takes the place of the policy that is there. Raises ModelError if there is no model.
    """
    root = Path(path)
    heads = None
    # a run folder has its exports in model/
    for folder in (root / "model", root):
        reward, own = (p if p.is_dir() else None for p in (folder / "reward", folder / "policy"))
        if reward or own:
            # a rule whose heads were moved away is of no use
            heads = Heads(reward, own, find_fused(folder) if reward and own else None)
            break
    if heads is None:
        if root.is_dir() and not (root / "config.json").is_file():
            raise ModelError(
                f"{path} holds no model: neither model/reward nor model/policy nor a config.json; a "
                "run that has not finished has none yet"
            )
        heads = Heads(root, None) if is_reward_directory(root) else Heads(None, root)
    # the fused rule was fitted with the policy that is replaced
    return heads if policy is None else Heads(heads.reward, Path(policy))


def load_head(heads: Heads, name: str, options: LoadOptions) -> Scorer:
    """The head called REWARD, IMPLICIT or FUSED, which the model has."""
    arguments = options.arguments()
    if name == REWARD:
        assert heads.reward is not None
        return RewardModel.from_pretrained(heads.reward, **arguments)
    arguments["reference"] = options.reference
    if name == IMPLICIT:
        assert heads.policy is not None
        return ImplicitRewardModel.from_pretrained(heads.policy, **arguments)
    assert heads.fused is not None
    return FusedRewardModel.from_pretrained(heads.fused, **arguments)


def scorer_names(heads: Heads) -> list[str]:
    """The heads that the model has; the first one is what it is used by."""
    folders = {REWARD: heads.reward, IMPLICIT: heads.policy, FUSED: heads.fused}
    return [name for name, folder in folders.items() if folder is not None]


def load_main_head(path: str | Path, options: LoadOptions) -> Scorer:
    """The reward of the model at `path`; of a policy alone, its implicit reward."""
    heads = find_heads(path)
    return load_head(heads, scorer_names(heads)[0], options)


def count_responses(on_progress: OnProgress, total: int) -> Callable[[int, int], None]:
    """`on_progress` as the callback that scorers take: called with (more responses, tokens)."""
    done = 0

    def add(responses: int, _: int) -> None:
        nonlocal done
        done += responses
        on_progress(done, total)

    return add


def evaluate(  # noqa: PLR0913 - every way to say what is measured
    model: str | os.PathLike[str],
    data: Data,
    *,
    policy: str | Path | None = None,
    reference: str | Path | None = None,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_bad_fraction: float = 0.02,
    on_progress: OnProgress = no_progress,
) -> Evaluation:
    """Metrics of the model on each source and, if there are several, on all together.

    `policy` adds a policy's implicit reward; `reference` overrides the checkpoint that the policy names.

    >>> result = hafrm.evaluation.evaluate("run", "test.jsonl")
    >>> result.accuracy.value, result.accuracy.low, result.accuracy.high

    Raises DataError for data without comparisons, ModelError for a model that cannot be scored with.
    """
    reading, comparisons = read_comparisons(data, max_bad_fraction)
    heads = find_heads(model, policy)
    scores = _score_all_heads(
        heads, comparisons, LoadOptions(reference, max_length, dtype, device), on_progress
    )
    return Evaluation(
        model=str(model),
        scored_with=next(iter(scores.by_head)),
        sets=tuple(
            _measure_set(name, comparisons.take(indices), scores.by_head)
            for name, indices in comparisons.sets().items()
        ),
        num_bad_rows=len(reading.bad_rows),
        left_out=reading.left_out,
        prompts_cut=scores.report.prompts_cut,
        responses_cut=scores.report.responses_cut,
        seam_merges=scores.report.seam_merges,
        fused_rule=scores.fused_rule,
    )


@dataclass
class _Scores:
    """One score per response from each of the model's heads, the main head first."""

    by_head: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    report: EncodingReport = field(default_factory=EncodingReport)
    """Of the main head's encoder."""
    fused_rule: str | None = None


def _score_all_heads(
    heads: Heads, comparisons: Comparisons, options: LoadOptions, on_progress: OnProgress
) -> _Scores:
    """The heads one after another."""
    result, by_token = _Scores(), None
    # the fused score follows from the other two, without a pass of its own
    names = [name for name in scorer_names(heads) if name != FUSED]
    done = count_responses(on_progress, comparisons.num_responses * len(names))
    for name in names:
        scorer = load_head(heads, name, options)
        tokenized, report = scorer.encoder.encode(comparisons.groups)
        result.by_head[name] = scorer.score_encoded(tokenized, done)
        if name == names[0]:
            result.report = report
        if isinstance(scorer, ImplicitRewardModel) and heads.fused is not None:
            # with the policy's own tokens: the reward's encoder may cut elsewhere
            by_token = per_token(result.by_head[name], _lengths(tokenized), scorer.rule)
        del scorer  # before the next one is loaded
    if heads.fused is not None and by_token is not None:
        rule = read_fused_rule(heads.fused)
        result.by_head[FUSED] = fused_scores(result.by_head[REWARD], by_token, rule)
        result.fused_rule = str(rule)
    return result


def _lengths(groups: Sequence[TokenizedGroup]) -> NDArray[np.int64]:
    return np.array([len(ids) for group in groups for ids in group.response_ids], np.int64)


def _measure_set(
    name: str, comparisons: Comparisons, scores: dict[str, NDArray[np.float32]]
) -> SetResult:
    scored = {head: comparisons.scored(values) for head, values in scores.items()}
    main = next(iter(scored.values()))
    decided = ~main.ties
    margins, prompts = main.margins[decided], main.prompts[decided]
    others: dict[str, Any] = {}
    if REWARD in scored and IMPLICIT in scored:
        others["implicit"] = pairwise_metrics(scored[IMPLICIT])
        others["agreement"] = agreement(margins, scored[IMPLICIT].margins[decided], prompts)
    if FUSED in scored:
        others["fused"] = pairwise_metrics(scored[FUSED])
        right = scored[FUSED].margins[decided] > 0
        others["fused_gain"] = paired_bootstrap(right, margins > 0, prompts)
    num_groups = len(set(comparisons.owner.tolist()))
    return SetResult(**vars(pairwise_metrics(main)), name=name, num_groups=num_groups, **others)


def compare_models(  # noqa: PLR0913 - every way to say what is compared
    first: Sequence[str | Path],
    second: Sequence[str | Path],
    data: Data,
    *,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_bad_fraction: float = 0.02,
    on_progress: OnProgress = no_progress,
) -> ModelComparison:
    """Accuracy of each side on each source, and their difference; several models of a side are its seeds.

    Each model is scored by its reward, or by its implicit reward if it is a policy only. Without a second
    side the result is the first one's accuracy over its seeds.

    Raises ConfigError for one seed against many, and what `evaluate` raises.
    """
    if second and (len(first) == 1) != (len(second) == 1):
        raise ConfigError(
            f"{len(first)} models against {len(second)}: give several seeds on both sides, or one model "
            "on each, because one seed does not tell how much seeds differ"
        )
    _, comparisons = read_comparisons(data, max_bad_fraction)
    sets = comparisons.sets()
    num_models = len(first) + len(second)
    done = count_responses(on_progress, comparisons.num_responses * num_models)

    def score(path: str | Path) -> dict[str, ScoredComparisons]:
        scorer = load_main_head(
            path, LoadOptions(max_length=max_length, dtype=dtype, device=device)
        )
        tokenized, _ = scorer.encoder.encode(comparisons.groups)
        scores = scorer.score_encoded(tokenized, done)
        # the model is freed here: only its scores are kept
        return {name: comparisons.take(where).scored(scores) for name, where in sets.items()}

    sides = [[score(path) for path in paths] for paths in (first, second)]
    results = [
        compare_set(name, *([model[name] for model in side] for side in sides)) for name in sets
    ]
    return ModelComparison(tuple(map(str, first)), tuple(map(str, second)), adjusted(results))
