"""The rules of the benchmarks: items and their scores -> verdicts, exactly as the benchmarks decide.

Comparisons are strict: equal scores are not right (RewardBench 2 alone gives them a share), and they are
counted. Pure functions; nothing here loads or runs anything.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hafrm.evaluation.benchmarks.items import Item, Verdict

Scores = NDArray[np.float64]

TIES = "Ties"
TIES_TERMS = {
    "Ties: tied prompts": 0.30,
    "Ties: reference prompts": 0.30,
    "Ties: gap above spread": 0.20,
    "Ties: both gaps above spread": 0.20,
    "Ties: relative gap": 0.01,
}
"""The weights of the Ties score; they sum to 1.01, which is what a perfect scorer gets."""
STYLES = ("hard", "normal", "easy")
"""RM-Bench: the right answer is plainer than, written like, or fancier than the wrong one."""


def first_beats_all(items: Sequence[Item], scores: Iterable[Scores]) -> Iterator[Verdict]:
    """Right where the first candidate scores above every other one.

    For two candidates it is RewardBench's rule, JudgeBench's for rewards, PPE's accuracy and RMB's
    pairwise accuracy; for more it is RMB's best-of-n.
    """
    for item, s in zip(items, scores, strict=True):
        rival = s[1:].max()
        yield Verdict(item.part, item.cluster, float(s[0] > rival), int(s[0] == rival))


def chosen_pairs(items: Sequence[Item], scores: Iterable[Scores]) -> Iterator[Verdict]:
    """A verdict for each of the item's pairs, right where the better one scores above the worse."""
    for item, s in zip(items, scores, strict=True):
        for better, worse in item.pairs:
            right, equal = float(s[better] > s[worse]), int(s[better] == s[worse])
            yield Verdict(item.part, item.cluster, right, equal)


def best_of_four_and_ties(items: Sequence[Item], scores: Iterable[Scores]) -> Iterator[Verdict]:
    """RewardBench 2 (arXiv 2506.01937): 1/k where the right candidate is one of k best, and Ties.

    Ties asks prompts in two versions: with one right answer (reference) and with many (tied). A prompt is
    right where the worst right answer scores above the best wrong one; the other terms ask whether that
    gap is wider than the spread among equally right answers.
    """
    reference: dict[str, tuple[float, float]] = {}
    tied: dict[str, tuple[float, float]] = {}
    for item, s in zip(items, scores, strict=True):
        if item.part != TIES:
            num_best = int((s == s.max()).sum())
            value = 1.0 / num_best if s[0] == s.max() else 0.0
            yield Verdict(item.part, item.cluster, value, int(value > 0 and num_best > 1))
            continue
        right, wrong = s[: item.num_correct], s[item.num_correct :]
        kind, _, prompt = item.id.partition(":")
        known = reference if kind == "ref" else tied
        known[prompt] = (float(right.min() - wrong.max()), float(right.max() - right.min()))
    yield from _ties(reference, tied)


def _ties(
    reference: dict[str, tuple[float, float]], tied: dict[str, tuple[float, float]]
) -> Iterator[Verdict]:
    """The verdicts on (gap, spread) of each prompt; a prompt in both versions is one cluster."""
    on_tied, on_reference, above, both_above, relative = TIES_TERMS
    for term, known in ((on_tied, tied), (on_reference, reference)):
        for prompt, (gap, _) in known.items():
            yield Verdict(term, prompt, float(gap > 0), int(gap == 0))
    for prompt in sorted(tied.keys() & reference.keys()):
        gap, spread = tied[prompt]
        least = min(gap, reference[prompt][0])
        yield Verdict(above, prompt, float(gap > spread))
        yield Verdict(both_above, prompt, float(least > spread))
        yield Verdict(relative, prompt, _relative_gap(least, spread))


def _relative_gap(gap: float, spread: float) -> float:
    """tanh(gap / spread - 1), in its limits 1 and -1 for no spread, and 0 where there is no gap either."""
    if spread == 0:
        return float(np.sign(gap))
    return float(np.tanh(gap / spread - 1))


def styles_against_styles(items: Sequence[Item], scores: Iterable[Scores]) -> Iterator[Verdict]:
    """RM-Bench (arXiv 2410.16184): three right against three wrong answers, from plain to fancy.

    matrix[i, j] says whether right answer i scores above wrong answer j. Above the diagonal the wrong
    one is the fancier (hard), on it both are written alike (normal), below it the right one is (easy).
    """
    cells = {"hard": np.triu_indices(3, 1), "normal": np.diag_indices(3)}
    cells["easy"] = np.tril_indices(3, -1)
    for item, s in zip(items, scores, strict=True):
        above, equal = s[:3, None] > s[None, 3:], s[:3, None] == s[None, 3:]
        for style in STYLES:
            where = cells[style]
            value, num_equal = float(above[where].mean()), int(equal[where].sum())
            yield Verdict(f"{item.part} {style}", item.cluster, value, num_equal)
