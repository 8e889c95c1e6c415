"""The best-of-n job: gather candidates, score them with every model, compare the picks, measure.

    OUT/candidates.jsonl   the candidates of every prompt, as drawn or read
    OUT/scores.jsonl       every candidate's score, by each model and by gold
    OUT/picks.jsonl        every model's pick for every prompt
    OUT/best_of_n.json     curves, baselines, wins, with intervals

The first grows while the job runs, and an endpoint's replies are cached: what was drawn or paid for is not
drawn or paid for again by the same command, or by one with other models. Scores are recomputed.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from hafrm.atomic import atomic_write
from hafrm.best_of_n import candidate_scores
from hafrm.best_of_n.candidates import (
    Candidates,
    DrawSection,
    EndpointPolicy,
    LocalPolicy,
    Policy,
    draw_candidates,
    drawing_key,
    groups_digest,
    read_candidates,
    read_prompts,
)
from hafrm.best_of_n.endpoint import Endpoint, EndpointSection, is_url
from hafrm.best_of_n.judges import Answers, LlmJudge, Wins, compare_answers, load_judge
from hafrm.best_of_n.picks import (
    BestOfN,
    PerPrompt,
    best_indices,
    measure_baselines,
    measure_picker,
)
from hafrm.errors import ConfigError, DataError
from hafrm.progress import show_progress
from hafrm.recipe import Section, Sources, Text
from hafrm.results import write_result
from hafrm.run_folder import ResumableFolder
from hafrm.scoring.loading import Placement, find_heads

ONE_SAMPLE = "one sample"  # the method that takes the first candidate


class PickSection(Section):
    """Which models pick from what, and what compares the picks."""

    models: Sources = Field(min_length=1)
    """Run folders, reward or policy directories: PATH or NAME=PATH."""
    prompts: Sources = Field(min_length=1)
    """Rows with prompts for the policy; without a policy, their responses are the candidates."""
    policy: Text | None = None
    """Samples the candidates: the directory of a causal LM, or the URL of an OpenAI-compatible endpoint."""
    gold: Text | None = None
    """A gold score for every candidate: demo, or a model."""
    judge: Text | None = None
    """Compares picks: an LLM at the URL of an endpoint."""
    sample: bool = False
    """Also compare every model's pick with the first candidate; a single model's pick always is."""
    dtype: Text = "auto"
    """float32, bfloat16 or float16; auto: the checkpoint's on a GPU, float32 on a CPU."""
    device: Text | None = None
    """cpu, cuda or cuda:1; null: a GPU if there is one."""


class BestOfNOptions(Section):
    """Everything that a best-of-n job depends on."""

    pick: PickSection
    draw: DrawSection = DrawSection()
    policy: EndpointSection = EndpointSection()
    judge: EndpointSection = EndpointSection()


def best_of_n(
    options: BestOfNOptions,
    out: Path,
    *,
    golds: Mapping[str, candidate_scores.GoldReward] | None = None,
) -> BestOfN:
    """Gather candidates, score them, compare the picks, and measure; writes every file of `out`.

    `golds` are known rewards, by the name that the options use for them as a model or as gold.
    Raises DataError if nothing is left to pick from.
    """
    pick = options.pick
    for name, target in (("policy", pick.policy), ("judge", pick.judge)):
        if getattr(options, name) != EndpointSection() and not is_url(target):
            raise ConfigError(f"settings of `{name}` need --{name} URL, got {target}")
    place, golds = Placement(pick.dtype, pick.device), golds or {}
    models = _models(pick, golds)
    policy: Policy | None = None
    if pick.policy is not None and is_url(pick.policy):
        policy = EndpointPolicy(Endpoint(pick.policy, options.policy), options.draw)
    elif pick.policy is not None:
        policy = LocalPolicy(pick.policy, options.draw, place)
    judge = None if pick.judge is None else load_judge(pick.judge, options.judge)
    with ResumableFolder.open(out, "best-of-n") as folder:
        drawn = _gather(folder, options, policy)
        left_out: Counter[str] = Counter()
        usable = _usable(drawn, left_out)
        groups = [c.group for c in usable]
        all_scores = {  # one model is in memory at a time
            name: candidate_scores.score_by_gold(golds[path], groups)
            if path in golds
            else candidate_scores.score_by_model(path, groups, place)
            for name, path in models.items()
        }
        candidates, scores = _scored(usable, all_scores, left_out)
        rows = []
        for i, group in enumerate(c.group for c in candidates):
            own = {name: by_prompt[i].tolist() for name, by_prompt in scores.items()}
            rows.append({"id": group.id, "responses": group.responses, "scores": own})
        atomic_write(out / "scores.jsonl", _lines(rows))
        golden = scores.pop("gold", None)
        is_named = pick.gold is None or pick.gold in golds
        gold = pick.gold if is_named else f"gold ({pick.gold})"
        wins = _compare_picks(candidates, scores, golden, judge, gold, sample=pick.sample)
        sizes = [len(c.texts) for c in candidates]
        num = max(sizes) if policy is None else options.draw.num
        result = BestOfN(
            num_prompts=len(candidates),
            num_candidates=num,
            gold=gold,
            judge=None if judge is None else judge.name,
            mean_candidates=float(np.mean(sizes)),
            num_fewer=sum(size < num for size in sizes),
            num_cut=sum(c.num_cut for c in drawn),
            num_blank=sum(c.num_blank for c in drawn),
            left_out=dict(left_out),
            models=tuple(measure_picker(n, candidates, s, golden, num) for n, s in scores.items()),
            baselines=() if golden is None else measure_baselines(candidates, golden, num),
            wins=wins,
        )
        atomic_write(out / "picks.jsonl", _lines(_pick_rows(candidates, scores, golden)))
        write_result(out / "best_of_n.json", result)
    return result


def _models(pick: PickSection, golds: Mapping[str, candidate_scores.GoldReward]) -> dict[str, str]:
    """The paths of everything that scores, by name; what gives the gold score is called gold."""
    named = candidate_scores.named_models(pick.models)
    names = Counter(["gold", *(name for name, _ in named)])
    for name, num in names.items():
        if num > 1:
            raise ConfigError(f"the name {name!r} is taken; give that model another as NAME=PATH")
    models = dict(named) | ({} if pick.gold is None else {"gold": pick.gold})
    places: dict[str, Any] = {}
    for name, path in models.items():
        heads = None if path in golds else find_heads(path)
        places[name] = path if heads is None else (heads.reward or heads.policy or path)
    if list(places.values()).count(places.get("gold")) > 1:
        raise ConfigError(
            f"--gold {pick.gold} also picks, and would judge its own picks: leave it out of the models "
            "(what gold itself picks is always a baseline), or give another --gold"
        )
    return models


def _gather(
    folder: ResumableFolder, options: BestOfNOptions, policy: Policy | None
) -> list[Candidates]:
    """The candidates of every prompt, drawn by the policy or read from files."""
    sources, draw = options.pick.prompts, options.draw
    if policy is None:
        candidates = read_candidates(sources, draw.num)
        digest = groups_digest([c.group for c in candidates])
        file = folder.records("candidates.jsonl", {"candidates": digest})
        file.add([c.to_record() for c in candidates if c.prompt.id not in file.records])
        return candidates
    prompts = read_prompts(sources)
    file = folder.records("candidates.jsonl", drawing_key(policy, prompts, draw))
    with show_progress("candidates") as on_progress:
        return draw_candidates(policy, prompts, draw, file, on_progress)


def _usable(drawn: Sequence[Candidates], left_out: Counter[str]) -> list[Candidates]:
    """The candidates of prompts with at least two different ones; counts why others are left out."""
    usable = []
    for c in drawn:
        if c.error is not None:
            left_out[c.error.partition(":")[0]] += 1
        elif len(set(c.texts)) < 2:
            left_out["fewer than two different candidates"] += 1
        else:
            usable.append(c)
    if not usable:
        raise DataError(
            f"none of {len(drawn)} prompts has two different candidates ({dict(left_out)}); draw at a "
            "higher temperature (draw.temperature=1.2), or give rows with several `responses`"
        )
    return usable


def _scored(
    candidates: Sequence[Candidates],
    all_scores: Mapping[str, Sequence[candidate_scores.GroupScores]],
    left_out: Counter[str],
) -> tuple[list[Candidates], dict[str, PerPrompt]]:
    """The prompts that every model could score, with their scores; the others are counted."""
    usable, why = [], ""
    for i in range(len(candidates)):
        refusals = [(name, s[i]) for name, s in all_scores.items() if isinstance(s[i], str)]
        if refusals:
            why = f"not scored by {refusals[0][0]}: {refusals[0][1]}"
            left_out[":".join(why.split(":")[:2])] += 1
        else:
            usable.append(i)
    if not usable:
        raise DataError(f"no prompt was scored by all models, the last was {why}")
    scores = {n: [np.asarray(s[i], np.float64) for i in usable] for n, s in all_scores.items()}
    return [candidates[i] for i in usable], dict(scores)


def _compare_picks(
    candidates: Sequence[Candidates],
    scores: Mapping[str, PerPrompt],
    golden: PerPrompt | None,
    judge: LlmJudge | None,
    gold: str | None,
    *,
    sample: bool,
) -> tuple[Wins, ...]:
    """Every pair of methods compared, by the judge or the gold score; empty without either."""
    if judge is None and gold is None:
        return ()
    picks = {name: best_indices(own).tolist() for name, own in scores.items()}
    methods = list(combinations(picks, 2))
    if sample or len(picks) == 1:
        methods += [(name, ONE_SAMPLE) for name in scores]
        picks[ONE_SAMPLE] = [c.drawn[0] for c in candidates]
    prompts = tuple(c.prompt.prompt for c in candidates)
    answers = {}
    for name, own in picks.items():
        texts = tuple(c.group.responses[k] for c, k in zip(candidates, own, strict=True))
        by_prompt = zip(golden, own, strict=True) if golden is not None else ()
        answers[name] = [Answers(prompts, texts, tuple(float(g[k]) for g, k in by_prompt))]
    return compare_answers(answers, methods, judge, gold or "")


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
