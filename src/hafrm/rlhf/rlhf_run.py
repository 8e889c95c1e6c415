"""What every RLHF run shares, whatever its algorithm: folder, policy, prompts, rewards, the best step.

An algorithm asks for a batch's rewards, hands its numbers to `log_batch`, and lets `evaluate` decide when a
step is the best so far and when to stop. Nothing here computes a gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hafrm.atomic import atomic_directory, fingerprint
from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.best_of_n.candidates import read_prompts
from hafrm.data.encoding import Encoder
from hafrm.data.reader import local_files
from hafrm.data.splits import split_by_prompt, without_prompts
from hafrm.errors import DataError
from hafrm.export.stock_export import export_policy, gather_weights
from hafrm.preferences import Group
from hafrm.results import from_plain, write_result
from hafrm.rlhf.actor import Actor, Prompt, Rollout, encode_prompts
from hafrm.rlhf.rewards import (
    HeldOut,
    Measure,
    Rewards,
    gold_rewards,
    length_matched,
    length_slope,
    load_scorer,
    score_texts,
)
from hafrm.rlhf.rlhf_log import RlhfLog
from hafrm.rlhf.rlhf_recipe import PromptSection, RlhfRecipe
from hafrm.rlhf.watchdog import Watchdog
from hafrm.run_folder import RunFolder
from hafrm.training.setup import load_tokenizer

LONGEST = 2**20  # tokens after which an encoder would cut: no prompt is cut, long ones are left out
_SPLIT_SEED = 2**33  # beyond the seeds of other splits, so that no part nests in another
_HELD_OUT_SEED = 2**60  # beyond the seeds of all batches


@dataclass(frozen=True)
class RlhfResult:
    """The result of a finished run."""

    num_steps: int  # batches taken, fewer than asked for where the run was stopped
    best_step: int
    best: dict[str, float]  # held-out means of the exported step
    selected_by: Measure  # the measure that selected it
    stopped: str | None  # why the run ended early, or None


@dataclass(frozen=True)
class Prompts:
    """What a run answers, and what its steps are selected by."""

    train: list[Prompt]
    held_out: list[Prompt]
    counts: dict[str, int]


@dataclass
class BestStep:
    """The best step so far and the measure that selected it."""

    step: int = -1
    score: float = float("-inf")
    selected_by: Measure = "penalised"
    means: dict[str, float] | None = None


class RlhfRun:
    """One run in one process; `state` and `restore` are what a checkpoint holds of it."""

    def __init__(
        self, recipe: RlhfRecipe, folder: RunFolder, gold: GoldReward | None, *, share: bool = True
    ) -> None:
        """Load everything that the recipe names; `share` False leaves the policy's attention alone."""
        self.recipe, self.folder, self.gold = recipe, folder, gold
        encoder = Encoder(load_tokenizer(recipe.model), max_length=LONGEST)
        self.prompts = load_prompts(recipe.data, encoder, recipe.training.seed, folder)
        self.rewards = Rewards.load(recipe.reward)
        self.actor = Actor.load(recipe, encoder, share=share)
        path = recipe.evaluation.reward_model
        self.independent = None if path is None else load_scorer(path)
        self.watchdog = Watchdog()
        self.log = RlhfLog(folder, recipe)
        self.best = BestStep()
        self.lengths: tuple[float, float] | None = None
        """(reward per token, tokens) of the start policy's held-out responses."""
        self.stopped: str | None = None
        self.last_kl = 0.0  # of the latest evaluation, nat per response

    def prompts_of_step(self, step: int) -> list[Prompt]:
        """The prompts of batch `step`, counted from 0."""
        training = self.recipe.training
        per_step = training.batch_size // training.responses_per_prompt
        indices = prompts_of_step(len(self.prompts.train), step, per_step, training.seed)
        return [self.prompts.train[i] for i in indices]

    def reward(self, rollouts: Sequence[Rollout]) -> NDArray[np.float32]:
        """One reward per response, by the recipe's models and rule."""
        prompts = [r.prompt.messages for r in rollouts]
        by_model = self.rewards.by_model(prompts, [response.texts for response in rollouts])
        return np.asarray(self.rewards.combine(by_model), np.float32)

    def gold_mean(self, rollouts: Sequence[Rollout]) -> float | None:
        """The batch's mean gold reward, where it is known."""
        values = gold_rewards(self.gold, rollouts)
        return None if values is None else float(values.mean())

    def log_batch(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log a batch's numbers and let the watchdog check them."""
        self.log.batch(step, values)
        reward, kl, entropy = values["reward"], values["kl"], values["entropy"]
        assert reward is not None
        assert kl is not None
        assert entropy is not None
        rules = self.recipe.watch
        self.stopped = self.watchdog.batch(rules, reward=reward, kl=kl, entropy=entropy)

    def evaluate(self, step: int) -> bool:
        """Measure the policy on held-out prompts; True where this step is the best so far."""
        recipe = self.recipe
        # always the same prompts and seed: two evaluations differ by the policy alone
        prompts = self.prompts.held_out[: recipe.evaluation.prompts]
        rollouts = self.actor.write(prompts, 1, _HELD_OUT_SEED + recipe.training.seed)
        if self.lengths is None:  # the start policy
            texts = [r.texts for r in rollouts]
            self.rewards.fit_scales([r.prompt.messages for r in rollouts], texts)
        measured = self._measure(rollouts)
        if self.lengths is None:
            slope = length_slope(measured.rewards, measured.lengths)
            self.lengths = slope, float(measured.lengths.mean())
        matched = length_matched(measured.rewards, measured.lengths, *self.lengths)
        self.last_kl = float(measured.kls.mean())
        selected_by, scores = measured.selection(recipe.evaluation.kl_penalty)
        score = float(scores.mean())
        best = score > self.best.score
        extra = {"length_matched_reward": float(matched.mean())}
        self.log.held_out(step, measured, best, extra)
        self._watch(measured, matched)
        if best:
            means = {name: estimate.value for name, estimate in measured.estimates().items()}
            self.best = BestStep(step, score, selected_by, means | extra | {"kl": self.last_kl})
        return best

    def _measure(self, rollouts: list[Rollout]) -> HeldOut:
        """The responses, measured by every reward there is."""
        prompts, texts = [r.prompt.messages for r in rollouts], [r.texts for r in rollouts]
        by_model = self.rewards.by_model(prompts, texts)
        policy, reference = self.actor.logps(rollouts)
        assert policy.logps is not None
        assert reference.logps is not None
        scorer = self.independent
        return HeldOut(
            rollouts,
            rewards=self.rewards.combine(by_model),
            lowest=np.asarray(by_model.min(0)),
            kls=policy.logps - reference.logps,
            lengths=policy.lengths,
            ended=np.array([end for response in rollouts for end in response.ended]),
            independent=None if scorer is None else score_texts(scorer, prompts, texts),
            gold=gold_rewards(self.gold, rollouts),
        )

    def _watch(self, measured: HeldOut, matched: NDArray[np.float32]) -> None:
        # without an independent measure: the reward minus what growing longer earned
        measures = {"gold reward": measured.gold, "independent reward": measured.independent}
        measures |= {"length-matched reward": matched}
        name, values = next((n, v) for n, v in measures.items() if v is not None)
        why = self.watchdog.evaluation(
            self.recipe.watch, values.tolist(), name, proxy=float(measured.rewards.mean())
        )
        self.stopped = self.stopped or why

    def is_due(self, step: int, every: int) -> bool:
        """Whether step `step` is one of every so many, the last one, or the one that the run stops at."""
        last = step == self.recipe.training.steps or self.stopped is not None
        return last or (every > 0 and step % every == 0)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "best": asdict(self.best),
            "lengths": self.lengths,
            "scales": self.rewards.scales,
            "watchdog": asdict(self.watchdog),
            "stopped": self.stopped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state` returned."""
        self.best = BestStep(**state["best"])
        self.lengths = tuple(state["lengths"])
        self.rewards.scales = [(mean, std) for mean, std in state["scales"]]
        self.watchdog = from_plain(Watchdog, state["watchdog"])
        self.stopped = state["stopped"]

    def record_provenance(self) -> None:
        """Versions, seed, digests of local prompt files, and how many prompts there are."""
        data = self.recipe.data
        files = {f for entry in (*data.train, *data.validation) for f in local_files(entry)}
        self.folder.record_provenance(
            seed=self.recipe.training.seed,
            data={str(file): fingerprint(file) for file in sorted(files) if file.is_file()},
            details={"counts": self.prompts.counts, "algorithm": self.recipe.algorithm.name},
        )

    def finish(self, num_steps: int) -> RlhfResult:
        """Export the policy as it is now, which must be the best step's, unless that is done."""
        dtype = torch.bfloat16 if self.recipe.training.precision == "bf16" else torch.float32
        best = self.best
        assert best.means is not None
        result = RlhfResult(num_steps, best.step, best.means, best.selected_by, self.stopped)
        write_result(self.folder.path / "result.json", result)
        if not self.folder.model_path.is_dir():
            with atomic_directory(self.folder.model_path) as aside:
                weights = gather_weights(self.actor.model)
                export_policy(weights, self.actor.encoder, aside / "policy", dtype=dtype)
        return result


def load_prompts(data: PromptSection, encoder: Encoder, seed: int, folder: RunFolder) -> Prompts:
    """Read, split by prompt, encode, and leave out what is too long.

    Raises DataError where nothing is left of a part.
    """

    def read(sources: Sequence[str], bad_rows: str) -> list[Group]:
        file = folder.path / bad_rows
        return read_prompts(sources, max_bad_fraction=data.max_bad_fraction, bad_rows_file=file)

    train = read(data.train, "bad_rows.jsonl")
    if data.validation:
        held_out = read(data.validation, "bad_validation_rows.jsonl")
    else:
        train, held_out = split_by_prompt(
            train, fraction=data.validation_fraction, seed=_SPLIT_SEED + seed
        )
    parts = {"data.train": without_prompts(train, held_out), "data.validation": held_out}
    fitting = {
        name: encode_prompts(groups, encoder, data.max_prompt_length)
        for name, groups in parts.items()
    }
    for name, prompts in fitting.items():
        if not prompts:
            raise DataError(
                f"{name} has no prompt of at most {data.max_prompt_length} tokens "
                f"({len(parts[name])} longer ones): raise data.max_prompt_length, or give other sources"
            )
    counts = {
        "train_prompts": len(fitting["data.train"]),
        "held_out_prompts": len(fitting["data.validation"]),
        "held_out_prompts_not_trained_on": len(train) - len(parts["data.train"]),
        "prompts_too_long": sum(len(parts[name]) - len(fitting[name]) for name in parts),
    }
    return Prompts(fitting["data.train"], fitting["data.validation"], counts)


def prompts_of_step(num_prompts: int, step: int, per_step: int, seed: int) -> NDArray[np.int64]:
    """Indices of a step's prompts: every prompt once per pass, each pass in an order of its own."""
    # a pure function, so that a resumed run takes the prompts of the uninterrupted one
    epochs, within = np.divmod(np.arange(step * per_step, (step + 1) * per_step), num_prompts)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(num_prompts)
        for epoch in np.unique(epochs).tolist()
    }
    return np.array([orders[e][i] for e, i in zip(epochs.tolist(), within, strict=True)], np.int64)
