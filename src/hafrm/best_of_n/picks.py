"""What best of n says about reward models: curves, agreement, wins; frozen results with their tables.

Of N samples every subset of n is as good a draw as any other, so the mean over all subsets is the unbiased
estimate of best-of-n with the least variance; no subset is drawn (WebGPT, arXiv 2112.09332, appendix I;
Gao et al., arXiv 2210.10760). Every interval is over prompts: candidates of one prompt are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.best_of_n.candidates import Candidates
from hafrm.best_of_n.judges import Wins, wins_table
from hafrm.results import Real
from hafrm.statistics import (
    Estimate,
    accuracy_interval,
    bootstrap_columns,
    clustered_bootstrap,
)
from hafrm.table import Cell, Column, Table

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
class PickExample:
    """What a model picked for one prompt."""

    prompt: str
    picked: str
    reward: float
    gold: float | None


@dataclass(frozen=True)
class PickerResult:
    """One reward model as a picker."""

    name: str
    curve: tuple[CurvePoint, ...]
    gain: Estimate | None
    """Gold score of the pick among all, minus that of a random candidate."""
    peak: int | None
    """The n at which the mean gold score is highest."""
    since_peak: Estimate | None
    """Gold score of the pick among all, minus that of the pick at the peak, prompt by prompt; the peak is
    chosen on the same prompts, which makes a fall look larger than it is."""
    alpha: Real
    """Of the fit gold(n) - gold(1) = d (alpha - beta d), d = sqrt(KL)."""
    beta: Real
    top1_agreement: Estimate | None
    """Fraction of prompts whose pick is (one of) the gold score's best."""
    top1_agreement_judge: Estimate | None
    """The same by the judge's ranking."""
    examples: tuple[PickExample, ...]


@dataclass(frozen=True)
class PickBaseline:
    """What picks without a reward model: its gold curve."""

    name: str
    gold: tuple[Estimate, ...]
    """For n = 1, 2, ..."""


@dataclass(frozen=True)
class CandidateCounts:
    """What the candidates are, and what was left out."""

    num_fewer: int = 0
    """Prompts with fewer candidates than asked for; their best of more is the best of all."""
    mean_candidates: float = 0.0
    num_cut: int = 0
    """Draws that reached the token limit."""
    num_blank: int = 0
    """Draws that were not text."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Prompts that are not measured, by reason."""


@dataclass(frozen=True)
class BestOfN:
    """The result of a best-of-n job."""

    num_prompts: int
    num_candidates: int
    gold: str | None
    judge: str | None
    counts: CandidateCounts
    models: tuple[PickerResult, ...]
    baselines: tuple[PickBaseline, ...]
    top1_chance: Real | None
    """Top-1 agreement of a random pick with the gold score."""
    top1_chance_judge: Real | None
    wins: tuple[Wins, ...]

    def tables(self) -> tuple[Table, ...]:
        """Picks by the gold score, the curves for n = 1, 2, 4, ..., and wins."""
        curves = [self._curves(golden=False)]
        if self.gold is not None:
            curves.insert(0, self._curves(golden=True))
        return (self._picks(), *curves, *([wins_table(self.wins)] if self.wins else []))

    def _picks(self) -> Table:
        """One row for each model: its own score and the gold score of what it picks."""
        with_gold = self.gold is not None
        with_ranks = self.models[0].top1_agreement_judge is not None
        columns = ["picked by", "its own score"]
        columns += ["gold score", "above a random one", "picks the gold best"] * with_gold
        columns += ["picks the judge's best"] * with_ranks
        rows: list[tuple[Cell, ...]] = []
        for model in self.models:
            last = model.curve[-1]
            golden = (last.gold, model.gain, model.top1_agreement) if with_gold else ()
            ranked = (model.top1_agreement_judge,) if with_ranks else ()
            rows.append((model.name, last.proxy, *golden, *ranked))
        for baseline in self.baselines:
            blank = (None,) * (2 + with_ranks)
            rows.append((baseline.name, None, baseline.gold[-1], *blank))
        if with_gold or with_ranks:
            chance: tuple[Cell, ...] = ()
            if with_gold:
                chance = (self.models[0].curve[0].gold, None, self.top1_chance)
            ranked_chance = (self.top1_chance_judge,) if with_ranks else ()
            rows.append(("a random one", None, *chance, *ranked_chance))
        title = f"best of {self.num_candidates} on {self.num_prompts} prompts [95 %]"
        kinds = {"picks the gold best", "picks the judge's best"}
        return Table(
            title,
            tuple(Column(name, "percent" if name in kinds else "text") for name in columns),
            tuple(rows),
            tuple(self._notes()),
        )

    def _curves(self, *, golden: bool) -> Table:
        num = self.num_candidates
        powers = sorted({2**k for k in range(num.bit_length()) if 2**k <= num} | {num})
        baselines = self.baselines if golden else ()
        rows = []
        for n in powers:
            points = [model.curve[n - 1] for model in self.models]
            estimates = [point.gold if golden else point.proxy for point in points]
            estimates += [baseline.gold[n - 1] for baseline in baselines]
            rows.append((n, f"{points[0].kl:.2f}", *estimates))
        names = ("n", "KL", *(m.name for m in self.models), *(b.name for b in baselines))
        title = f"{'gold' if golden else 'own'} score of the best of n [95 %]"
        return Table(title, tuple(Column(name) for name in names), tuple(rows))

    def _notes(self) -> list[str]:
        counts = self.counts
        notes = [
            f"candidates: {counts.mean_candidates:.1f} a prompt; prompts with fewer than "
            f"{self.num_candidates}: {counts.num_fewer}; draws cut at the token limit: "
            f"{counts.num_cut}, blank: {counts.num_blank}"
        ]
        notes += [f"left out: {num} prompts: {why}" for why, num in counts.left_out.items()]
        for model in self.models if self.gold is not None else ():
            fall = f", since then {model.since_peak}" if model.peak != self.num_candidates else ""
            notes.append(
                f"{model.name}: gold(n) - gold(1) = d ({model.alpha:.3f} - {model.beta:.3f} d), "
                f"d = sqrt(KL); highest at n = {model.peak}{fall}"
            )
        return notes


def expected_picks(
    scores: Float[np.ndarray, " candidates"], values: Float[np.ndarray, " candidates"]
) -> Float[np.ndarray, " candidates"]:
    """Expected value of the highest scored of n random candidates, for n = 1, 2, ..., all of them.

    Of equal scores the earlier candidate is taken, as `argmax` does, so the last entry is the value of
    the pick among all. `values` are the scores themselves (proxy) or others (gold).
    """
    num = len(scores)
    order = np.lexsort((-np.arange(num), scores))
    # Row n - 1: the chance that the candidate with i lower ones is the best of n drawn without return. The
    # other n - 1 come from the i lower ones: C(i, n - 1) / C(num, n), by its ratio to the row above.
    lower = np.arange(num, dtype=np.float64)
    rows = [np.full(num, 1.0 / num)]
    for n in range(1, num):
        rows.append(rows[-1] * np.maximum(lower - n + 1, 0.0) * (n + 1) / (n * (num - n)))
    curve: NDArray[np.float64] = np.stack(rows) @ np.asarray(values, np.float64)[order]
    return curve


def kl_of_best(n: int) -> float:
    """KL(best of n || policy) in nat: log n - (n - 1) / n.

    Exact for independent samples that never repeat or tie, else an upper bound (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def fit_gold(
    kl: Float[np.ndarray, " points"], gain: Float[np.ndarray, " points"]
) -> tuple[float, float]:
    """(alpha, beta) of gain = d (alpha - beta d) with d = sqrt(KL), by least squares; NaN for fewer than
    three points.

    The form that Gao et al. (arXiv 2210.10760, Eq. 1) found for best-of-n: `gain` is the gold reward
    above that of n = 1, and beta above 0 bends the curve down again, at d = alpha / (2 beta).
    """
    if len(kl) < 3:
        return math.nan, math.nan
    d = np.sqrt(np.asarray(kl, np.float64))
    design: NDArray[np.float64] = np.stack([d, -(d**2)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(design, np.asarray(gain, np.float64), rcond=None)
    return float(alpha), float(beta)


def best_indices(scores: PerPrompt) -> NDArray[np.int64]:
    """The index of the best candidate of each prompt; the first of equals."""
    return np.array([int(np.argmax(s)) for s in scores], np.int64)


def curve_values(
    candidates: Sequence[Candidates], scores: PerPrompt, values: PerPrompt, num: int
) -> NDArray[np.float64]:
    """[prompts, num]: the expected value of the best of n draws by score, for every prompt and n."""
    rows = []
    for c, s, v in zip(candidates, scores, values, strict=True):
        drawn = list(c.drawn)
        curve = expected_picks(s[drawn], v[drawn])
        # a prompt with fewer candidates: for larger n the best of all it has
        rows.append(np.concatenate([curve, np.full(num - len(curve), curve[-1])]))
    return np.stack(rows)


def measure_picker(
    name: str,
    candidates: Sequence[Candidates],
    scores: PerPrompt,
    gold: PerPrompt | None,
    ranks: Sequence[Ranks] | None,
    num: int,
) -> PickerResult:
    """The curves and agreements of one model's picks."""
    kl = [kl_of_best(n) for n in range(1, num + 1)]
    proxy = bootstrap_columns(curve_values(candidates, scores, scores, num))
    golden: Sequence[Estimate | None] = [None] * num
    gain, peak, since, alpha, beta, agreement = None, None, None, math.nan, math.nan, None
    if gold is not None:
        values = curve_values(candidates, scores, gold, num)
        golden = bootstrap_columns(values)
        gain = clustered_bootstrap(values[:, -1] - values[:, 0], proportion=False)
        means = values.mean(0)
        peak = int(np.argmax(means)) + 1
        since = clustered_bootstrap(values[:, -1] - values[:, peak - 1], proportion=False)
        alpha, beta = fit_gold(np.array(kl), means - means[0])
        agreement = _agreement(best_indices(scores), gold)
    ranked = None
    if ranks is not None:
        pairs = [(k, -r) for k, r in zip(best_indices(scores), ranks, strict=True) if r is not None]
        ranked = _agreement(np.array([k for k, _ in pairs], np.int64), [r for _, r in pairs])
    points = zip(range(1, num + 1), kl, proxy, golden, strict=True)
    return PickerResult(
        name=name,
        curve=tuple(CurvePoint(*point) for point in points),
        gain=gain,
        peak=peak,
        since_peak=since,
        alpha=alpha,
        beta=beta,
        top1_agreement=agreement,
        top1_agreement_judge=ranked,
        examples=(),
    )


def _agreement(picked: NDArray[np.int64], values: PerPrompt) -> Estimate:
    """Fraction of picks that have their prompt's highest value."""
    hits = [v[k] == v.max() for k, v in zip(picked, values, strict=True)]
    return accuracy_interval(np.array(hits, bool))


def chance_of_best(values: Sequence[Ranks]) -> float:
    """How often a random candidate has its prompt's highest value."""
    fractions = [float(np.mean(v == v.max())) for v in values if v is not None]
    return float(np.mean(fractions)) if fractions else math.nan


def measure_baselines(
    candidates: Sequence[Candidates], gold: PerPrompt, num: int
) -> tuple[PickBaseline, ...]:
    """Gold curves of picking the longest candidate, and of picking by the gold score itself."""
    lengths = [np.array([len(t) for t in c.group.responses], np.float64) for c in candidates]
    return tuple(
        PickBaseline(name, bootstrap_columns(curve_values(candidates, scores, gold, num)))
        for name, scores in (("longest", lengths), ("gold itself", gold))
    )
