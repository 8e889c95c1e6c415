"""How good a reward model is on preference data: `evaluate` runs it and measures each source.

Takes a run folder, its `model/`, or any directory that stock transformers loads. Where there is a reward
model it is what scores; where there is (also) a policy, its implicit reward is measured beside it.
Nothing is trained or selected here, and the model is not changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hafrm.data.encoding import EncodingReport
from hafrm.data.reader import PreferenceData, read_preferences
from hafrm.errors import DataError, ModelError
from hafrm.evaluation.metrics import (
    Agreement,
    PairwiseMetrics,
    ScoredComparisons,
    agreement,
    measure,
    plain,
)
from hafrm.preferences import Group, TokenizedGroup, prompt_key
from hafrm.scoring.forward import first_responses
from hafrm.scoring.fused import (
    FusedRule,
    find_fused,
    fused_scores,
    per_token,
    read_fused_rule,
)
from hafrm.scoring.loading import is_reward_directory
from hafrm.scoring.scorer import ImplicitRewardModel, RewardModel
from hafrm.statistics import Estimate, paired_bootstrap


@dataclass(frozen=True)
class SetResult:
    """What was found on one source, or on all of them together."""

    name: str
    num_groups: int
    metrics: PairwiseMetrics
    """Of the reward, or of the implicit reward where the model is a policy only."""
    implicit: PairwiseMetrics | None
    """Of the implicit reward, where both heads were given."""
    agreement: Agreement | None
    """Of reward and implicit reward."""
    fused: PairwiseMetrics | None = None
    """Of the fused score, where the run left a rule for it."""
    fused_gain: Estimate | None = None
    """Accuracy of the fused score minus that of the reward, paired."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "name": self.name,
            "num_groups": self.num_groups,
            **self.metrics.to_dict(),
            "implicit": None if self.implicit is None else self.implicit.to_dict(),
            "agreement": None if self.agreement is None else self.agreement.to_dict(),
            "fused": None if self.fused is None else self.fused.to_dict(),
            "fused_gain": None if self.fused_gain is None else plain(asdict(self.fused_gain)),
        }


@dataclass(frozen=True)
class Evaluation:
    """All sets, and what had to be done to the data."""

    model: str
    scored_with: str
    """"reward" or "implicit reward"."""
    sets: tuple[SetResult, ...]
    num_bad_rows: int
    left_out: dict[str, int]
    """Rows of named sets that these do not use, by reason."""
    encoding: EncodingReport
    fused: FusedRule | None = None
    """By what the fused score was made."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        report = self.encoding
        return {
            "model": self.model,
            "scored_with": self.scored_with,
            "sets": [result.to_dict() for result in self.sets],
            "num_bad_rows": self.num_bad_rows,
            "left_out": self.left_out,
            "responses_cut": report.responses_cut,
            "prompts_cut": report.prompts_cut,
            "seam_merges": report.seam_merges,
            "fused": None if self.fused is None else plain(asdict(self.fused)),
        }


@dataclass(frozen=True)
class Heads:
    """The directories that a path stands for."""

    reward: Path | None
    policy: Path | None
    fused: Path | None = None
    """The folder with both and the rule of their fused score."""


def find_heads(path: str | Path) -> Heads:
    """Reward and policy directories of a run folder, of its `model/`, or the directory itself.

    Raises ModelError when there is no model.
    """
    root = Path(path)
    for folder in (root / "model", root):
        reward, policy = (p if p.is_dir() else None for p in (folder / "reward", folder / "policy"))
        if reward or policy:
            return Heads(reward, policy, find_fused(folder) if reward and policy else None)
    if root.is_dir() and not (root / "config.json").is_file():
        raise ModelError(
            f"{path} holds no model: neither model/reward nor model/policy nor a config.json; a run "
            "that has not finished has none yet"
        )
    return Heads(root, None) if is_reward_directory(path) else Heads(None, root)


def load_judge(
    path: str | Path, *, reference: str | Path | None = None, max_length: int | None = None
) -> RewardModel | ImplicitRewardModel:
    """The main head of the model at `path`: its reward; of a policy alone, its implicit reward.

    `reference` overrides the checkpoint that such a policy names.
    """
    heads = find_heads(path)
    if heads.reward is not None:
        return RewardModel.from_pretrained(heads.reward, max_length=max_length)
    assert heads.policy is not None
    return ImplicitRewardModel.from_pretrained(
        heads.policy, reference=reference, max_length=max_length
    )


def evaluate(  # noqa: PLR0913 - the verb and its options
    path: str | Path,
    sources: Sequence[str],
    *,
    policy: str | Path | None = None,
    reference: str | Path | None = None,
    max_length: int | None = None,
    max_bad_fraction: float = 0.02,
    done: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Metrics of the model at `path` on each source and, for several, on all together.

    `policy` adds a policy's implicit reward; `reference` overrides the checkpoint that the policy names.
    Raises DataError for data without comparisons, ModelError for a model that cannot be scored with.
    """
    reading, groups = read_comparisons(sources, max_bad_fraction)
    heads = find_heads(path)
    if policy is not None:
        heads = Heads(heads.reward, Path(policy))
    scores = _score_heads(heads, groups, reference, max_length, done)
    return Evaluation(
        model=str(path),
        scored_with="implicit reward" if scores.rewards is None else "reward",
        sets=_measure_sets(groups, scores),
        num_bad_rows=len(reading.bad_rows),
        left_out=reading.left_out,
        encoding=scores.report,
        fused=scores.rule,
    )


class _HeadScores(NamedTuple):
    """One score per response from each of the model's heads, and from both together."""

    encoded: Sequence[TokenizedGroup]
    report: EncodingReport
    rewards: NDArray[np.float32] | None = None
    implicit: NDArray[np.float32] | None = None
    fused: NDArray[np.float32] | None = None
    rule: FusedRule | None = None


def _score_heads(
    heads: Heads,
    groups: Sequence[Group],
    reference: str | Path | None,
    max_length: int | None,
    done: Callable[[int, int], None] | None,
) -> _HeadScores:
    """The heads one after another, with one model in memory at a time."""
    scores = _HeadScores((), EncodingReport())
    share: NDArray[np.float32] | None = None
    if heads.policy is not None:
        judge = ImplicitRewardModel.from_pretrained(
            heads.policy, reference=reference, max_length=max_length
        )
        encoded, report = judge.encoder.encode(groups)
        scores = _HeadScores(encoded, report, implicit=judge.score_encoded(encoded))
        if heads.fused is not None and scores.implicit is not None:
            lengths = np.array([len(ids) for group in encoded for ids in group.response_ids])
            share = per_token(scores.implicit, lengths, judge.rule)
        del judge
    if heads.reward is not None:
        model = RewardModel.from_pretrained(heads.reward, max_length=max_length)
        encoded, report = model.encoder.encode(groups)
        rewards = model.score_encoded(encoded, done)
        scores = scores._replace(encoded=encoded, report=report, rewards=rewards)
        if heads.fused is not None and share is not None:
            rule = read_fused_rule(heads.fused)
            scores = scores._replace(fused=fused_scores(rewards, share, rule), rule=rule)
    return scores


def read_comparisons(
    sources: Sequence[str], max_bad_fraction: float
) -> tuple[PreferenceData, list[Group]]:
    """What the sources hold, and their groups that have comparisons.

    Raises DataError where no comparison is decided.
    """
    reading = read_preferences(sources, max_bad_fraction=max_bad_fraction)
    groups = [group for group in reading.groups if group.comparisons]
    if not any(not c.tie for group in groups for c in group.comparisons):
        raise DataError(f"{', '.join(map(str, sources))} hold no comparison to evaluate on")
    return reading, groups


def sets_of(groups: Sequence[Group]) -> dict[str, list[int]]:
    """The indices of each source's groups, and of "all" where there are several sources."""
    names = list(dict.fromkeys(group.source for group in groups))
    parts = {name: [i for i, g in enumerate(groups) if g.source == name] for name in names}
    return parts | {"all": list(range(len(groups)))} if len(parts) > 1 else parts


def _measure_sets(groups: Sequence[Group], scores: _HeadScores) -> tuple[SetResult, ...]:
    """One result for each source, and one for all when there are several."""
    results = []
    for name, part in sets_of(groups).items():
        main, other, fused = (
            None if each is None else scored_comparisons(groups, scores.encoded, part, each)
            for each in (scores.rewards, scores.implicit, scores.fused)
        )
        if main is None:
            main, other = other, None
        assert main is not None
        results.append(_measure_set(name, len(part), main, other, fused))
    return tuple(results)


def _measure_set(
    name: str,
    num_groups: int,
    main: ScoredComparisons,
    other: ScoredComparisons | None,
    fused: ScoredComparisons | None,
) -> SetResult:
    decided = ~main.ties
    margins, prompts = main.margins[decided], main.prompts[decided]
    result = SetResult(name, num_groups, measure(main), None, None)
    if other is not None:
        result = replace(
            result,
            implicit=measure(other),
            agreement=agreement(margins, other.margins[decided], prompts),
        )
    if fused is not None:
        gain = paired_bootstrap(fused.margins[decided] > 0, margins > 0, prompts)
        result = replace(result, fused=measure(fused), fused_gain=gain)
    return result


def scored_comparisons(
    groups: Sequence[Group],
    encoded: Sequence[TokenizedGroup],
    part: Sequence[int],
    scores: NDArray[np.float32],
) -> ScoredComparisons:
    """The comparisons of the groups in `part` (indices) with the scores of all groups' responses.

    Lengths are in characters, as in benchmarks: tokens would be cut where the model's input is, and two
    long responses would seem equally long.
    """
    first = first_responses(encoded)
    lengths = {i: [len(text) for text in groups[i].responses] for i in part}
    rows = [(i, c) for i in part for c in groups[i].comparisons]
    return ScoredComparisons(
        chosen_scores=np.array([scores[first[i] + c.chosen] for i, c in rows]),
        rejected_scores=np.array([scores[first[i] + c.rejected] for i, c in rows]),
        chosen_lengths=np.array([lengths[i][c.chosen] for i, c in rows]),
        rejected_lengths=np.array([lengths[i][c.rejected] for i, c in rows]),
        prompts=np.array([prompt_key(groups[i].prompt) for i, _ in rows]),
        ties=np.array([c.tie for _, c in rows]),
    )
