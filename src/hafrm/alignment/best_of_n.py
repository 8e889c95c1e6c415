"""Best of n: reward models pick among the same candidates, and the picks are judged.

    OUT/candidates.jsonl      the candidates of every prompt, as drawn or read
    OUT/scores/<model>.jsonl  every candidate's score, for each model and for the gold score
    OUT/verdicts.jsonl        what the judge said of each pair of picks; rankings.jsonl of all candidates
    OUT/picks.jsonl           every model's pick for every prompt
    OUT/best_of_n.json        curves, agreement, wins, with intervals

The first four grow while the job runs. Called again it goes on where it was ended; a further model is
scored on the candidates that are there.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.alignment.candidates import Candidates, digest_of, read_candidates
from hafrm.alignment.generate import Done, Drawing, Policy, draw_candidates, drawing_decides
from hafrm.alignment.journal import JobFolder
from hafrm.alignment.judge_prompts import written
from hafrm.alignment.judging import Judging, Scored, Watch, judge_picks, rank_candidates
from hafrm.alignment.results import (
    BestOfN,
    Counts,
    Example,
    ModelResult,
    chance_of_best,
    measure_baselines,
    measure_model,
)
from hafrm.alignment.scorers import Scorer, Scores, file_name, score_all
from hafrm.atomic import atomic_write
from hafrm.errors import ConfigError, DataError
from hafrm.preferences import Group

KIND = "best-of-n"
NUM_EXAMPLES = 5
Gather = Callable[[JobFolder, Done], list[Candidates]]
"""Where candidates come from."""


def from_policy(policy: Policy, prompts: Sequence[Group], drawing: Drawing) -> Gather:
    """Candidates that a policy writes."""

    def gather(folder: JobFolder, done: Done) -> list[Candidates]:
        decides = drawing_decides(policy, prompts, drawing)
        journal = folder.journal("candidates.jsonl", decides)
        found = draw_candidates(policy, prompts, drawing, journal, done)
        policy.close()  # the models that score need the memory
        return found

    return gather


def from_files(sources: Sequence[str], num: int) -> Gather:
    """Candidates that files hold, the first `num` of each prompt."""

    def gather(folder: JobFolder, done: Done) -> list[Candidates]:
        found = read_candidates(sources, num)
        journal = folder.journal("candidates.jsonl", {"read": digest_of(found)})
        journal.add([c.to_record() for c in found if c.group.id not in journal.records])
        done(sum(len(c.drawn) for c in found), 0)
        return found

    return gather


def best_of_n(
    gather: Gather,
    models: Sequence[Scorer],
    out: Path,
    *,
    num: int | None = None,
    judging: Judging | None = None,
    watch: Watch | None = None,
) -> BestOfN:
    """Gather candidates, score them, judge the picks, and measure; every file of `out` is written.

    `num` is the largest n of the curves, by default the most candidates that a prompt has. `watch` shows
    the progress of a stage. Raises DataError when nothing is left to pick from.
    """
    judging = judging or Judging()
    watch = watch or (lambda _: nullcontext(lambda _more, _tokens: None))
    _check_names(models)
    with JobFolder.open(out, KIND) as folder:
        with watch("candidates") as done:
            drawn = gather(folder, done)
        kept, left_out = _several(drawn)
        scored = _score(folder, kept, models, judging.gold, watch, left_out)
        result = _measure(folder, scored, judging, watch, num)
        result = replace(result, counts=_count(drawn, scored, result.num_candidates, left_out))
        atomic_write(out / "picks.jsonl", "".join(_pick_lines(scored)))
        text = json.dumps(result.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        atomic_write(out / "best_of_n.json", text + "\n")
    return result


def _check_names(models: Sequence[Scorer]) -> None:
    names = [file_name(model.name).lower() for model in models]
    if not names:
        raise ConfigError("best of n needs a reward model or more")
    taken = sorted({name for name in names if names.count(name) > 1 or name == "gold"})
    if taken:
        raise ConfigError(
            f"a model cannot be called {taken[0]!r} here (the name is taken); give it as name=path"
        )


def _several(drawn: Sequence[Candidates]) -> tuple[list[Candidates], Counter[str]]:
    """The candidates of prompts that have two different ones, and why others have not."""
    left_out: Counter[str] = Counter()
    for each in drawn:
        if each.error is not None:
            left_out[each.error.partition(":")[0]] += 1
        elif len(each.group.responses) < 2:
            left_out["fewer than two different candidates"] += 1
    kept = [each for each in drawn if len(each.group.responses) > 1]
    if not kept:
        raise DataError(
            f"none of {len(drawn)} prompts has two different candidates ({dict(left_out)}), so there is "
            "nothing to pick from; draw at a higher --temperature or with more --tries, or see that the "
            "prompts suit the policy"
        )
    return kept, left_out


def _score(
    folder: JobFolder,
    candidates: Sequence[Candidates],
    models: Sequence[Scorer],
    gold: Scorer | None,
    watch: Watch,
    left_out: Counter[str],
) -> Scored:
    """All scores of the prompts that everybody could score; others are counted in `left_out`."""
    scorers = {
        "gold" if m is gold else f"model {m.name}": m for m in (*models, gold) if m is not None
    }
    found: dict[str, list[Scores]] = {}
    digest = digest_of(candidates)
    for role, scorer in scorers.items():
        name = "gold" if scorer is gold else file_name(scorer.name)
        decides = {**scorer.decides(), "candidates": digest}
        journal = folder.journal(f"scores/{name}.jsonl", decides)
        with watch(f"scores by {scorer.name}") as done:
            found[role] = score_all(scorer, [c.group for c in candidates], journal, done)
        scorer.close()  # the next one needs the memory
    keep = []
    for i in range(len(candidates)):
        refused = [(r, s[i]) for r, s in found.items() if isinstance(s[i], str)]
        keep += [] if refused else [i]
        for role, why in refused[:1]:
            name = role.removeprefix("model ")
            left_out[f"not scored by {name}: {str(why).partition(':')[0]}"] += 1
    if not keep:
        role, why = next((r, s[0]) for r, s in found.items() if isinstance(s[0], str))
        raise DataError(f"no prompt was scored by all: {role} refused the first as {why}")
    known = {role: [_array(scores[i]) for i in keep] for role, scores in found.items()}
    golden = known.pop("gold", None)
    return Scored(
        candidates=tuple(candidates[i] for i in keep),
        models={role.removeprefix("model "): scores for role, scores in known.items()},
        gold=golden,
        digest=digest,
    )


def _array(scores: Scores) -> NDArray[np.float64]:
    assert not isinstance(scores, str)
    return scores


def _measure(
    folder: JobFolder, scored: Scored, judging: Judging, watch: Watch, num: int | None
) -> BestOfN:
    """All results but for the counts; the judge is asked here."""
    candidates, gold = scored.candidates, scored.gold
    num = num or max(len(each.drawn) for each in candidates)
    ranks = None
    if judging.ranking is not None:
        ranks = rank_candidates(scored, judging.ranking, folder, watch)
    models = [
        _with_examples(measure_model(name, candidates, scores, gold, ranks, num), scored)
        for name, scores in scored.models.items()
    ]
    return BestOfN(
        num_prompts=len(candidates),
        num_candidates=num,
        gold=None if judging.gold is None else judging.gold.name,
        judge=None if judging.judge is None else judging.judge.name,
        counts=Counts(),
        models=tuple(models),
        baselines=() if gold is None else measure_baselines(candidates, gold, num),
        top1_chance=None if gold is None else chance_of_best(gold),
        top1_chance_judge=None
        if ranks is None
        else chance_of_best([None if r is None else -r for r in ranks]),
        wins=judge_picks(scored, judging, folder, watch),
    )


def _with_examples(result: ModelResult, scored: Scored) -> ModelResult:
    """A few of the model's picks, first of prompts on which the models differ."""
    columns = np.stack(list(scored.picks().values()))
    differ = (columns != columns[0]).any(0)
    rows = _pick_rows(scored, result.name)
    chosen = [rows[i] for i in np.argsort(~differ, kind="stable")[:NUM_EXAMPLES]]
    examples = [
        Example(written(prompt), row["response"], row["reward"], row.get("gold"))
        for prompt, row in chosen
    ]
    return replace(result, examples=tuple(examples))


def _pick_rows(scored: Scored, model: str) -> list[tuple[Any, dict[str, Any]]]:
    """(prompt, what the model picked) for every prompt."""
    rows = []
    scores = scored.models[model]
    for i, (each, k) in enumerate(
        zip(scored.candidates, scored.picks()[model].tolist(), strict=True)
    ):
        row = {"response": each.group.responses[k], "reward": float(scores[i][k])}
        if scored.gold is not None:
            row["gold"] = float(scored.gold[i][k])
        rows.append((each.group.prompt, row))
    return rows


def _pick_lines(scored: Scored) -> Iterator[str]:
    """Every pick as a row that can be read as data again."""
    for model in scored.models:
        for each, (prompt, row) in zip(scored.candidates, _pick_rows(scored, model), strict=True):
            messages = [message._asdict() for message in prompt]
            known = {"id": each.group.id, "model": model, "prompt": messages, **row}
            yield json.dumps(known, ensure_ascii=False) + "\n"


def _count(
    drawn: Sequence[Candidates], scored: Scored, num: int, left_out: Mapping[str, int]
) -> Counts:
    sizes = [len(each.drawn) for each in scored.candidates]
    return Counts(
        num_fewer=sum(size < num for size in sizes),
        mean_candidates=float(np.mean(sizes)),
        num_unended=sum(each.unended for each in drawn),
        num_blank=sum(each.blank for each in drawn),
        left_out=dict(left_out),
    )
