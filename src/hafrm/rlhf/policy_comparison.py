"""`hafrm rlhf-compare`: one start policy, one recipe, several reward models; whose policy is better.

Contenders differ only in the reward model (or the algorithm): same prompts, budgets and seeds. Each run is
an ordinary RLHF run folder; a killed comparison resumes with the runs that are missing. The exported
policies are compared on prompts that neither trained nor selected anything.
"""

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.best_of_n.judges import PairJudge, PairVerdict, ReplyPair
from hafrm.best_of_n.picks import Wins, measure_wins, wins_table
from hafrm.config import load_as
from hafrm.data.encoding import Encoder
from hafrm.engine.sampling import sample
from hafrm.errors import CheckpointError, ConfigError
from hafrm.preferences import Message
from hafrm.process_pool import ProcessPool
from hafrm.recipe import ModelSection
from hafrm.results import read_result, write_result
from hafrm.rlhf.actor import response_text
from hafrm.rlhf.prompts import Prompt, fit_prompts, read_prompts
from hafrm.rlhf.rewards import load_scorer, score_texts
from hafrm.rlhf.rlhf_recipe import RlhfRecipe, without_ppo_only
from hafrm.rlhf.rlhf_run import RlhfResult, sampling_of
from hafrm.rlhf.train_policy import open_run, train_policy
from hafrm.run_folder import read_json_lines
from hafrm.scoring.loading import model_digest
from hafrm.statistics import Estimate, clustered_bootstrap, seeded_difference, seeded_mean
from hafrm.table import Column, Table
from hafrm.training.data_setup import load_tokenizer
from hafrm.training.model_setup import load_base

START = "start"
"""The contender that was not trained."""
_TEST_SEED = 2**61
"""Apart from the seeds of training and of held-out prompts."""


@dataclass(frozen=True)
class Answers:
    """One answer to each test prompt that fits, in the order of the prompts."""

    cache_key: str
    """Digest of everything they depend on."""
    prompts: tuple[tuple[tuple[str, str], ...], ...]
    """Each as its turns, (role, content)."""
    texts: tuple[str, ...]
    scores: tuple[float, ...]
    """Gold rewards, or the rewards of evaluation.judge; empty where there is neither."""

    def messages(self, number: int) -> tuple[Message, ...]:
        """The prompt of an answer."""
        return tuple(Message(*turn) for turn in self.prompts[number])


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


@dataclass(frozen=True)
class ComparisonRun:
    """One run of the comparison."""

    model: str
    """The reward model's name."""
    path: str
    algorithm: str
    seed: int
    contender: str
    """What its seeds have in common: the model, and the algorithm where there are several."""

    @property
    def folder(self) -> str:
        return f"{self.model}-{self.algorithm}-{self.seed}"


def comparison_runs(
    models: Mapping[str, Sequence[str]], algorithms: Sequence[str], seeds: Sequence[int]
) -> list[ComparisonRun]:
    """All runs, seed by seed, so that a comparison that is stopped has something of every contender.

    A name may stand for several reward models, trained with seeds of their own: each seed takes the next.
    """
    several = len(algorithms) > 1
    return [
        ComparisonRun(
            name, paths[k % len(paths)], algorithm, seed, f"{name} {algorithm}" if several else name
        )
        for k, seed in enumerate(seeds)
        for algorithm in algorithms
        for name, paths in models.items()
    ]


def recipe_for(recipe: RlhfRecipe, run: ComparisonRun) -> RlhfRecipe:
    """The shared recipe with the run's reward model, algorithm and seed.

    `reward.kinds` holds for every model of the comparison; weights and rules for several models do not
    apply to one. Raises ConfigError for a recipe with several kinds.
    """
    kinds = set(recipe.reward.kinds)
    if len(kinds) > 1:
        raise ConfigError(
            f"reward.kinds is {list(recipe.reward.kinds)}, and a comparison trains with one reward model "
            "at a time: give one kind, which holds for all"
        )
    values = recipe.model_dump()
    one_model = {"models": (run.path,), "kinds": tuple(kinds), "rule": "mean", "weights": None}
    values["reward"] |= one_model
    values["algorithm"]["name"] = run.algorithm
    values["training"]["seed"] = run.seed
    return RlhfRecipe.model_validate(without_ppo_only(values))


@dataclass(frozen=True)
class ComparisonWorker:
    """Trains the policies of a comparison and samples their answers; finished work is not repeated."""

    recipe: RlhfRecipe
    folder: Path
    test: tuple[str, ...]
    gold: GoldReward | None

    def __call__(self, run: ComparisonRun) -> None:
        """Start or resume the run, or find it done, then its answers; TRL's runs start again.

        Raises CheckpointError where the folder is of a run with another recipe or reward model.
        """
        folder, recipe = self.folder / "runs" / run.folder, recipe_for(self.recipe, run)
        resume = (folder / "recipe.yaml").is_file()
        if (folder / "model").is_dir():
            open_run(recipe, folder, resume=True)
        else:
            if resume and run.algorithm != "ppo":
                shutil.rmtree(folder)
                resume = False
            train_policy(recipe, folder, resume=resume, gold=self.gold)
        self.answers(run)

    def answers(self, run: ComparisonRun) -> Answers:
        """What the run's exported policy answers to the test prompts."""
        folder = self.folder / "runs" / run.folder
        return self._answer(str(folder / "model" / "policy"), folder / "answers.json", run.seed)

    def answers_of_start(self, seed: int) -> Answers:
        """What the untrained policy answers with a seed."""
        file = self.folder / "runs" / f"{START}-{seed}.json"
        return self._answer(self.recipe.model.path, file, seed)

    def _answer(self, policy: str, file: Path, seed: int) -> Answers:
        """The policy's answers, sampled as the recipe says; from `file` where these very ones are there."""
        recipe, model = self.recipe, self.recipe.model
        if policy != model.path:  # an exported policy brings its template along
            model = ModelSection(path=policy)
        encoder = Encoder(load_tokenizer(model), max_length=2**20)
        prompts = fit_prompts(read_prompts(self.test, recipe.data), encoder, recipe.data)
        key = self._cache_key(policy, encoder, prompts, seed)
        if file.is_file():
            try:
                answers = read_result(file, Answers)
            except CheckpointError:
                answers = None
            if answers is not None and answers.cache_key == key:
                return answers
        causal = load_base(model, torch.float32)
        causal.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        responses = sample(
            causal,
            [prompt.ids.tolist() for prompt in prompts],
            1,
            sampling_of(recipe),
            eos=encoder.eos_id,
            pad=encoder.pad_id,
            seed=_TEST_SEED + seed,
            batch_size=recipe.sampling.batch_size,
        )
        texts = tuple(response_text(encoder, ids) for (ids,) in responses)
        turns = tuple(tuple((m.role, m.content) for m in p.messages) for p in prompts)
        answers = Answers(key, turns, texts, self._scores(prompts, texts))
        write_result(file, answers)
        return answers

    def _scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[float, ...]:
        messages = [prompt.messages for prompt in prompts]
        if self.gold is not None:
            gold = self.gold
            return tuple(float(gold(m, text)) for m, text in zip(messages, texts, strict=True))
        judge = self.recipe.evaluation.judge
        if judge is None:
            return ()
        rewards = score_texts(load_scorer(judge), messages, [[text] for text in texts])
        return tuple(rewards.tolist())

    def _cache_key(self, policy: str, encoder: Encoder, prompts: list[Prompt], seed: int) -> str:
        judge = self.recipe.evaluation.judge
        content = [
            model_digest(policy),
            encoder.fingerprint,
            [prompt.messages for prompt in prompts],
            self.recipe.sampling.model_dump(),
            seed,
            "gold" if self.gold is not None else judge and model_digest(judge),
        ]
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


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
    runs = comparison_runs(models, algorithms, seeds)
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
