"""What tells which picks are good: a gold score, a judge of pairs, a judge that ranks all candidates.

Whoever is asked is asked once about two candidates, whichever models picked them, and what was said lands
in a file as it is said.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hafrm.alignment.candidates import Candidates
from hafrm.alignment.generate import CHUNK, Done
from hafrm.alignment.journal import JobFolder
from hafrm.alignment.judge import Pair, PairJudge, RankingJudge, Verdict, require_judged
from hafrm.alignment.results import PerPrompt, Ranks, Wins, measure_wins, picks
from hafrm.alignment.scorers import Scorer

ONE_SAMPLE = "one sample"
"""The method that takes the first candidate."""
Watch = Callable[[str], AbstractContextManager[Done]]
"""Shows the progress of a stage."""
Key = tuple[int, int, int]
"""A prompt and two of its candidates, the earlier one first."""


@dataclass(frozen=True)
class Judging:
    """Any of these may be absent."""

    gold: Scorer | None = None
    """Scores every candidate."""
    judge: PairJudge | None = None
    """Compares picks; without one the gold score does."""
    ranking: RankingJudge | None = None
    """Ranks all candidates."""
    sample: bool = False
    """Also compare every model's pick with the first candidate; a single model always is."""


@dataclass(frozen=True)
class Scored:
    """The prompts that are measured, with all scores of their candidates."""

    candidates: tuple[Candidates, ...]
    models: dict[str, PerPrompt]
    gold: PerPrompt | None
    digest: str = ""
    """Of the candidates of all prompts, those that could not be scored included."""

    def picks(self) -> dict[str, NDArray[np.int64]]:
        """The candidate that each model picks, for every prompt."""
        return {name: picks(scores) for name, scores in self.models.items()}


def judge_picks(
    scored: Scored, judging: Judging, folder: JobFolder, watch: Watch
) -> tuple[Wins, ...]:
    """Every two methods against each other, by the judge, or else by the gold score; nothing without
    either."""
    methods = scored.picks()
    pairs = list(combinations(methods, 2))
    if judging.sample or len(methods) == 1:
        pairs += [(name, ONE_SAMPLE) for name in methods]
        methods[ONE_SAMPLE] = np.array([c.drawn[0] for c in scored.candidates], np.int64)
    disputed = {(a, b): _keys(methods[a], methods[b]) for a, b in pairs}
    wanted = sorted({key for keys in disputed.values() for key in keys if key is not None})
    if judging.judge is not None:
        with watch(f"verdicts of {judging.judge.name}") as done:
            known = _ask(judging.judge, scored, wanted, folder, done)
        name = judging.judge.name
    elif judging.gold is not None and scored.gold is not None:
        known, name = _by_gold(scored.gold, wanted), judging.gold.name
    else:
        return ()
    found = []
    for (first, second), keys in disputed.items():
        verdicts = [
            Verdict(0) if key is None else _seen_from(known[key], int(methods[first][i]), key)
            for i, key in enumerate(keys)
        ]
        same = methods[first] == methods[second]
        found.append(measure_wins(first, second, name, same, verdicts))
    return tuple(found)


def rank_candidates(
    scored: Scored, judge: RankingJudge, folder: JobFolder, watch: Watch
) -> list[Ranks]:
    """The judge's mean ranks of every prompt's candidates; None where it gave none."""
    groups = [each.group for each in scored.candidates]
    decides = {**judge.decides(), "candidates": scored.digest}
    journal = folder.journal("rankings.jsonl", decides)
    left = [group for group in groups if group.id not in journal.records]
    with watch("rankings") as done:
        for start in range(0, len(left), CHUNK):
            chunk = left[start : start + CHUNK]
            ranks = zip(chunk, judge.rank(chunk, done), strict=True)
            journal.add(
                [{"id": g.id, "ranks": None if r is None else r.tolist()} for g, r in ranks]
            )
    found = [journal.records[group.id]["ranks"] for group in groups]
    return [None if r is None else np.array(r, np.float64) for r in found]


def _keys(first: NDArray[np.int64], second: NDArray[np.int64]) -> list[Key | None]:
    """What is to be judged for each prompt; None where both picked the same."""
    return [
        None if p == q else (i, min(p, q), max(p, q))
        for i, (p, q) in enumerate(zip(first.tolist(), second.tolist(), strict=True))
    ]


def _seen_from(verdict: Verdict, pick: int, key: Key) -> Verdict:
    """The verdict as one on `pick` against the other."""
    if pick == key[1] or verdict.preferred is None:
        return verdict
    return replace(verdict, preferred=-verdict.preferred)


def _by_gold(gold: PerPrompt, wanted: Sequence[Key]) -> Mapping[Key, Verdict]:
    return {(i, p, q): Verdict(int(np.sign(gold[i][p] - gold[i][q]))) for i, p, q in wanted}


def _ask(
    judge: PairJudge, scored: Scored, wanted: Sequence[Key], folder: JobFolder, done: Done
) -> Mapping[Key, Verdict]:
    """The judge's verdicts; those in the file are not asked for again."""
    groups = [each.group for each in scored.candidates]
    names = {(i, p, q): f"{groups[i].id}:{p}:{q}" for i, p, q in wanted}
    decides = {**judge.decides(), "candidates": scored.digest}
    journal = folder.journal("verdicts.jsonl", decides)
    left = [key for key in wanted if names[key] not in journal.records]
    for start in range(0, len(left), CHUNK):
        chunk = left[start : start + CHUNK]
        pairs = [
            Pair(groups[i].prompt, groups[i].responses[p], groups[i].responses[q])
            for i, p, q in chunk
        ]
        verdicts = zip(chunk, judge.compare(pairs, done), strict=True)
        journal.add(
            [
                {"id": names[key], "preferred": verdict.preferred, "said": list(verdict.said)}
                for key, verdict in verdicts
            ]
        )
    records = {key: journal.records[names[key]] for key in wanted}
    known = {key: Verdict(r["preferred"], tuple(r["said"])) for key, r in records.items()}
    require_judged(list(known.values()), judge.name)
    return known
