"""The runs of a comparison of reward models: one for each model, algorithm and seed, and their answers.

They differ in nothing else: same start, prompts and budgets. Finished work is not repeated: a run is an
ordinary RLHF run folder, and answers are kept under a digest of everything they depend on.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.data.encoding import Encoder
from hafrm.engine.sampling import sample
from hafrm.errors import CheckpointError, ConfigError
from hafrm.preferences import Message
from hafrm.recipe import ModelSection
from hafrm.results import read_result, write_result
from hafrm.rlhf.actor import response_text
from hafrm.rlhf.prompts import Prompt, fit_prompts, read_prompts
from hafrm.rlhf.rewards import load_scorer, score_texts
from hafrm.rlhf.rlhf_recipe import RlhfRecipe, without_ppo_only
from hafrm.rlhf.rlhf_run import sampling_of
from hafrm.rlhf.train_policy import open_run, train_policy
from hafrm.scoring.loading import model_digest
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


def plan_runs(
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
            encoder.cache_key,
            [prompt.messages for prompt in prompts],
            self.recipe.sampling.model_dump(),
            seed,
            "gold" if self.gold is not None else judge and model_digest(judge),
        ]
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()
