"""A judge that asks nobody."""

import numpy as np

from hafrm.best_of_n.judges import LlmJudge, PairVerdict


class Longer(LlmJudge):
    """Prefers the longer text."""

    def __init__(self) -> None:
        self.name = "longer"

    def compare(self, pairs):
        return [PairVerdict(int(np.sign(len(p.first) - len(p.second)))) for p in pairs]
