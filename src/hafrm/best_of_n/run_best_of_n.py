"""The best-of-n job: gather candidates, score them with every model, compare the picks, measure.

    OUT/candidates.jsonl      the candidates of every prompt, as drawn or read
    OUT/scores/<model>.jsonl  every candidate's score, for each model and for the gold score
    OUT/verdicts.jsonl        the judge's verdict on each pair of picks
    OUT/picks.jsonl           every model's pick for every prompt
    OUT/best_of_n.json        curves, agreement, wins, with intervals

The first two grow while the job runs, and an endpoint's replies are cached. The same command resumes a
killed job; another model is scored on the candidates that are there.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hafrm.atomic import atomic_write
from hafrm.best_of_n.candidate_scores import (
    CandidateScorer,
    GoldReward,
    GoldScorer,
    GroupScores,
    ModelScorer,
    file_name,
    named_models,
    score_all,
)
from hafrm.best_of_n.candidates import (
    CHUNK,
    Candidates,
    DrawSection,
    EndpointPolicy,
    LocalPolicy,
    Policy,
    candidates_digest,
    draw_candidates,
    drawing_key,
    read_candidates,
    read_prompts,
)
from hafrm.best_of_n.endpoint import Endpoint, EndpointSection, is_url
from hafrm.best_of_n.judges import AnswerPair, LlmJudge, PairVerdict, load_judge, require_judged
from hafrm.best_of_n.picks import (
    BestOfN,
    PerPrompt,
    Wins,
    best_indices,
    measure_baselines,
    measure_picker,
    measure_wins,
)
from hafrm.errors import ConfigError, DataError
from hafrm.progress import show_progress
from hafrm.recipe import Section, Sources, Text
from hafrm.results import write_result
from hafrm.run_folder import ResumableFolder
from hafrm.scoring.loading import Placement

ONE_SAMPLE = "one sample"  # the method that takes the first candidate
Pair = tuple[int, int, int]  # a prompt and two of its candidates, by index


class PickSection(Section):
    """Which models pick from what, and what compares the picks."""

    models: Sources = Field(min_length=1)
    """Run folders, reward or policy directories: PATH or NAME=PATH."""
    prompts: Sources = Field(min_length=1)
    """Rows with prompts for the policy; without a policy their responses are the candidates."""
    policy: Text | None = None
    """Writes the candidates: the directory of a causal LM, or the URL of an OpenAI-compatible endpoint."""
    gold: Text | None = None
    """A gold score for every candidate: demo, or a model."""
    judge: Text | None = None
    """Compares picks: an LLM at the URL of an endpoint."""
    sample: bool = False
    """Also compare every model's pick with the first candidate; a single model's always is."""
    dtype: Text = "auto"
    """float32, bfloat16 or float16; auto: the checkpoint's on a GPU, float32 on a CPU."""
    device: Text | None = None
    """cpu, cuda or cuda:1; null: a GPU where there is one."""


class BestOfNOptions(Section):
    """Everything that a best-of-n job depends on."""

    pick: PickSection
    draw: DrawSection = DrawSection()
    policy: EndpointSection = EndpointSection()
    judge: EndpointSection = EndpointSection()


def best_of_n(
    options: BestOfNOptions, out: Path, *, golds: Mapping[str, GoldReward] | None = None
) -> BestOfN:
    """Gather candidates, score them, compare the picks, and measure; every file of `out` is written.

    `golds` are rewards that are known, by the name under which the options have them as a model or as gold.
    Raises ConfigError for options that would have no effect, DataError when nothing is left to pick from,
    and what models, policies and judges raise.
    """
    pick = options.pick
    for name, target in (("policy", pick.policy), ("judge", pick.judge)):
        if getattr(options, name) != EndpointSection() and not is_url(target):
            raise ConfigError(f"settings of `{name}` need --{name} URL, got {target}")
    place, known_rewards = Placement(pick.dtype, pick.device), golds or {}

    def scorer(path: str, name: str) -> CandidateScorer:
        if path in known_rewards:
            return GoldScorer(name, known_rewards[path])
        return ModelScorer(path, name, place)

    models = [scorer(path, name) for name, path in named_models(pick.models)]
    _check_names(models)
    gold = None
    if pick.gold is not None:
        gold = scorer(pick.gold, pick.gold if pick.gold in known_rewards else f"gold ({pick.gold})")
    policy = None if pick.policy is None else _policy(pick.policy, options, place)
    judge = None if pick.judge is None else load_judge(pick.judge, options.judge)
    with ResumableFolder.open(out, "best-of-n") as folder:
        drawn = _gather(folder, options, policy)
        usable, left_out = _usable(drawn)
        candidates, scores, golden = _score(folder, usable, models, gold, left_out)
        by = gold if judge is None else judge
        wins = _compare_picks(candidates, scores, golden, by, out, sample=pick.sample)
        sizes = [len(c.texts) for c in candidates]
        num = max(sizes) if policy is None else options.draw.num
        result = BestOfN(
            num_prompts=len(candidates),
            num_candidates=num,
            gold=None if gold is None else gold.name,
            judge=None if judge is None else judge.name,
            mean_candidates=float(np.mean(sizes)),
            num_fewer=sum(size < num for size in sizes),
            num_cut=sum(c.num_cut for c in drawn),
            num_blank=sum(c.num_blank for c in drawn),
            left_out=dict(left_out),
            models=tuple(
                measure_picker(name, candidates, s, golden, num) for name, s in scores.items()
            ),
            baselines=() if golden is None else measure_baselines(candidates, golden, num),
            wins=wins,
        )
        atomic_write(out / "picks.jsonl", _lines(_pick_rows(candidates, scores, golden)))
        write_result(out / "best_of_n.json", result)
    return result


def _policy(path: str, options: BestOfNOptions, place: Placement) -> Policy:
    if is_url(path):
        return EndpointPolicy(Endpoint(path, options.policy), options.draw)
    return LocalPolicy(path, options.draw, place)


def _gather(
    folder: ResumableFolder, options: BestOfNOptions, policy: Policy | None
) -> list[Candidates]:
    """The candidates of every prompt, as the policy draws them or files hold them."""
    sources, draw = options.pick.prompts, options.draw
    if policy is None:
        candidates = read_candidates(sources, draw.num)
        file = folder.records("candidates.jsonl", {"candidates": candidates_digest(candidates)})
        file.add([c.to_record() for c in candidates if c.prompt.id not in file.records])
        return candidates
    prompts = read_prompts(sources)
    file = folder.records("candidates.jsonl", drawing_key(policy, prompts, draw))
    with show_progress("candidates") as on_progress:
        return draw_candidates(policy, prompts, draw, file, on_progress)


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
            "nothing to pick from; draw at a higher temperature (draw.temperature=1.2), or give rows with "
            "several `responses`"
        )
    return usable, left_out


def _score(
    folder: ResumableFolder,
    candidates: Sequence[Candidates],
    models: Sequence[CandidateScorer],
    gold: CandidateScorer | None,
    left_out: Counter[str],
) -> tuple[list[Candidates], dict[str, PerPrompt], PerPrompt | None]:
    """The prompts that every model could score, with each model's scores and the gold scores.

    Prompts that some model could not score are counted in `left_out`.
    """
    digest, groups = candidates_digest(candidates), [c.group for c in candidates]
    scorers = {model.name: model for model in models} | ({} if gold is None else {"gold": gold})
    all_scores: dict[str, list[GroupScores]] = {}
    for name, scorer in scorers.items():
        key = {**scorer.cache_key(), "candidates": digest}
        file = folder.records(f"scores/{file_name(name)}.jsonl", key)
        with show_progress(f"scores by {scorer.name}") as on_progress:
            all_scores[name] = score_all(scorer, groups, file, on_progress)
        if isinstance(scorer, ModelScorer):
            scorer.close()  # the next one needs the memory
    usable, why = [], ""
    for i in range(len(candidates)):
        refusals = {name: s[i] for name, s in all_scores.items() if isinstance(s[i], str)}
        if refusals:
            name, reason = next(iter(refusals.items()))
            why = f"not scored by {name}: {reason}"
            left_out[":".join(why.split(":")[:2])] += 1
        else:
            usable.append(i)
    if not usable:
        raise DataError(f"no prompt was scored by all models, the last was {why}")
    scores: dict[str, PerPrompt] = {
        name: [np.asarray(s[i], np.float64) for i in usable] for name, s in all_scores.items()
    }
    golden = scores.pop("gold", None)
    return [candidates[i] for i in usable], scores, golden


def _compare_picks(
    candidates: Sequence[Candidates],
    scores: Mapping[str, PerPrompt],
    golden: PerPrompt | None,
    by: LlmJudge | CandidateScorer | None,
    out: Path,
    *,
    sample: bool,
) -> tuple[Wins, ...]:
    """Every two methods against each other, by the judge or the gold score; empty without either."""
    picks = {name: best_indices(own) for name, own in scores.items()}
    pairs = list(combinations(picks, 2))
    if sample or len(picks) == 1:
        pairs += [(name, ONE_SAMPLE) for name in scores]
        picks[ONE_SAMPLE] = np.array([c.drawn[0] for c in candidates], np.int64)
    # in the order of their indices, so that two candidates are compared only once
    disputed = {
        (i, int(min(p, q)), int(max(p, q)))
        for first, second in pairs
        for i, (p, q) in enumerate(zip(picks[first], picks[second], strict=True))
        if p != q
    }
    if isinstance(by, LlmJudge):
        verdicts = _ask(by, candidates, sorted(disputed))
        atomic_write(out / "verdicts.jsonl", _lines(_verdict_rows(candidates, verdicts)))
    elif by is not None and golden is not None:
        verdicts = {
            (i, p, q): PairVerdict(int(np.sign(golden[i][p] - golden[i][q])))
            for i, p, q in disputed
        }
    else:
        return ()
    return tuple(_wins(pair, picks, verdicts, by.name) for pair in pairs)


def _ask(
    judge: LlmJudge, candidates: Sequence[Candidates], disputed: Sequence[Pair]
) -> dict[Pair, PairVerdict]:
    """The judge's verdicts; replies that the endpoint's cache has cost nothing."""
    verdicts: list[PairVerdict] = []
    with show_progress(f"verdicts of {judge.name}") as on_progress:
        for start in range(0, len(disputed), CHUNK):
            groups = [(candidates[i].group, p, q) for i, p, q in disputed[start : start + CHUNK]]
            verdicts += judge.compare(
                [AnswerPair(g.prompt, g.responses[p], g.responses[q]) for g, p, q in groups]
            )
            on_progress(len(verdicts), len(disputed))
    require_judged(verdicts, judge.name)
    return dict(zip(disputed, verdicts, strict=True))


def _wins(
    names: tuple[str, str],
    picks: Mapping[str, NDArray[np.int64]],
    verdicts: Mapping[Pair, PairVerdict],
    compared_by: str,
) -> Wins:
    """The picks of two methods against each other."""
    first, second = (picks[name] for name in names)
    by_prompt = []
    for i, (p, q) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        verdict = PairVerdict(0) if p == q else verdicts[i, min(p, q), max(p, q)]
        if p > q and verdict.preferred is not None:
            verdict = replace(verdict, preferred=-verdict.preferred)
        by_prompt.append(verdict)
    return measure_wins(names, compared_by, first == second, by_prompt)


def _verdict_rows(
    candidates: Sequence[Candidates], verdicts: Mapping[Pair, PairVerdict]
) -> Iterable[dict[str, Any]]:
    for (i, p, q), verdict in verdicts.items():
        yield {"id": f"{candidates[i].prompt.id}:{p}:{q}", **asdict(verdict)}


def _pick_rows(
    candidates: Sequence[Candidates], scores: Mapping[str, PerPrompt], golden: PerPrompt | None
) -> Iterable[dict[str, Any]]:
    """Every pick as a row that can be read as data again."""
    for model, own in scores.items():
        for i, (c, k) in enumerate(zip(candidates, best_indices(own).tolist(), strict=True)):
            yield {
                "id": c.prompt.id,
                "model": model,
                "prompt": [message._asdict() for message in c.prompt.prompt],
                "response": c.group.responses[k],
                "reward": float(own[i][k]),
                **({} if golden is None else {"gold": float(golden[i][k])}),
            }


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
