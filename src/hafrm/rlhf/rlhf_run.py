"""What every RLHF run shares, whatever its algorithm: folder, policy, prompts, rewards, the best step.

An algorithm asks for a batch's rewards, hands its numbers to `log_batch`, and lets `evaluate` decide when a
step is the best so far and when to stop. Nothing here computes a gradient.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hafrm.atomic import atomic_directory, fingerprint
from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.data.encoding import Encoder
from hafrm.data.reader import local_files
from hafrm.engine.model import HybridModel, sharing_obstacle, split_causal_lm
from hafrm.engine.sampling import Sampling
from hafrm.errors import ConfigError
from hafrm.results import write_result
from hafrm.rlhf.actor import Actor, Reference, Rollout
from hafrm.rlhf.held_out import (
    HeldOut,
    HeldOutEvaluator,
    gold_rewards,
    length_matched,
    length_slope,
)
from hafrm.rlhf.prompts import Prompt, Prompts, load_prompts, prompts_of_step
from hafrm.rlhf.rewards import Rewards, Scale, load_scorer
from hafrm.rlhf.rlhf_log import RlhfLog
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from hafrm.rlhf.watchdog import Watchdog
from hafrm.run_folder import RunFolder
from hafrm.scoring.export import export_policy, gather_weights
from hafrm.training.prepare import inject_lora, load_base, load_tokenizer

log = logging.getLogger("hafrm")
_LONGEST = 2**20
"""Tokens after which the prompt encoder would cut: none are cut, long ones are left out."""
_HELD_OUT_SEED = 2**60
"""Beyond the seeds of all batches."""


@dataclass(frozen=True)
class RlhfResult:
    """The result of a finished run."""

    num_steps: int
    """Batches taken, fewer than asked for where the run was stopped."""
    best_step: int
    best: dict[str, float]
    """Held-out means of the exported step."""
    selected_by: str
    """The measure that selected it: gold, judge or penalised."""
    stopped: str | None
    """Why the run ended early, or None."""


@dataclass
class BestStep:
    """The best step so far and the measures it was picked by."""

    step: int = -1
    score: float = float("-inf")
    selected_by: str = "penalised"
    means: dict[str, float] | None = None


class RlhfRun:
    """One run in one process; `state` and `restore` are what a checkpoint holds of it."""

    def __init__(
        self, recipe: RlhfRecipe, folder: RunFolder, gold: GoldReward | None, *, share: bool = True
    ) -> None:
        """Load everything that the recipe names; `share` False leaves the policy's attention alone."""
        self.recipe, self.folder, self.gold = recipe, folder, gold
        encoder = Encoder(load_tokenizer(recipe.model), max_length=_LONGEST)
        self.prompts: Prompts = load_prompts(
            recipe.data,
            encoder,
            seed=recipe.training.seed,
            bad_rows_file=folder.path / "bad_rows.jsonl",
        )
        self.rewards = Rewards.load(recipe.reward)
        self.actor = load_actor(recipe, encoder, share=share)
        judge = recipe.evaluation.judge
        self.held_out = HeldOutEvaluator(
            self.prompts.held_out[: recipe.evaluation.prompts],
            self.rewards,
            judge=None if judge is None else load_scorer(judge),
            gold=gold,
            seed=_HELD_OUT_SEED + recipe.training.seed,
        )
        self.watchdog = Watchdog(recipe.watch)
        self.log = RlhfLog(folder, recipe)
        self.best = BestStep()
        self.lengths: tuple[float, float] | None = None
        """(reward per token, tokens) of the start policy's held-out responses."""
        self.stopped: str | None = None
        self.last_kl = 0.0
        """Of the latest evaluation, nat per response."""

    def prompts_of_step(self, step: int) -> list[Prompt]:
        """The prompts of batch `step`, counted from 0."""
        training = self.recipe.training
        per_step = training.batch_size // training.responses_per_prompt
        picks = prompts_of_step(len(self.prompts.train), step, per_step, training.seed)
        return [self.prompts.train[i] for i in picks]

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
        self.stopped = self.watchdog.batch(reward=reward, kl=kl, entropy=entropy)

    def evaluate(self, step: int) -> bool:
        """Measure the policy on held-out prompts; True where this step is the best so far."""
        rollouts = self.held_out.write(self.actor)
        if self.lengths is None:
            texts = [r.texts for r in rollouts]
            self.rewards.fit_scales([r.prompt.messages for r in rollouts], texts)
        held_out = self.held_out.measure(self.actor, rollouts)
        if self.lengths is None:
            slope = length_slope(held_out.rewards, held_out.lengths)
            self.lengths = slope, float(held_out.lengths.mean())
        self.last_kl = float(held_out.kls.mean())
        matched = length_matched(held_out.rewards, held_out.lengths, *self.lengths)
        score = float(held_out.selection_scores(self.recipe.evaluation.kl_penalty).mean())
        best = score > self.best.score
        extra = {"length_matched_reward": float(matched.mean())}
        self.log.held_out(step, held_out, best, extra)
        self._watch(held_out, matched)
        if best:
            means = {name: estimate.value for name, estimate in held_out.estimates().items()}
            means |= extra | {"kl": self.last_kl}
            self.best = BestStep(step, score, held_out.selected_by(), means)
        return best

    def _watch(self, held_out: HeldOut, matched: NDArray[np.float32]) -> None:
        measures = {"gold reward": held_out.gold, "judge's reward": held_out.judged}
        measures |= {"length-matched reward": matched}
        name, values = next((n, v) for n, v in measures.items() if v is not None)
        proxy = float(held_out.rewards.mean())
        self.stopped = self.stopped or self.watchdog.evaluation(values.tolist(), name, proxy=proxy)

    def is_due(self, step: int, every: int) -> bool:
        """Whether step `step` is one of every so many, the last one, or the one that the run stops at."""
        last = step == self.recipe.training.steps or self.stopped is not None
        return last or (every > 0 and step % every == 0)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "best_step": self.best.step,
            "best_score": self.best.score,
            "selected_by": self.best.selected_by,
            "best": self.best.means,
            "lengths": self.lengths,
            "scales": [[scale.mean, scale.std] for scale in self.rewards.scales],
            "watchdog": self.watchdog.to_dict(),
            "stopped": self.stopped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state` returned."""
        self.best = BestStep(
            state["best_step"], state["best_score"], state["selected_by"], state["best"]
        )
        self.lengths = tuple(state["lengths"])
        self.rewards.scales = [Scale(*pair) for pair in state["scales"]]
        self.watchdog.restore(state["watchdog"])
        self.stopped = state["stopped"]

    def record_provenance(self) -> None:
        """Versions, seed, digests of local prompt files, and what became of the prompts."""
        data = self.recipe.data
        files = {f for entry in (*data.train, *data.validation) for f in local_files(entry)}
        self.folder.record_provenance(
            seed=self.recipe.training.seed,
            data={str(file): fingerprint(file) for file in sorted(files) if file.is_file()},
            details={"counts": self.prompts.counts, "algorithm": self.recipe.algorithm.name},
        )

    def finish(self, num_steps: int) -> RlhfResult:
        """Export the policy as it is now, which must be the best step's; a finished run finds it done."""
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


def load_actor(recipe: RlhfRecipe, encoder: Encoder, *, share: bool = True) -> Actor:
    """The policy that the recipe starts from, with its adapters and its reference.

    Raises ConfigError where prompts and responses do not fit into the model's positions.
    """
    bf16 = recipe.training.precision == "bf16"
    frozen_half = bf16 and recipe.lora is not None
    causal = load_base(recipe.model, torch.bfloat16 if frozen_half else torch.float32)
    _check_fits(causal, recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    causal.to(device)  # type: ignore[arg-type]
    backbone, head = split_causal_lm(causal)
    if recipe.lora is not None:
        causal.requires_grad_(False)
        inject_lora(recipe.lora, backbone)
    model = HybridModel(
        backbone, policy_head=head, sharing=share and sharing_obstacle(backbone) is None
    )
    reference = Reference(model, adapters=recipe.lora is not None)
    if recipe.training.gradient_checkpointing:
        model.checkpoint_activations()
    return Actor(
        causal,
        model,
        reference,
        encoder,
        sampling=sampling_of(recipe),
        batch_size=recipe.sampling.batch_size,
        max_tokens=recipe.training.max_tokens,
        autocast=torch.bfloat16 if bf16 else None,
    )


def sampling_of(recipe: RlhfRecipe) -> Sampling:
    """How the recipe lets the policy write."""
    values = recipe.sampling
    return Sampling(
        max_new_tokens=values.max_new_tokens,
        temperature=values.temperature,
        top_p=values.top_p,
        repetition_penalty=values.repetition_penalty,
    )


def _check_fits(causal: PreTrainedModel, recipe: RlhfRecipe) -> None:
    longest = recipe.data.max_prompt_length + recipe.sampling.max_new_tokens
    positions = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"data.max_prompt_length {recipe.data.max_prompt_length} and sampling.max_new_tokens "
            f"{recipe.sampling.max_new_tokens} make {longest} tokens, but the model takes {positions}: "
            "lower one of them"
        )
