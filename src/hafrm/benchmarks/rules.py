"""The rules of the benchmarks: items and their scores -> verdicts, exactly as the benchmarks decide.

Comparisons are strict: equal scores are not right, and are also counted separately; only RewardBench 2
gives them a fraction.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hafrm.preferences import Message, prompt_key

CandidateScores = NDArray[np.float64]
"""One score for each candidate of an item."""
ItemScores = Iterable[CandidateScores]

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


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its candidates, in the published order, repeated texts included."""

    id: str
    part: str  # the subset or domain that it counts for
    prompt: tuple[Message, ...]
    candidates: tuple[str, ...]
    num_correct: int = 1  # this many candidates, the first ones, are right
    pairs: tuple[tuple[int, int], ...] = ()
    """(better, worse), for a benchmark that compares selected pairs."""

    @property
    def cluster(self) -> str:
        """The key of items that are resampled together."""
        return prompt_key(self.prompt)


class ItemVerdict(NamedTuple):
    """What the rule says about an item, or about one of the questions that it asks."""

    term: str  # the mean that it is part of
    cluster: str
    value: float  # 1 right, 0 wrong, or in between
    num_equal: int = 0  # comparisons that the scorer lost because two scores were equal


def first_beats_all(items: Sequence[Item], scores: ItemScores) -> Iterator[ItemVerdict]:
    """Right if the first candidate, which is the right one, scores above all others."""
    for item, s in zip(items, scores, strict=True):
        rival = s[1:].max()
        yield ItemVerdict(item.part, item.cluster, float(s[0] > rival), int(s[0] == rival))


def selected_pairs(items: Sequence[Item], scores: ItemScores) -> Iterator[ItemVerdict]:
    """A verdict for each of the item's pairs, right if the better one scores above the worse."""
    for item, s in zip(items, scores, strict=True):
        for better, worse in item.pairs:
            right, equal = float(s[better] > s[worse]), int(s[better] == s[worse])
            yield ItemVerdict(item.part, item.cluster, right, equal)


def best_of_four_and_ties(items: Sequence[Item], scores: ItemScores) -> Iterator[ItemVerdict]:
    """RewardBench 2 (arXiv 2506.01937): 1/k if the right candidate is one of k best, and Ties.

    Ties has each prompt in two versions: with one right answer (reference) and with many (tied). A prompt
    is right if the worst right answer scores above the best wrong one; the other terms ask whether that gap
    is wider than the spread among equally right answers.
    """
    # version -> prompt -> (gap, spread)
    versions: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for item, s in zip(items, scores, strict=True):
        if item.part != TIES:
            # a random choice among the k best is right with probability 1/k
            num_best = int((s == s.max()).sum())
            value = 1.0 / num_best if s[0] == s.max() else 0.0
            yield ItemVerdict(item.part, item.cluster, value, int(value > 0 and num_best > 1))
            continue
        # the worst right answer against the best wrong one, and the spread of the right ones
        right, wrong = s[: item.num_correct], s[item.num_correct :]
        version, _, prompt = item.id.partition(":")
        gap, spread = float(right.min() - wrong.max()), float(right.max() - right.min())
        versions[version][prompt] = gap, spread
    yield from _ties(versions["ref"], versions["tied"])


def _ties(
    reference: dict[str, tuple[float, float]], tied: dict[str, tuple[float, float]]
) -> Iterator[ItemVerdict]:
    """The verdicts on (gap, spread) of each prompt; a prompt in both versions is one cluster."""
    on_tied, on_reference, above, both_above, relative = TIES_TERMS
    for term, version in ((on_tied, tied), (on_reference, reference)):
        for prompt, (gap, _) in version.items():
            yield ItemVerdict(term, prompt, float(gap > 0), int(gap == 0))
    for prompt in sorted(tied.keys() & reference.keys()):
        gap, spread = tied[prompt]
        least = min(gap, reference[prompt][0])
        yield ItemVerdict(above, prompt, float(gap > spread))
        yield ItemVerdict(both_above, prompt, float(least > spread))
        # tanh(gap / spread - 1), with its limits 1, 0 and -1 for a spread of 0
        value = np.tanh(least / spread - 1) if spread else np.sign(least)
        yield ItemVerdict(relative, prompt, float(value))


def styles_against_styles(items: Sequence[Item], scores: ItemScores) -> Iterator[ItemVerdict]:
    """RM-Bench (arXiv 2410.16184): three right and three wrong answers, from plain to fancy.

    matrix[i, j] says whether right answer i scores above wrong answer j. Above the diagonal the wrong one
    is fancier (hard), on it both are written alike (normal), below it the right one is fancier (easy).
    """
    places = np.triu_indices(3, 1), np.diag_indices(3), np.tril_indices(3, -1)
    for item, s in zip(items, scores, strict=True):
        # [right style, wrong style]
        above, equal = s[:3, None] > s[None, 3:], s[:3, None] == s[None, 3:]
        for style, where in zip(STYLES, places, strict=True):
            value, num_equal = float(above[where].mean()), int(equal[where].sum())
            yield ItemVerdict(f"{item.part} {style}", item.cluster, value, num_equal)
