"""The nouns of benchmarks: an item to be scored, and a verdict on its scores.

Whatever a benchmark asks (a pair, best of four, three styles against three), it asks it about one prompt
and several candidates, which are scored together; the rule of the benchmark turns their scores into
verdicts, and its score is a weighted sum of the verdicts' means.
"""

from dataclasses import dataclass
from typing import NamedTuple

from hafrm.preferences import Message, prompt_key


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its candidates, in the published order, repeated texts included."""

    id: str
    part: str
    """The subset, domain or language that it counts for."""
    prompt: tuple[Message, ...]
    candidates: tuple[str, ...]
    num_correct: int = 1
    """The first candidates are right, this many of them."""
    pairs: tuple[tuple[int, int], ...] = ()
    """(better, worse), where the benchmark compares chosen pairs."""
    origin: str = ""
    """What it shares with items that are not independent of it; empty: its prompt."""

    @property
    def cluster(self) -> str:
        """What is resampled together."""
        return self.origin or prompt_key(self.prompt)


class Verdict(NamedTuple):
    """What the rule says about an item, or about one of the questions that it asks."""

    term: str
    """Which mean it enters."""
    cluster: str
    value: float
    """1 right, 0 wrong, or between."""
    num_equal: int = 0
    """Comparisons that were decided (against the scorer) because two scores were the same."""
