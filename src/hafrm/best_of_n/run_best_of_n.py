"""The best-of-n job: gather candidates, score them with every model, compare the picks, measure.

    OUT/candidates.jsonl      the candidates of every prompt, as drawn or read
    OUT/scores/<model>.jsonl  every candidate's score, for each model and for the gold score
    OUT/verdicts.jsonl        the judge's verdict on each pair of picks; rankings.jsonl of all candidates
    OUT/picks.jsonl           every model's pick for every prompt
    OUT/best_of_n.json        curves, agreement, wins, with intervals

The first four grow while the job runs. The same command resumes a killed job; another model is scored on
the candidates that are there.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hafrm.atomic import atomic_write
from hafrm.best_of_n.candidate_scores import CandidateScorer, GroupScores, file_name, score_all
from hafrm.best_of_n.candidates import Candidates, candidates_digest
from hafrm.best_of_n.drawing import CHUNK, Gather
from hafrm.best_of_n.judge_prompts import conversation_text
from hafrm.best_of_n.judges import (
    PairJudge,
    PairVerdict,
    RankingJudge,
    ReplyPair,
    Wins,
    measure_wins,
    require_judged,
)
from hafrm.best_of_n.picks import (
    BestOfN,
    CandidateCounts,
    PerPrompt,
    PickExample,
    Ranks,
    best_indices,
    chance_of_best,
    measure_baselines,
    measure_picker,
)
from hafrm.errors import ConfigError, DataError
from hafrm.preferences import Group
from hafrm.progress import OnProgress, no_progress
from hafrm.results import write_result
from hafrm.resumable import ResumableFolder

ONE_SAMPLE = "one sample"
"""The method that takes the first candidate."""
NUM_EXAMPLES = 5
ShowProgress = Callable[[str], AbstractContextManager[OnProgress]]
"""Shows the progress of a stage, such as `hafrm.progress.show_progress`."""


@dataclass(frozen=True)
class Comparing:
    """What measures and compares the picks; any of it may be absent."""

    gold: CandidateScorer | None = None
    """Scores every candidate."""
    judge: PairJudge | None = None
    """Compares picks; without one the gold score does."""
    ranking: RankingJudge | None = None
    """Ranks all candidates."""
    sample: bool = False
    """Also compare every model's pick with the first candidate; a single model always is."""


@dataclass(frozen=True)
class _Scored:
    """The prompts that are measured, with all scores of their candidates."""

    candidates: tuple[Candidates, ...]
    models: dict[str, PerPrompt]
    gold: PerPrompt | None
    digest: str
    """Of the candidates of all prompts, including those that could not be scored."""

    def picks(self) -> dict[str, NDArray[np.int64]]:
        return {name: best_indices(scores) for name, scores in self.models.items()}


def best_of_n(
    gather: Gather,
    models: Sequence[CandidateScorer],
    out: Path,
    *,
    num: int | None = None,
    comparing: Comparing | None = None,
    show_progress: ShowProgress = lambda _: nullcontext(no_progress),
) -> BestOfN:
    """Gather candidates, score them, compare the picks, and measure; every file of `out` is written.

    `num` is the largest n of the curves, by default the most candidates that a prompt has. Raises DataError
    when nothing is left to pick from.
    """
    comparing = comparing or Comparing()
    _check_names(models)
    with ResumableFolder.open(out, "best-of-n") as folder:
        with show_progress("candidates") as on_progress:
            drawn = gather(folder, on_progress)
        usable, left_out = _usable(drawn)
        scored = _score(folder, usable, models, comparing.gold, show_progress, left_out)
        num = num or max(len(c.drawn) for c in scored.candidates)
        sizes = [len(c.drawn) for c in scored.candidates]
        counts = CandidateCounts(
            num_fewer=sum(size < num for size in sizes),
            mean_candidates=float(np.mean(sizes)),
            num_cut=sum(c.num_cut for c in drawn),
            num_blank=sum(c.num_blank for c in drawn),
            left_out=dict(left_out),
        )
        result = _measure(folder, scored, comparing, show_progress, num)
        result = replace(result, counts=counts)
        atomic_write(out / "picks.jsonl", "".join(_pick_lines(scored)))
        write_result(out / "best_of_n.json", result)
    return result


def _check_names(models: Sequence[CandidateScorer]) -> None:
    names = [file_name(model.name).lower() for model in models]
    if not names:
        raise ConfigError("best of n needs a reward model or more")
    taken = sorted({name for name in names if names.count(name) > 1 or name == "gold"})
    if taken:
        raise ConfigError(
            f"a model cannot be called {taken[0]!r} here (the name is taken); give it as name=path"
        )


def _usable(drawn: Sequence[Candidates]) -> tuple[list[Candidates], Counter[str]]:
    """The candidates of prompts that have two different ones, and the reasons for the others."""
    left_out: Counter[str] = Counter()
    for c in drawn:
        if c.error is not None:
            left_out[c.error.partition(":")[0]] += 1
        elif len(c.group.responses) < 2:
            left_out["fewer than two different candidates"] += 1
    usable = [c for c in drawn if len(c.group.responses) > 1]
    if not usable:
        raise DataError(
            f"none of {len(drawn)} prompts has two different candidates ({dict(left_out)}), so there is "
            "nothing to pick from; draw at a higher temperature or more often (--set "
            "draw.temperature=1.2, --set draw.max_draws=64), or check that the prompts suit the policy"
        )
    return usable, left_out


def _score(
    folder: ResumableFolder,
    candidates: Sequence[Candidates],
    models: Sequence[CandidateScorer],
    gold: CandidateScorer | None,
    show_progress: ShowProgress,
    left_out: Counter[str],
) -> _Scored:
    """All scores of the prompts that every model could score; others are counted in `left_out`."""
    digest = candidates_digest(candidates)
    all_scores: list[list[GroupScores]] = []
    scorers = [*models, *([] if gold is None else [gold])]
    for scorer in scorers:
        name = "gold" if scorer is gold else file_name(scorer.name)
        key = {**scorer.cache_key(), "candidates": digest}
        file = folder.records(f"scores/{name}.jsonl", key)
        with show_progress(f"scores by {scorer.name}") as on_progress:
            all_scores.append(score_all(scorer, [c.group for c in candidates], file, on_progress))
        scorer.close()  # the next one needs the memory
    scored_by_all = []
    for i, by_scorer in enumerate(zip(*all_scores, strict=True)):
        refusals = [(m, s) for m, s in zip(scorers, by_scorer, strict=True) if isinstance(s, str)]
        for scorer, why in refusals[:1]:
            name = "gold" if scorer is gold else scorer.name
            left_out[f"not scored by {name}: {why.partition(':')[0]}"] += 1
        if not refusals:
            scored_by_all.append(i)
    if not scored_by_all:
        refused = next(
            (m, s[0]) for m, s in zip(scorers, all_scores, strict=True) if isinstance(s[0], str)
        )
        raise DataError(
            f"no prompt was scored by all: {refused[0].name} refused the first as {refused[1]}"
        )
    arrays = [[_array(scores[i]) for i in scored_by_all] for scores in all_scores]
    return _Scored(
        candidates=tuple(candidates[i] for i in scored_by_all),
        models={m.name: arrays[k] for k, m in enumerate(models)},
        gold=None if gold is None else arrays[-1],
        digest=digest,
    )


def _array(scores: GroupScores) -> NDArray[np.float64]:
    assert not isinstance(scores, str)
    return scores


def _measure(
    folder: ResumableFolder,
    scored: _Scored,
    comparing: Comparing,
    show_progress: ShowProgress,
    num: int,
) -> BestOfN:
    """All results except the counts; judges are asked here."""
    candidates, gold = scored.candidates, scored.gold
    ranks = None
    if comparing.ranking is not None:
        ranks = _rank(scored, comparing.ranking, folder, show_progress)
    models = []
    for name, scores in scored.models.items():
        result = measure_picker(name, candidates, scores, gold, ranks, num)
        models.append(replace(result, examples=_examples(scored, name)))
    negated = None if ranks is None else [None if r is None else -r for r in ranks]
    return BestOfN(
        num_prompts=len(candidates),
        num_candidates=num,
        gold=None if comparing.gold is None else comparing.gold.name,
        judge=None if comparing.judge is None else comparing.judge.name,
        counts=CandidateCounts(),
        models=tuple(models),
        baselines=() if gold is None else measure_baselines(candidates, gold, num),
        top1_chance=None if gold is None else chance_of_best(gold),
        top1_chance_judge=None if negated is None else chance_of_best(negated),
        wins=_compare_picks(scored, comparing, folder, show_progress),
    )


def _compare_picks(
    scored: _Scored, comparing: Comparing, folder: ResumableFolder, show_progress: ShowProgress
) -> tuple[Wins, ...]:
    """Every two methods against each other, by the judge or else the gold score; empty without either.

    The judge sees two candidates once, whichever models picked them.
    """
    methods = scored.picks()
    pairs = list(combinations(methods, 2))
    if comparing.sample or len(methods) == 1:
        pairs += [(name, ONE_SAMPLE) for name in methods]
        methods[ONE_SAMPLE] = np.array([c.drawn[0] for c in scored.candidates], np.int64)
    # (prompt, lower candidate, higher candidate) of every two different picks
    disputed = sorted(
        {
            (i, min(p, q), max(p, q))
            for a, b in pairs
            for i, (p, q) in enumerate(zip(methods[a].tolist(), methods[b].tolist(), strict=True))
            if p != q
        }
    )
    if comparing.judge is not None:
        with show_progress(f"verdicts of {comparing.judge.name}") as on_progress:
            verdicts = _ask(comparing.judge, scored, disputed, folder, on_progress)
        name = comparing.judge.name
    elif comparing.gold is not None and scored.gold is not None:
        gold, name = scored.gold, comparing.gold.name
        verdicts = {
            (i, p, q): PairVerdict(int(np.sign(gold[i][p] - gold[i][q]))) for i, p, q in disputed
        }
    else:
        return ()
    wins = []
    for first, second in pairs:
        mine = [
            _verdict_for(verdicts, i, p, q)
            for i, (p, q) in enumerate(
                zip(methods[first].tolist(), methods[second].tolist(), strict=True)
            )
        ]
        wins.append(measure_wins(first, second, name, methods[first] == methods[second], mine))
    return tuple(wins)


def _verdict_for(
    verdicts: dict[tuple[int, int, int], PairVerdict], prompt: int, first: int, second: int
) -> PairVerdict:
    """The verdict on pick `first` against pick `second`."""
    if first == second:
        return PairVerdict(0)
    verdict = verdicts[prompt, min(first, second), max(first, second)]
    if first < second or verdict.preferred is None:
        return verdict
    return replace(verdict, preferred=-verdict.preferred)


def _ask(
    judge: PairJudge,
    scored: _Scored,
    disputed: Sequence[tuple[int, int, int]],
    folder: ResumableFolder,
    on_progress: OnProgress,
) -> dict[tuple[int, int, int], PairVerdict]:
    """The judge's verdicts; those in the file are not asked for again."""
    groups = [c.group for c in scored.candidates]
    file = folder.records("verdicts.jsonl", {**judge.cache_key(), "candidates": scored.digest})
    names = {(i, p, q): f"{groups[i].id}:{p}:{q}" for i, p, q in disputed}
    missing = [key for key in disputed if names[key] not in file.records]
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        pairs = []
        for i, p, q in chunk:
            responses = groups[i].responses
            pairs.append(ReplyPair(groups[i].prompt, responses[p], responses[q]))
        verdicts = zip(chunk, judge.compare(pairs), strict=True)
        file.add(
            [
                {"id": names[key], "preferred": v.preferred, "answers": list(v.answers)}
                for key, v in verdicts
            ]
        )
        on_progress(start + len(chunk), len(missing))
    records = {key: file.records[names[key]] for key in disputed}
    result = {k: PairVerdict(r["preferred"], tuple(r["answers"])) for k, r in records.items()}
    require_judged(list(result.values()), judge.name)
    return result


def _rank(
    scored: _Scored, judge: RankingJudge, folder: ResumableFolder, show_progress: ShowProgress
) -> list[Ranks]:
    """The judge's mean ranks of every prompt's candidates; None where it gave none."""
    groups = [c.group for c in scored.candidates]
    file = folder.records("rankings.jsonl", {**judge.cache_key(), "candidates": scored.digest})
    missing = [group for group in groups if group.id not in file.records]
    with show_progress("rankings") as on_progress:
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            ranks = zip(chunk, judge.rank(chunk), strict=True)
            file.add([{"id": g.id, "ranks": None if r is None else r.tolist()} for g, r in ranks])
            on_progress(start + len(chunk), len(missing))
    stored = [file.records[group.id]["ranks"] for group in groups]
    return [None if r is None else np.array(r, np.float64) for r in stored]


def _examples(scored: _Scored, model: str) -> tuple[PickExample, ...]:
    """A few of the model's picks, first those on which the models differ."""
    columns = np.stack(list(scored.picks().values()))
    differ = (columns != columns[0]).any(0)
    picks = list(_picks(scored, model))
    first = np.argsort(~differ, kind="stable")[:NUM_EXAMPLES]
    return tuple(
        PickExample(conversation_text(group.prompt), response, reward, gold)
        for group, response, reward, gold in (picks[i] for i in first)
    )


def _picks(scored: _Scored, model: str) -> Iterator[tuple[Group, str, float, float | None]]:
    """(prompt, response, reward, gold score) of what the model picked, for every prompt."""
    scores = scored.models[model]
    for i, (c, k) in enumerate(zip(scored.candidates, best_indices(scores).tolist(), strict=True)):
        gold = None if scored.gold is None else float(scored.gold[i][k])
        yield c.group, c.group.responses[k], float(scores[i][k]), gold


def _pick_lines(scored: _Scored) -> Iterator[str]:
    """Every pick as a row that can be read as data again."""
    for model in scored.models:
        for group, response, reward, gold in _picks(scored, model):
            row = {
                "id": group.id,
                "model": model,
                "prompt": [message._asdict() for message in group.prompt],
                "response": response,
                "reward": reward,
            }
            row |= {} if gold is None else {"gold": gold}
            yield json.dumps(row, ensure_ascii=False) + "\n"
