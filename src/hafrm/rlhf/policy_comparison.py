"""`hafrm rlhf-compare`: one start policy, one recipe, several reward models; whose policy is better.

Contenders differ only in the reward model (or the algorithm): same prompts, budgets and seeds. Each run is
an ordinary RLHF run folder; a killed comparison resumes with the runs that are missing. The exported
policies are compared on prompts that neither trained nor selected anything.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.best_of_n.judges import PairJudge, PairVerdict, ReplyPair, Wins, measure_wins, wins_table
from hafrm.errors import ConfigError
from hafrm.process_pool import ProcessPool
from hafrm.recipe_file import load_as
from hafrm.results import read_result, write_result
from hafrm.rlhf.comparison_runs import (
    START,
    Answers,
    ComparisonRun,
    ComparisonWorker,
    plan_runs,
)
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from hafrm.rlhf.rlhf_run import RlhfResult
from hafrm.run_folder import read_json_lines
from hafrm.statistics import Estimate, clustered_bootstrap, seeded_difference, seeded_mean
from hafrm.table import Column, Table


@dataclass(frozen=True)
class CurveSample:
    """One evaluation of a run on its held-out prompts."""

    step: int
    kl: float
    proxy: float
    gold: float | None


@dataclass(frozen=True)
class PolicyCurve:
    """Proxy and gold reward against the KL from the start, evaluation by evaluation."""

    model: str
    seed: int
    points: tuple[CurveSample, ...]


@dataclass(frozen=True)
class PolicyScore:
    """How one contender's answers score, over all seeds and prompts."""

    name: str
    score: Estimate | None
    """Mean gold reward or reward of evaluation.judge; None where there is neither."""
    gain: Estimate | None
    """Over the start policy's answers to the same prompts."""
    length: float
    """Characters per answer."""
    kl: float
    """From the start, nat per response, at the exported steps; 0 for the start."""
    stopped: int
    """Seeds that the watchdog stopped."""


@dataclass(frozen=True)
class RlhfComparison:
    """The result of `hafrm rlhf-compare`."""

    models: tuple[str, ...]
    seeds: tuple[int, ...]
    scored_by: str
    """What gives the scores: gold, evaluation.judge's path, or nothing."""
    standings: tuple[PolicyScore, ...]
    curves: tuple[PolicyCurve, ...]
    wins: tuple[Wins, ...]
    seconds: float
    """Of this call, to which runs that were there already are free."""

    def tables(self) -> tuple[Table, ...]:
        """Every contender's score beside the start policy's, then wins."""
        columns = (
            Column("policy"),
            Column("score [95 %]"),
            Column("gain over start [95 %]"),
            Column("KL"),
            Column("characters"),
            Column("stopped", "count"),
        )
        rows = tuple(
            (s.name, s.score, s.gain, f"{s.kl:.2f}", f"{s.length:.0f}", s.stopped)
            for s in self.standings
        )
        num = f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}"
        title = f"test answers, scored by {self.scored_by}, {num}"
        return Table(title, columns, rows), wins_table(self.wins, "answers")


def compare_policies(  # noqa: PLR0913 - what is compared, how, and who judges
    recipe: RlhfRecipe,
    models: Mapping[str, Sequence[str]],
    folder: Path,
    *,
    seeds: Sequence[int],
    algorithms: Sequence[str],
    test: Sequence[str],
    gold: GoldReward | None = None,
    judge: PairJudge | None = None,
    num_processes: int = 1,
    on_run: Callable[[str], None] = lambda _: None,
) -> RlhfComparison:
    """Train what is missing, compare the policies on the prompts of `test`, write rlhf_comparison.json.

    Wins are `judge`'s verdicts where there is one, else follow from the scores; `on_run` is called with a
    line for each run that ends. Raises ConfigError where nothing could compare: no gold reward, no judge,
    and no evaluation.judge in the recipe.
    """
    scored_by = "gold" if gold is not None else recipe.evaluation.judge
    if scored_by is None and judge is None:
        raise ConfigError(
            "nothing compares the policies: give --gold where the truth is known, --judge for a model that "
            "is asked, or name a reward model that is not compared in evaluation.judge"
        )
    start = time.perf_counter()
    runs = plan_runs(models, algorithms, seeds)
    make_worker = partial(ComparisonWorker, recipe, folder, tuple(test), gold)
    with ProcessPool(make_worker, num_processes) as pool:
        count = itertools.count(1)
        pool.run(runs, lambda run, _: on_run(f"{next(count)}/{len(runs)} {run.folder} is done"))
    worker = make_worker()
    answers = {(START, seed): worker.answers_of_start(seed) for seed in seeds}
    answers |= {(run.contender, run.seed): worker.answers(run) for run in runs}
    result = RlhfComparison(
        tuple(dict.fromkeys(run.contender for run in runs)),
        tuple(seeds),
        scored_by or "nothing",
        tuple(_standings(answers, runs, folder, seeds)),
        tuple(_curve(run, folder) for run in runs),
        tuple(answer_wins(answers, seeds, judge, scored_by or "")),
        time.perf_counter() - start,
    )
    write_result(folder / "rlhf_comparison.json", result)
    return result


def _curve(run: ComparisonRun, folder: Path) -> PolicyCurve:
    records = read_json_lines(folder / "runs" / run.folder / "metrics.jsonl")
    points = tuple(
        CurveSample(r["step"], r["kl"], r["reward"], r.get("gold"))
        for r in records
        if r.get("phase") == "held-out"
    )
    return PolicyCurve(run.contender, run.seed, points)


def _standings(
    answers: Mapping[tuple[str, int], Answers],
    runs: Sequence[ComparisonRun],
    folder: Path,
    seeds: Sequence[int],
) -> list[PolicyScore]:
    """Every contender, the start first."""
    standings = []
    for name in dict.fromkeys(name for name, _ in answers):
        folders = [folder / "runs" / run.folder for run in runs if run.contender == name]
        results = [read_result(path / "result.json", RlhfResult) for path in folders]
        score = gain = None
        if answers[START, seeds[0]].scores:
            mine, base = (np.array([answers[n, s].scores for s in seeds]) for n in (name, START))
            score, gain = _score_and_gain(mine, base)
        texts = [text for seed in seeds for text in answers[name, seed].texts]
        standings.append(
            PolicyScore(
                name,
                score,
                None if name == START else gain,
                float(np.mean([len(text) for text in texts])),
                float(np.mean([r.best["kl"] for r in results])) if results else 0.0,
                sum(r.stopped is not None for r in results),
            )
        )
    return standings


def _score_and_gain(
    scores: Float[np.ndarray, "seeds prompts"], base: Float[np.ndarray, "seeds prompts"]
) -> tuple[Estimate, Estimate]:
    """The mean score and its gain over `base`: over prompts, and over seeds where there are several."""
    if len(scores) == 1:
        return (
            clustered_bootstrap(scores[0], proportion=False),
            clustered_bootstrap(scores[0] - base[0], proportion=False),
        )
    gain = seeded_difference(scores, base, proportion=False)
    return seeded_mean(scores, proportion=False), gain.estimate


def answer_wins(
    answers: Mapping[tuple[str, int], Answers],
    seeds: Sequence[int],
    judge: PairJudge | None,
    scored_by: str,
) -> list[Wins]:
    """Every two contenders, answer against answer, over all prompts and seeds."""
    names = list(dict.fromkeys(name for name, _ in answers))
    wins = []
    for first, second in itertools.combinations(names, 2):
        sides = [(answers[first, seed], answers[second, seed]) for seed in seeds]
        pairs = [
            ReplyPair(a.messages(i), a.texts[i], b.texts[i])
            for a, b in sides
            for i in range(len(a.texts))
        ]
        if judge is None:
            gaps = [np.array(a.scores) - np.array(b.scores) for a, b in sides]
            signs = np.sign(np.concatenate(gaps)).astype(int).tolist()
            verdicts = [PairVerdict(sign) for sign in signs]
        else:
            verdicts = judge.compare(pairs)
        same = np.array([pair.first == pair.second for pair in pairs])
        name = scored_by if judge is None else judge.name
        wins.append(measure_wins(first, second, name, same, verdicts, num_seeds=len(seeds)))
    return wins


def named_models(models: Sequence[str]) -> dict[str, list[str]]:
    """The paths of each NAME of NAME=PATH; raises ConfigError for anything else."""
    paths: dict[str, list[str]] = {}
    for text in models:
        name, _, path = text.partition("=")
        if not name or not path or "/" in name:
            raise ConfigError(
                f"--model {text!r} is not of the form NAME=PATH, such as haf=runs/haf"
            )
        paths.setdefault(name, []).append(path)
    return paths


def load_comparison_recipe(path: str, model: str, overrides: Sequence[str]) -> RlhfRecipe:
    """The shared recipe; its reward models are not used, so any rule for several of them is allowed."""
    ignored = [f"reward.models=[{model}]", "reward.rule=mean", "reward.weights=null"]
    return load_as(RlhfRecipe, path, [*overrides, *ignored])
