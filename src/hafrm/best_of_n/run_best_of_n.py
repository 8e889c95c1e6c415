"""The best-of-n job: gather candidates, score them with every model, compare the picks, measure.

    OUT/candidates.jsonl      the candidates of every prompt, as drawn or read
    OUT/scores/<model>.jsonl  every candidate's score, for each model and for the gold score
    OUT/verdicts.jsonl        the judge's verdict on each pair of picks
    OUT/picks.jsonl           every model's pick for every prompt
    OUT/best_of_n.json        curves, agreement, wins, with intervals

The first three grow while the job runs. The same command resumes a killed job; another model is scored on
the candidates that are there.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hafrm.atomic import atomic_write
from hafrm.best_of_n.candidate_scores import (
    CandidateScorer,
    GroupScores,
    file_name,
    score_all,
)
from hafrm.best_of_n.candidates import (
    CHUNK,
    Candidates,
    Gather,
    candidates_digest,
)
from hafrm.best_of_n.judges import (
    AnswerPair,
    LlmJudge,
    PairVerdict,
    conversation_text,
    require_judged,
)
from hafrm.best_of_n.picks import (
    BestOfN,
    CandidateCounts,
    PerPrompt,
    PickExample,
    Wins,
    best_indices,
    measure_baselines,
    measure_picker,
    measure_wins,
)
from hafrm.errors import ConfigError, DataError
from hafrm.preferences import Group
from hafrm.progress import OnProgress, no_progress
from hafrm.results import write_result
from hafrm.resumable import RecordFile, ResumableFolder

ONE_SAMPLE = "one sample"  # the method that takes the first candidate
NUM_EXAMPLES = 5
ShowProgress = Callable[[str], AbstractContextManager[OnProgress]]
"""Shows the progress of a stage, such as `hafrm.progress.show_progress`."""


def best_of_n(  # noqa: PLR0913 - candidates, who picks, who compares
    gather: Gather,
    models: Sequence[CandidateScorer],
    out: Path,
    *,
    num: int | None = None,
    gold: CandidateScorer | None = None,
    judge: LlmJudge | None = None,
    sample: bool = False,
    show_progress: ShowProgress = lambda _: nullcontext(no_progress),
) -> BestOfN:
    """Gather candidates, score them, compare the picks, and measure; every file of `out` is written.

    `num` is the largest n of the curves, by default the most candidates that a prompt has. Without a
    `judge` the `gold` score compares picks; `sample` also compares them with the first candidate. Raises
    DataError when nothing is left to pick from.
    """
    _check_names(models)
    with ResumableFolder.open(out, "best-of-n") as folder:
        with show_progress("candidates") as on_progress:
            drawn = gather(folder, on_progress)
        usable, left_out = _usable(drawn)
        scored = _score(folder, usable, models, gold, show_progress, left_out)
        candidates = scored.candidates
        sizes = [len(c.texts) for c in candidates]
        num = num or max(sizes)
        result = BestOfN(
            num_prompts=len(candidates),
            num_candidates=num,
            gold=None if gold is None else gold.name,
            judge=None if judge is None else judge.name,
            counts=CandidateCounts(
                num_fewer=sum(size < num for size in sizes),
                mean_candidates=float(np.mean(sizes)),
                num_cut=sum(c.num_cut for c in drawn),
                num_blank=sum(c.num_blank for c in drawn),
                left_out=dict(left_out),
            ),
            models=tuple(
                replace(
                    measure_picker(name, candidates, scores, scored.gold, num),
                    examples=_examples(scored, name),
                )
                for name, scores in scored.models.items()
            ),
            baselines=(
                () if scored.gold is None else measure_baselines(candidates, scored.gold, num)
            ),
            top1_chance=(
                None
                if scored.gold is None
                else float(np.mean([np.mean(g == g.max()) for g in scored.gold]))
            ),
            wins=_compare_picks(folder, scored, judge, show_progress, sample=sample),
        )
        atomic_write(out / "picks.jsonl", "".join(_pick_lines(scored)))
        write_result(out / "best_of_n.json", result)
    return result


@dataclass(frozen=True)
class _Scored:
    """The prompts that are measured, with all scores of their candidates."""

    candidates: tuple[Candidates, ...]
    models: dict[str, PerPrompt]
    gold: PerPrompt | None
    gold_name: str
    digest: str  # of the candidates of all prompts, including those that could not be scored

    def picks(self) -> dict[str, NDArray[np.int64]]:
        return {name: best_indices(scores) for name, scores in self.models.items()}


def _check_names(models: Sequence[CandidateScorer]) -> None:
    # file systems may not distinguish case
    names = [file_name(model.name).lower() for model in models]
    taken = sorted({name for name in names if names.count(name) > 1 or name == "gold"})
    if taken:
        raise ConfigError(f"the name {taken[0]!r} is taken; give that model another as NAME=PATH")


def _usable(drawn: Sequence[Candidates]) -> tuple[list[Candidates], Counter[str]]:
    """The candidates of prompts that have two different ones, and the reasons for the others."""
    left_out: Counter[str] = Counter()
    for c in drawn:
        if c.error is not None:
            left_out[c.error.partition(":")[0]] += 1
        elif len(set(c.texts)) < 2:
            left_out["fewer than two different candidates"] += 1
    usable = [c for c in drawn if len(set(c.texts)) > 1]
    if not usable:
        raise DataError(
            f"none of {len(drawn)} prompts has two different candidates ({dict(left_out)}), so there is "
            "nothing to pick from; draw at a higher temperature (draw.temperature=1.2), or check that the "
            "prompts suit the policy"
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
    usable: list[Candidates] = []
    by_scorer: list[list[NDArray[np.float64]]] = [[] for _ in scorers]
    why = ""
    for c, scores in zip(candidates, zip(*all_scores, strict=True), strict=True):
        refusals = [(m, s) for m, s in zip(scorers, scores, strict=True) if isinstance(s, str)]
        if refusals:
            scorer, why = refusals[0]
            name = "gold" if scorer is gold else scorer.name
            why = f"not scored by {name}: {why}"
            left_out[":".join(why.split(":")[:2])] += 1
            continue
        usable.append(c)
        for own, s in zip(by_scorer, scores, strict=True):
            own.append(np.asarray(s, np.float64))
    if not usable:
        raise DataError(f"no prompt was scored by all models, the last was {why}")
    return _Scored(
        candidates=tuple(usable),
        models={m.name: by_scorer[k] for k, m in enumerate(models)},
        gold=None if gold is None else by_scorer[-1],
        gold_name="" if gold is None else gold.name,
        digest=digest,
    )


def _compare_picks(
    folder: ResumableFolder,
    scored: _Scored,
    judge: LlmJudge | None,
    show_progress: ShowProgress,
    *,
    sample: bool,
) -> tuple[Wins, ...]:
    """Every two methods against each other, by the judge or else the gold score; empty without either."""
    if judge is None and scored.gold is None:
        return ()
    methods = scored.picks()
    pairs = list(combinations(methods, 2))
    if sample or len(methods) == 1:
        pairs += [(name, ONE_SAMPLE) for name in methods]
        methods[ONE_SAMPLE] = np.array([c.drawn[0] for c in scored.candidates], np.int64)
    # (prompt, pick, pick) in index order, so that the judge compares two candidates only once
    disputed = {
        (i, int(min(p, q)), int(max(p, q)))
        for a, b in pairs
        for i, (p, q) in enumerate(zip(methods[a], methods[b], strict=True))
        if p != q
    }
    if judge is None:
        assert scored.gold is not None
        name = scored.gold_name
        verdicts = {
            (i, p, q): PairVerdict(int(np.sign(scored.gold[i][p] - scored.gold[i][q])))
            for i, p, q in disputed
        }
    else:
        name = judge.name
        file = folder.records("verdicts.jsonl", {**judge.cache_key(), "candidates": scored.digest})
        with show_progress(f"verdicts of {name}") as on_progress:
            verdicts = _ask(judge, scored, sorted(disputed), file, on_progress)
    for (i, p, q), v in list(verdicts.items()):
        verdicts[i, q, p] = replace(v, preferred=None if v.preferred is None else -v.preferred)
    wins = []
    for names in pairs:
        first, second = (methods[name] for name in names)
        by_prompt = [
            PairVerdict(0) if p == q else verdicts[i, int(p), int(q)]
            for i, (p, q) in enumerate(zip(first, second, strict=True))
        ]
        wins.append(measure_wins(names, name, first == second, by_prompt))
    return tuple(wins)


def _ask(
    judge: LlmJudge,
    scored: _Scored,
    disputed: Sequence[tuple[int, int, int]],
    file: RecordFile,
    on_progress: OnProgress,
) -> dict[tuple[int, int, int], PairVerdict]:
    """The judge's verdicts; those in the file are not asked for again."""
    groups = [c.group for c in scored.candidates]
    ids = {(i, p, q): f"{groups[i].id}:{p}:{q}" for i, p, q in disputed}
    missing = [key for key in disputed if ids[key] not in file.records]
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        pairs = [
            AnswerPair(groups[i].prompt, groups[i].responses[p], groups[i].responses[q])
            for i, p, q in chunk
        ]
        verdicts = zip(chunk, judge.compare(pairs), strict=True)
        file.add([{"id": ids[key], **asdict(verdict)} for key, verdict in verdicts])
        on_progress(start + len(chunk), len(missing))
    records = {key: file.records[ids[key]] for key in disputed}
    result = {k: PairVerdict(r["preferred"], tuple(r["by_order"])) for k, r in records.items()}
    require_judged(list(result.values()), judge.name)
    return result


def _picks_of(scored: _Scored, model: str) -> Iterator[tuple[Group, PickExample]]:
    """What the model picked for every prompt."""
    scores = scored.models[model]
    for i, (c, k) in enumerate(zip(scored.candidates, best_indices(scores).tolist(), strict=True)):
        group, gold = c.group, None if scored.gold is None else float(scored.gold[i][k])
        prompt = conversation_text(group.prompt)
        yield group, PickExample(prompt, group.responses[k], float(scores[i][k]), gold)


def _examples(scored: _Scored, model: str) -> tuple[PickExample, ...]:
    """A few of the model's picks, first those on which the models differ."""
    columns = np.stack(list(scored.picks().values()))
    differ = (columns != columns[0]).any(0)
    picks = [pick for _, pick in _picks_of(scored, model)]
    return tuple(picks[i] for i in np.argsort(~differ, kind="stable")[:NUM_EXAMPLES])


def _pick_lines(scored: _Scored) -> Iterator[str]:
    """Every pick as a row that can be read as data again."""
    for model in scored.models:
        for group, pick in _picks_of(scored, model):
            row = {
                "id": group.id,
                "model": model,
                "prompt": [message._asdict() for message in group.prompt],
                "response": pick.picked,
                "reward": pick.reward,
            }
            row |= {} if pick.gold is None else {"gold": pick.gold}
            yield json.dumps(row, ensure_ascii=False) + "\n"
