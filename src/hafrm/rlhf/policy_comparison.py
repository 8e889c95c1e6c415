"""Reward models compared by the policies that they train: one recipe, one start, one run for each seed.

The runs differ only in the reward model and the seed. The exported policies, and the start, answer prompts
that were not used to train or select anything. Finished runs are not repeated.
"""

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hafrm.best_of_n.candidate_scores import GoldReward, named_models
from hafrm.best_of_n.candidates import read_prompts
from hafrm.best_of_n.endpoint import EndpointSection
from hafrm.best_of_n.judges import Answers, Wins, compare_answers, load_judge, wins_table
from hafrm.data.encoding import Encoder
from hafrm.errors import ConfigError
from hafrm.evaluation.heads import EvaluationOptions, load_main_head
from hafrm.process_pool import ProcessPool
from hafrm.recipe import PolicySection
from hafrm.results import Table, columns, read_result, write_result
from hafrm.rlhf.actor import encode_prompts, write_responses
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from hafrm.rlhf.rlhf_run import LONGEST, RlhfResult, input_digests, score_rollouts
from hafrm.rlhf.train_policy import train_policy
from hafrm.scoring.loading import load_base, load_tokenizer
from hafrm.scoring.model_files import default_device
from hafrm.statistics import Estimate, clustered_bootstrap, seeded_difference, seeded_mean
from hafrm.training.checkpoint import open_run
from hafrm.training.setup import with_precision, with_training

START = "start"  # the policy that was not trained
_TEST_SEED = 2**61  # beyond the seeds of training and of held-out prompts


@dataclass(frozen=True)
class PolicyScore:
    """The scores of the answers of one reward model's policies, over all seeds and prompts."""

    name: str
    score: Estimate | None
    """Mean gold reward, or mean reward of evaluation.reward_model; None if there is neither."""
    gain: Estimate | None  # over the start policy's answers to the same prompts
    length: float  # characters per answer
    kl: float  # from the start, nat per response, at the exported steps; 0 for the start
    stopped: int  # seeds that were stopped early


@dataclass(frozen=True)
class RlhfComparison:
    """The result of comparing reward models by the policies that they train."""

    models: tuple[str, ...]
    seeds: tuple[int, ...]
    scored_by: str  # what gives the scores: gold, evaluation.reward_model's path, or nothing
    standings: tuple[PolicyScore, ...]
    wins: tuple[Wins, ...]

    def tables(self) -> tuple[Table, ...]:
        """Every policy's score next to the start's, then wins."""
        heads = "policy | score [95 %] | gain over start [95 %] | KL | characters | stopped: count"
        rows = tuple(
            (s.name, s.score, s.gain, f"{s.kl:.2f}", f"{s.length:.0f}", s.stopped)
            for s in self.standings
        )
        num = f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}"
        title = f"test answers, scored by {self.scored_by}, {num}"
        return Table(title, columns(heads), rows), wins_table(self.wins, "answers")


@dataclass(frozen=True)
class ComparisonRun:
    """One run of the comparison."""

    model: str  # the reward model's name
    path: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.model}-{self.seed}"

    def recipe(self, shared: RlhfRecipe) -> RlhfRecipe:
        """The shared recipe with the run's reward model and seed."""
        update = {
            "reward": shared.reward.model_copy(update={"model": self.path}),
            # so that more test prompts or another judge do not change the runs
            "comparison": None,
            "judge": EndpointSection(),
        }
        own = with_training(shared.model_copy(update=update), seed=self.seed)
        return with_precision(own, default_device().type)


def plan_runs(models: Sequence[str], num_seeds: int) -> list[ComparisonRun]:
    """All runs, seed by seed; of several reward models with one name, each seed uses the next."""
    paths: dict[str, list[str]] = {}
    for name, path in named_models(models):
        paths.setdefault(name, []).append(path)
    pairs = itertools.product(range(num_seeds), paths.items())
    return [ComparisonRun(name, own[seed % len(own)], seed) for seed, (name, own) in pairs]


@dataclass(frozen=True)
class ComparisonWorker:
    """Trains the policies of a comparison and samples their answers; finished runs are not repeated."""

    recipe: RlhfRecipe
    folder: Path
    gold: GoldReward | None

    def __call__(self, run: ComparisonRun) -> Answers:
        """Start or resume the run, unless it is done; returns the answers of its policy."""
        folder, recipe = self.folder / "runs" / run.folder, run.recipe(self.recipe)
        if (folder / "model").is_dir():
            digests = input_digests(recipe, with_gold=self.gold is not None)
            with open_run(recipe, folder, resume=True) as done:
                done.record_provenance(seed=run.seed, **digests)
        else:
            resume = (folder / "recipe.yaml").is_file()
            if resume and recipe.algorithm.name != "ppo":
                shutil.rmtree(folder)  # TRL's runs keep no checkpoints
                resume = False
            train_policy(recipe, folder, resume=resume, gold=self.gold)
        # an exported policy has its own template
        answers = self.answer(PolicySection(path=str(folder / "model" / "policy")), run.seed)
        write_result(folder / "answers.json", answers)  # for people to read
        return answers

    def answer(self, policy: PolicySection, seed: int) -> Answers:
        """A policy's answers to the test prompts, sampled as the recipe says, and their scores."""
        recipe = self.recipe
        assert recipe.comparison is not None
        encoder = Encoder(load_tokenizer(policy), max_length=LONGEST)
        groups = read_prompts(recipe.comparison.test, max_bad_fraction=recipe.data.max_bad_fraction)
        prompts = encode_prompts(groups, encoder, recipe.data)
        causal = load_base(policy, torch.float32, default_device())
        seed = _TEST_SEED + seed
        rollouts = write_responses(causal, encoder, prompts, 1, recipe.sampling, seed=seed)
        messages = tuple(prompt.messages for prompt in prompts)
        texts = tuple(text for r in rollouts for text in r.texts)
        scores: Sequence[float] = ()
        if self.gold is not None:
            scores = [self.gold(m, text) for m, text in zip(messages, texts, strict=True)]
        elif recipe.evaluation.reward_model is not None:
            scorer = load_main_head(recipe.evaluation.reward_model, EvaluationOptions())
            scores = score_rollouts(scorer, rollouts).tolist()
        return Answers(messages, texts, tuple(scores))


def compare_policies(
    recipe: RlhfRecipe,
    folder: Path,
    *,
    gold: GoldReward | None = None,
    num_processes: int = 1,
    on_run: Callable[[str], None] = lambda _: None,
) -> RlhfComparison:
    """Train what is missing, compare the policies as `comparison` says, and write rlhf_comparison.json.

    `on_run` is called with a line for each run that ends.
    """
    comparison = recipe.comparison
    assert comparison is not None
    scored_by = "gold" if gold is not None else recipe.evaluation.reward_model
    if scored_by is None and comparison.judge is None:
        raise ConfigError(
            "nothing compares the policies: give --gold, comparison.judge, or evaluation.reward_model"
        )
    judge = None if comparison.judge is None else load_judge(comparison.judge, recipe.judge)
    runs = plan_runs(comparison.models, comparison.seeds)
    make_worker = partial(ComparisonWorker, recipe, folder, gold)
    seeds, start = range(comparison.seeds), make_worker()
    answers = {START: [start.answer(recipe.model, seed) for seed in seeds]}
    with ProcessPool(make_worker, num_processes) as pool:
        by_run = pool.run(
            runs, lambda number, run, _: on_run(f"{number}/{len(runs)} {run.folder} is done")
        )
    for run, own in by_run.items():
        answers.setdefault(run.model, []).append(own)
    pairs = list(itertools.combinations(answers, 2))
    result = RlhfComparison(
        models=tuple(answers)[1:],
        seeds=tuple(seeds),
        scored_by=scored_by or "nothing",
        standings=tuple(_standing(name, answers, folder) for name in answers),
        wins=compare_answers(answers, pairs, judge, scored_by or ""),
    )
    write_result(folder / "rlhf_comparison.json", result)
    return result


def _standing(name: str, answers: Mapping[str, Sequence[Answers]], folder: Path) -> PolicyScore:
    """One reward model's policies over prompts, and over seeds if there are several; or the start."""
    score = gain = None
    # for each seed, a score of each prompt
    own, base = (np.array([a.scores for a in answers[n]]) for n in (name, START))
    if own.size and len(own) == 1:
        score = clustered_bootstrap(own[0], proportion=False)
        gain = clustered_bootstrap(own[0] - base[0], proportion=False)
    elif own.size:
        score = seeded_mean(own, proportion=False)
        gain = seeded_difference(own, base, proportion=False).estimate
    results = [
        read_result(folder / "runs" / f"{name}-{seed}" / "result.json", RlhfResult)
        for seed in (() if name == START else range(len(own)))
    ]
    return PolicyScore(
        name,
        score,
        None if name == START else gain,
        float(np.mean([len(text) for seed in answers[name] for text in seed.texts])),
        float(np.mean([r.best["kl"] for r in results])) if results else 0.0,
        sum(r.stopped is not None for r in results),
    )
