"""What best of n says about reward models: curves and gains, with their tables.

The mean over all subsets of n of N samples is the minimum-variance unbiased estimate of best-of-n (WebGPT,
arXiv 2112.09332, appendix I). Every interval is over prompts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.best_of_n.candidates import Candidates
from hafrm.best_of_n.judges import Wins, wins_table
from hafrm.results import Cell, Column, Table, columns
from hafrm.statistics import Estimate, bootstrap_columns, clustered_bootstrap

PerPrompt = Sequence[NDArray[np.float64]]
"""For every prompt, a number for each of its distinct candidates."""


@dataclass(frozen=True)
class CurvePoint:
    """The best of n random candidates."""

    n: int
    kl: float  # of the best of n from the policy, nat: log n - (n - 1) / n
    proxy: Estimate  # mean score of the pick, by the model that picks
    gold: Estimate | None  # mean gold score of the pick


@dataclass(frozen=True)
class PickerResult:
    """One reward model as a picker; without a gold score, all fields except the first two are empty."""

    name: str
    curve: tuple[CurvePoint, ...]
    gain: Estimate | None = None
    """Gold score of the pick among all candidates, minus that of a random candidate."""
    peak: int | None = None  # the n at which the mean gold score is highest
    since_peak: Estimate | None = None
    """Gold score of the pick among all candidates, minus that of the pick at the peak, per prompt. The peak
    is chosen on the same prompts, which makes a fall look larger than it is."""


@dataclass(frozen=True)
class BestOfN:
    """The result of a best-of-n job."""

    num_prompts: int
    num_candidates: int
    gold: str | None
    judge: str | None
    mean_candidates: float  # per prompt
    num_fewer: int  # prompts with fewer than num_candidates; for larger n, the best of all counts
    num_cut: int  # draws that reached the token limit
    num_blank: int  # draws that were not text
    left_out: dict[str, int]  # prompts that are not measured, by reason
    models: tuple[PickerResult, ...]
    baselines: tuple[PickerResult, ...]  # picks without a reward model
    wins: tuple[Wins, ...]

    def tables(self) -> tuple[Table, ...]:
        """Picks by the gold score, the curves for n = 1, 2, 4, ..., and wins."""
        golden = (False,) if self.gold is None else (True, False)
        wins = [wins_table(self.wins)] if self.wins else []
        return (self._picks(), *(self._curves(golden=g) for g in golden), *wins)

    def _picks(self) -> Table:
        """One row for each model: its own score and the gold score of what it picks."""
        heads = "picked by | its own score"
        rows: list[tuple[Cell, ...]] = [(m.name, m.curve[-1].proxy) for m in self.models]
        if self.gold is not None:
            heads += " | gold score | above a random one"
            gold = [(m.curve[-1].gold, m.gain) for m in self.models]
            rows = [(*row, *own) for row, own in zip(rows, gold, strict=True)]
            rows += [(b.name, None, b.curve[-1].gold, None) for b in self.baselines]
            # with n = 1 every model picks the same random candidate
            chance = self.models[0].curve[0].gold
            rows.append(("a random one", None, chance, None))
        title = f"best of {self.num_candidates} on {self.num_prompts} prompts [95 %]"
        return Table(title, columns(heads), tuple(rows), tuple(self._notes()))

    def _curves(self, *, golden: bool) -> Table:
        num = self.num_candidates
        powers = sorted({2**k for k in range(num.bit_length()) if 2**k <= num} | {num})
        pickers = (*self.models, *self.baselines) if golden else self.models
        rows = []
        for n in powers:
            points = [picker.curve[n - 1] for picker in pickers]
            estimates = [point.gold if golden else point.proxy for point in points]
            rows.append((n, f"{points[0].kl:.2f}", *estimates))
        names = ("n", "KL", *(picker.name for picker in pickers))
        title = f"{'gold' if golden else 'own'} score of the best of n [95 %]"
        return Table(title, tuple(Column(name) for name in names), tuple(rows))

    def _notes(self) -> Iterator[str]:
        yield (
            f"candidates: {self.mean_candidates:.1f} a prompt; prompts with fewer than "
            f"{self.num_candidates}: {self.num_fewer}; draws cut at the token limit: {self.num_cut}, "
            f"blank: {self.num_blank}"
        )
        for why, num in self.left_out.items():
            yield f"left out: {num} prompts: {why}"
        for model in self.models if self.gold is not None else ():
            fall = f", since then {model.since_peak}" if model.peak != self.num_candidates else ""
            yield f"{model.name}: gold score highest at n = {model.peak}{fall}"


def expected_picks(
    scores: Float[np.ndarray, " candidates"], values: Float[np.ndarray, " candidates"]
) -> Float[np.ndarray, " candidates"]:
    """Expected value of the highest scored of n random candidates, for n = 1, 2, ..., all of them.

    `values` are the scores themselves (proxy) or others (gold).
    """
    num = len(scores)
    # of equals the earlier is picked, as `argmax` does
    order = np.lexsort((-np.arange(num), scores))
    # Row n - 1: the probability that the candidate with i lower ones is the best of n drawn without
    # replacement. The other n - 1 come from the i lower ones: C(i, n - 1) / C(num, n), by its ratio to the
    # row above, since the binomials themselves overflow.
    lower = np.arange(num, dtype=np.float64)
    rows = [np.full(num, 1.0 / num)]
    for n in range(1, num):
        rows.append(rows[-1] * np.maximum(lower - n + 1, 0.0) * (n + 1) / (n * (num - n)))
    curve: NDArray[np.float64] = np.stack(rows) @ np.asarray(values, np.float64)[order]
    return curve


def best_indices(scores: PerPrompt) -> NDArray[np.int64]:
    """The index of the best candidate of each prompt; the first one if several are equal."""
    return np.array([int(np.argmax(s)) for s in scores], np.int64)


def curve_values(
    candidates: Sequence[Candidates], scores: PerPrompt, values: PerPrompt, num: int
) -> Float[np.ndarray, "prompts {num}"]:
    """The expected value of the best of n draws by score, for every prompt and n."""
    rows = []
    for c, s, v in zip(candidates, scores, values, strict=True):
        drawn = c.drawn
        curve = expected_picks(s[drawn], v[drawn])
        # a prompt with fewer candidates: for larger n, the best of all that it has
        rows.append(np.concatenate([curve, np.full(num - len(curve), curve[-1])]))
    return np.stack(rows)


def measure_picker(
    name: str, candidates: Sequence[Candidates], scores: PerPrompt, gold: PerPrompt | None, num: int
) -> PickerResult:
    """The curves of one model's picks, by its own and by the gold score."""
    sizes = range(1, num + 1)
    # exact for independent samples that never repeat or tie, else an upper bound (arXiv 2401.01879)
    kl = [math.log(n) - (n - 1) / n for n in sizes]
    proxy = bootstrap_columns(curve_values(candidates, scores, scores, num))
    if gold is None:
        nothing = [None] * num
        return PickerResult(name, tuple(map(CurvePoint, sizes, kl, proxy, nothing)))
    values = curve_values(candidates, scores, gold, num)
    peak = int(np.argmax(values.mean(0))) + 1
    return PickerResult(
        name=name,
        curve=tuple(map(CurvePoint, sizes, kl, proxy, bootstrap_columns(values))),
        gain=clustered_bootstrap(values[:, -1] - values[:, 0], proportion=False),
        peak=peak,
        since_peak=clustered_bootstrap(values[:, -1] - values[:, peak - 1], proportion=False),
    )


def measure_baselines(
    candidates: Sequence[Candidates], gold: PerPrompt, num: int
) -> tuple[PickerResult, ...]:
    """Curves of picking the longest candidate, and of picking by the gold score itself."""
    lengths = [np.array([len(t) for t in c.group.responses], np.float64) for c in candidates]
    baselines = {"longest": lengths, "gold itself": gold}
    return tuple(measure_picker(n, candidates, s, gold, num) for n, s in baselines.items())
