"""What every RLHF run shares, whatever its algorithm: folder, policy, prompts, rewards, the best step.

An algorithm asks for a batch's rewards, hands its numbers to `batch`, and lets `evaluate` decide when a
step is worth keeping and when to stop. Nothing here computes a gradient.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hafrm.alignment.rlhf.actor import Actor, Reference, Written
from hafrm.alignment.rlhf.heldout import (
    Examination,
    HeldOut,
    gold_rewards,
    length_matched,
    length_slope,
)
from hafrm.alignment.rlhf.journal import RunJournal
from hafrm.alignment.rlhf.prompts import Prompt, Prompts, load_prompts, prompts_of_step
from hafrm.alignment.rlhf.recipe import RlhfRecipe
from hafrm.alignment.rlhf.rewards import Rewards, Scale, load_scorer
from hafrm.alignment.rlhf.watchdog import Watchdog
from hafrm.atomic import atomic_directory, atomic_write, fingerprint
from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.data.encoding import Encoder
from hafrm.data.sources import local_files
from hafrm.engine.model import HybridModel, sharing_obstacle, split_causal_lm
from hafrm.engine.sampling import Sampling
from hafrm.errors import ConfigError
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
    """What a finished run is."""

    folder: Path
    num_steps: int
    """Batches taken, fewer than asked for where the run was stopped."""
    best_step: int
    best: dict[str, float]
    """Held-out means of the exported step."""
    kept_by: str
    """The measure that picked it: gold, judge or penalised."""
    stopped: str | None
    """Why the run ended early, or None."""

    def to_json(self) -> str:
        """The text of result.json, which names no folder: it lies in it."""
        values = {name: value for name, value in asdict(self).items() if name != "folder"}
        return json.dumps(values, indent=1) + "\n"


@dataclass
class Best:
    """The best step so far and the measures it was picked by."""

    step: int = -1
    score: float = float("-inf")
    kept_by: str = "penalised"
    means: dict[str, float] | None = None


class Job:
    """One run in one process; the state that a checkpoint must hold is in `state` and `restore`."""

    def __init__(
        self, recipe: RlhfRecipe, run: RunFolder, gold: GoldReward | None, *, share: bool = True
    ) -> None:
        """Load everything that the recipe names; `share` False leaves the policy's attention alone."""
        self.recipe, self.run, self.gold = recipe, run, gold
        encoder = Encoder(load_tokenizer(recipe.model), max_length=_LONGEST)
        self.prompts: Prompts = load_prompts(
            recipe.data,
            encoder,
            seed=recipe.training.seed,
            bad_rows_file=run.path / "bad_rows.jsonl",
        )
        self.rewards = Rewards.load(recipe.reward)
        self.actor = load_actor(recipe, encoder, share=share)
        judge = recipe.evaluation.judge
        self.examination = Examination(
            self.prompts.held_out[: recipe.evaluation.prompts],
            self.rewards,
            judge=None if judge is None else load_scorer(judge),
            gold=gold,
            seed=_HELD_OUT_SEED + recipe.training.seed,
        )
        self.watchdog = Watchdog(recipe.watch)
        self.journal = RunJournal(run, recipe)
        self.best = Best()
        self.lengths: tuple[float, float] | None = None
        """(reward per token, tokens) of the start policy's held-out responses."""
        self.stopped: str | None = None
        self.last_kl = 0.0
        """Of the latest evaluation, nat per response."""

    def prompts_of_step(self, step: int) -> list[Prompt]:
        """What batch `step` (from 0) answers."""
        training = self.recipe.training
        per_step = training.batch_size // training.responses_per_prompt
        picks = prompts_of_step(len(self.prompts.train), step, per_step, training.seed)
        return [self.prompts.train[i] for i in picks]

    def reward(self, written: Sequence[Written]) -> NDArray[np.float32]:
        """One reward per response, by the recipe's models and rule."""
        prompts = [each.prompt.messages for each in written]
        each = self.rewards.each(prompts, [response.texts for response in written])
        return np.asarray(self.rewards.combine(each), np.float32)

    def gold_mean(self, written: Sequence[Written]) -> float | None:
        """The batch's mean gold reward, where it is known."""
        values = gold_rewards(self.gold, written)
        return None if values is None else float(values.mean())

    def batch(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write down a batch's numbers and let the watchdog look at them."""
        self.journal.batch(step, values)
        reward, kl, entropy = values["reward"], values["kl"], values["entropy"]
        assert reward is not None
        assert kl is not None
        assert entropy is not None
        self.stopped = self.watchdog.batch(reward=reward, kl=kl, entropy=entropy)

    def evaluate(self, step: int) -> bool:
        """Measure the policy on held-out prompts; True where this step is the best so far."""
        written = self.examination.write(self.actor)
        if self.lengths is None:
            texts = [each.texts for each in written]
            self.rewards.fit_scales([each.prompt.messages for each in written], texts)
        found = self.examination.take(self.actor, written)
        if self.lengths is None:
            slope = length_slope(found.rewards, found.lengths)
            self.lengths = slope, float(found.lengths.mean())
        self.last_kl = float(found.kls.mean())
        matched = length_matched(found.rewards, found.lengths, *self.lengths)
        score = float(found.measure(self.recipe.evaluation.kl_penalty).mean())
        best = score > self.best.score
        extra = {"length_matched_reward": float(matched.mean())}
        self.journal.held_out(step, found, best, extra)
        self._watch(found, matched)
        if best:
            means = {name: each.value for name, each in found.estimates().items()}
            means |= extra | {"kl": self.last_kl}
            self.best = Best(step, score, found.kept_by(), means)
        return best

    def _watch(self, found: HeldOut, matched: NDArray[np.float32]) -> None:
        known = {"gold reward": found.gold, "judge's reward": found.judged}
        known |= {"length-matched reward": matched}
        name, values = next((n, v) for n, v in known.items() if v is not None)
        proxy = float(found.rewards.mean())
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
            "kept_by": self.best.kept_by,
            "best": self.best.means,
            "lengths": self.lengths,
            "scales": [[scale.mean, scale.std] for scale in self.rewards.scales],
            "watchdog": self.watchdog.to_dict(),
            "stopped": self.stopped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.best = Best(state["best_step"], state["best_score"], state["kept_by"], state["best"])
        self.lengths = tuple(state["lengths"])
        self.rewards.scales = [Scale(*each) for each in state["scales"]]
        self.watchdog.restore(state["watchdog"])
        self.stopped = state["stopped"]

    def record_provenance(self) -> None:
        """Versions, seed, digests of local prompt files, and what became of the prompts."""
        data = self.recipe.data
        files = {f for entry in (*data.train, *data.validation) for f in local_files(entry)}
        self.run.record_provenance(
            seed=self.recipe.training.seed,
            data={str(file): fingerprint(file) for file in sorted(files) if file.is_file()},
            details={"counts": self.prompts.counts, "algorithm": self.recipe.algorithm.name},
        )

    def finish(self, num_steps: int) -> RlhfResult:
        """Export the policy as it is now, which must be the best step's; a finished run finds it done."""
        dtype = torch.bfloat16 if self.recipe.training.precision == "bf16" else torch.float32
        best = self.best
        assert best.means is not None
        result = RlhfResult(
            self.run.path, num_steps, best.step, best.means, best.kept_by, self.stopped
        )
        atomic_write(self.run.path / "result.json", result.to_json())
        if not self.run.model_path.is_dir():
            with atomic_directory(self.run.model_path) as aside:
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
