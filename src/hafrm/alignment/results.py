"""What best-of-n says about reward models: curves, agreement, wins; frozen results, ready for JSON.

Plain arrays in. Every mean is over prompts, and so is every interval: candidates of one prompt are no
independent witnesses.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.alignment.candidates import Candidates
from hafrm.alignment.curves import expected_picks, filled_up, fit_gold, kl_of_best
from hafrm.alignment.judge import Conduct, Verdict, conduct
from hafrm.results import to_plain
from hafrm.statistics import (
    Estimate,
    accuracy_interval,
    bootstrap_columns,
    clustered_bootstrap,
    seeded_difference,
    seeded_mean,
)

PerPrompt = Sequence[NDArray[np.float64]]
"""For every prompt a number for each of its distinct candidates."""
Ranks = NDArray[np.float64] | None
"""A judge's mean rank of each candidate, 0 the best; None where it gave none."""


@dataclass(frozen=True)
class CurvePoint:
    """The best of n random candidates."""

    n: int
    kl: float
    """log n - (n - 1) / n, nat."""
    proxy: Estimate
    """Mean score of the pick, by the model that picks."""
    gold: Estimate | None
    """Mean gold score of the pick."""


@dataclass(frozen=True)
class Example:
    """What a model picked for one prompt."""

    prompt: str
    picked: str
    reward: float
    gold: float | None


@dataclass(frozen=True)
class ModelResult:
    """One reward model as a picker."""

    name: str
    curve: tuple[CurvePoint, ...]
    gain: Estimate | None
    """Gold score of the pick among all above that of a random candidate."""
    peak: int | None
    """The n at which the mean gold score is highest."""
    since_peak: Estimate | None
    """Gold score of the pick among all above that of the pick at the peak, prompt by prompt; the peak is
    chosen on the same prompts, which makes a fall look larger than it is."""
    alpha: float
    """Of the fit gold(n) - gold(1) = d (alpha - beta d), d = sqrt(KL)."""
    beta: float
    top1_agreement: Estimate | None
    """Share of prompts whose pick is (one of) the gold score's best."""
    top1_agreement_judge: Estimate | None
    """The same by the judge's ranking."""
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Baseline:
    """What picks without a reward model: its gold curve alone."""

    name: str
    gold: tuple[Estimate, ...]
    """For n = 1, 2, ..."""


@dataclass(frozen=True)
class Wins:
    """The picks of two methods against each other, prompt by prompt; equal picks tie."""

    first: str
    second: str
    judge: str
    win: Estimate
    tie: Estimate
    lose: Estimate
    difference: Estimate
    """win - lose."""
    same: float
    """Share of prompts for which both picked the same candidate."""
    num_not_judged: int
    """Left out of all shares."""
    conduct: Conduct | None
    """Of a judge that is asked, over these pairs."""

    def to_dict(self) -> dict[str, Any]:
        """Shares as numbers, their estimates apart."""
        shares = {"win": self.win, "tie": self.tie, "lose": self.lose}
        return {
            "first": self.first,
            "second": self.second,
            "judge": self.judge,
            **{name: estimate.value for name, estimate in shares.items()},
            "estimates": {name: asdict(estimate) for name, estimate in shares.items()},
            "difference": asdict(self.difference),
            "same": self.same,
            "num_not_judged": self.num_not_judged,
            "position_bias": None if self.conduct is None else self.conduct.position_bias,
            "conduct": None if self.conduct is None else asdict(self.conduct),
        }


@dataclass(frozen=True)
class Counts:
    """What the candidates are, and what was left out."""

    num_fewer: int = 0
    """Prompts with fewer candidates than asked for; their best of more is the best of all."""
    mean_candidates: float = 0.0
    num_unended: int = 0
    """Draws that ran into the limit of tokens."""
    num_blank: int = 0
    """Draws that were no text."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Prompts that are not measured, by reason."""


@dataclass(frozen=True)
class BestOfN:
    """Everything that a job found."""

    num_prompts: int
    num_candidates: int
    gold: str | None
    judge: str | None
    counts: Counts
    models: tuple[ModelResult, ...]
    baselines: tuple[Baseline, ...]
    top1_chance: float | None
    """Top-1 agreement of a random pick with the gold score."""
    top1_chance_judge: float | None
    wins: tuple[Wins, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        known = {name: value for name, value in asdict(self).items() if name != "wins"}
        return {**to_plain(known), "wins": [to_plain(each.to_dict()) for each in self.wins]}


def picks(scores: PerPrompt) -> NDArray[np.int64]:
    """The index of the best candidate of each prompt; the first of equals."""
    return np.array([int(np.argmax(each)) for each in scores], np.int64)


def curve_values(
    candidates: Sequence[Candidates], scores: PerPrompt, values: PerPrompt, num: int
) -> NDArray[np.float64]:
    """[prompts, num]: the expected value of the best of n draws by score, for every prompt and n."""
    rows = []
    for each, s, v in zip(candidates, scores, values, strict=True):
        drawn = list(each.drawn)
        rows.append(filled_up(expected_picks(s[drawn], v[drawn]), num))
    return np.stack(rows)


def measure_model(
    name: str,
    candidates: Sequence[Candidates],
    scores: PerPrompt,
    gold: PerPrompt | None,
    ranks: Sequence[Ranks] | None,
    num: int,
) -> ModelResult:
    """The curves and agreements of one model's picks."""
    kl = [kl_of_best(n) for n in range(1, num + 1)]
    proxy = bootstrap_columns(curve_values(candidates, scores, scores, num))
    golden: Sequence[Estimate | None] = [None] * num
    gain, peak, since, alpha, beta, best = None, None, None, math.nan, math.nan, None
    if gold is not None:
        values = curve_values(candidates, scores, gold, num)
        golden = bootstrap_columns(values)
        gain = clustered_bootstrap(values[:, -1] - values[:, 0], proportion=False)
        means = values.mean(0)
        peak = int(np.argmax(means)) + 1
        since = clustered_bootstrap(values[:, -1] - values[:, peak - 1], proportion=False)
        alpha, beta = fit_gold(np.array(kl), means - means[0])
        best = _agreement(picks(scores), gold)
    return ModelResult(
        name=name,
        curve=tuple(
            CurvePoint(n, k, p, g)
            for n, (k, p, g) in enumerate(zip(kl, proxy, golden, strict=True), 1)
        ),
        gain=gain,
        peak=peak,
        since_peak=since,
        alpha=alpha,
        beta=beta,
        top1_agreement=best,
        top1_agreement_judge=None if ranks is None else _ranked_agreement(picks(scores), ranks),
        examples=(),
    )


def _agreement(picked: NDArray[np.int64], values: PerPrompt) -> Estimate:
    """Share of picks that have their prompt's highest value."""
    return accuracy_interval(
        np.array([v[k] == v.max() for k, v in zip(picked, values, strict=True)], bool)
    )


def _ranked_agreement(picked: NDArray[np.int64], ranks: Sequence[Ranks]) -> Estimate:
    """Share of picks that a judge ranks first (or level with the first), of the prompts that it ranked."""
    ranked = [(k, -r) for k, r in zip(picked, ranks, strict=True) if r is not None]
    return _agreement(np.array([k for k, _ in ranked], np.int64), [r for _, r in ranked])


def chance_of_best(values: Sequence[Ranks]) -> float:
    """How often a random candidate has its prompt's highest value."""
    shares = [float(np.mean(v == v.max())) for v in values if v is not None]
    return float(np.mean(shares)) if shares else math.nan


def measure_wins(
    first: str,
    second: str,
    judge: str,
    same: NDArray[np.bool_],
    verdicts: Sequence[Verdict],
    *,
    num_seeds: int = 1,
) -> Wins:
    """Shares of wins, ties and losses of the first method; `same` tells where both picked one candidate.

    With several seeds their verdicts stand one after the other, on the same prompts, and the intervals are
    over prompts and seeds; a prompt that is not judged for one seed is then left out for all.
    """
    preferred = [np.nan if v.preferred is None else v.preferred for v in verdicts]
    signs = np.array(preferred, np.float64).reshape(num_seeds, -1)
    judged = signs[:, ~np.isnan(signs).any(0)]
    several = num_seeds > 1 and judged.size > 0

    def share(which: int) -> Estimate:
        hits = judged == which
        return seeded_mean(hits) if several else accuracy_interval(hits.ravel())

    asked = conduct(verdicts)
    # against nothing at all: wins - losses lie between -1 and 1, where seeded_mean would cut at 0
    mean_sign = (
        seeded_difference(judged, np.zeros_like(judged)).estimate
        if several
        else clustered_bootstrap(judged.ravel())
    )
    return Wins(
        first=first,
        second=second,
        judge=judge,
        win=share(1),
        tie=share(0),
        lose=share(-1),
        difference=mean_sign,
        same=float(np.mean(same)),
        num_not_judged=signs.size - judged.size,
        conduct=asked if asked.num_pairs else None,
    )


def measure_baselines(
    candidates: Sequence[Candidates], gold: PerPrompt, num: int
) -> tuple[Baseline, ...]:
    """Gold curves of picking the longest candidate, and of picking by the gold score itself."""
    lengths = [
        np.array([len(text) for text in each.group.responses], np.float64) for each in candidates
    ]
    return tuple(
        Baseline(name, bootstrap_columns(curve_values(candidates, scores, gold, num)))
        for name, scores in (("longest", lengths), ("gold itself", gold))
    )
