"""`train_policy`: train a policy against reward models, by the PPO loop in this module or by TRL.

Prompts, samples and the order of updates follow from (seed, step) alone: a resumed run of PPO repeats the
batches that an uninterrupted one would have taken, bit for bit on a CPU.
"""

import importlib.util
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.errors import CheckpointError, ConfigError
from hafrm.results import from_plain
from hafrm.rlhf.ppo_terms import Moments, next_kl_coefficient, scores_of
from hafrm.rlhf.ppo_update import PolicyWithValue, advantages_of, measure_rollouts, update
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from hafrm.rlhf.rlhf_run import RlhfResult, RlhfRun
from hafrm.rlhf.trl_runs import run_trl
from hafrm.scoring.model_files import default_device
from hafrm.training import parallel
from hafrm.training.checkpoint import load_checkpoint, load_weights, open_run, save_checkpoint
from hafrm.training.loop import StoppedError
from hafrm.training.parallel import StopSignal
from hafrm.training.setup import with_precision
from hafrm.training.step import build_optimizer, learning_rate, memory_errors

log = logging.getLogger("hafrm")
_SAMPLES = 2**16  # each batch has its own sampling seed: seed * this + step


def train_policy(
    recipe: RlhfRecipe, folder: Path, *, resume: bool = False, gold: GoldReward | None = None
) -> RlhfResult:
    """Train a policy as the recipe says; returns once the best step is exported to `model/policy`.

    `gold` is the known truth, if there is one: it is logged and selects the best step, but is never trained
    on. Raises NumericsError before an update with numbers that are not finite, CheckpointError for a folder
    that cannot be resumed, StoppedError after a signal.
    """
    native = recipe.algorithm.name == "ppo"
    if resume and not native:
        raise CheckpointError(
            f"algorithm {recipe.algorithm.name} runs on TRL, whose checkpoints are pickles, so it keeps "
            "none: give another --out, or take algorithm ppo"
        )
    if not native and importlib.util.find_spec("trl") is None:
        raise ConfigError(
            f"algorithm.name {recipe.algorithm.name} runs on TRL, which is not installed: "
            "pip install 'hafrm[rlhf]', or take algorithm ppo"
        )
    if parallel.start().size > 1:
        raise ConfigError(
            "hafrm rlhf runs in one process, and several were started: docs/rlhf.md says how to use the "
            "reward model from OpenRLHF, verl or TRL on several GPUs"
        )
    recipe = with_precision(recipe, default_device().type)
    with open_run(recipe, folder, resume=resume) as run:
        torch.manual_seed(recipe.training.seed)
        # TRL runs the backbone itself, in the attention that transformers gave it
        rlhf = RlhfRun(recipe, run, gold, share=native)
        rlhf.record_provenance()
        return Ppo(rlhf).train(resume=resume) if native else run_trl(rlhf)


class Ppo:
    """One PPO run: what all runs share, what is trained, and the state between batches."""

    def __init__(self, rlhf: RlhfRun) -> None:
        self.rlhf, self.recipe = rlhf, rlhf.recipe
        self.policy = PolicyWithValue(rlhf.actor.model)
        algorithm = self.recipe.algorithm
        self.optimizer = build_optimizer(self.policy.model)
        head = {"params": [self.policy.value_head.weight], "weight_decay": 0.0}
        self.optimizer.add_param_group(head | {"rate": algorithm.value_rate})
        self.kl_coefficient = algorithm.kl_coefficient
        self.moments = Moments()

    def train(self, *, resume: bool) -> RlhfResult:
        """Continue the run from its current step until its policy is exported."""
        rlhf, num_steps = self.rlhf, self.recipe.training.steps
        step = self._resume() if resume else None
        smaller = f"training.max_tokens={self.recipe.training.max_tokens // 2}"
        command = f"hafrm rlhf --resume {rlhf.folder.path}"
        stop = StopSignal()
        with stop, rlhf.log:
            if step is None:
                rlhf.evaluate(0)
                self._save(step := 0)
            while step < num_steps and rlhf.result.stopped is None:
                with memory_errors(f"batch {step + 1}", f"{command} {smaller}"):
                    self._take_batch(step)
                step += 1
                improved = rlhf.is_due(step, self.recipe.evaluation.every) and rlhf.evaluate(step)
                stopping = bool(stop.received)
                if improved or stopping or rlhf.is_due(step, self.recipe.checkpoint.every):
                    self._save(step)
                if stopping and step < num_steps and rlhf.result.stopped is None:
                    raise StoppedError(
                        f"stopped by signal {stop.received} after step {step} of {num_steps}; resume "
                        f"with: {command}"
                    )
        best_step = rlhf.result.best_step
        if best_step != step:
            load_weights(rlhf.folder.checkpoint_path(best_step), self.policy)
        return rlhf.finish(step)

    def _take_batch(self, step: int) -> None:
        """Sample, reward, measure, and take all updates of the batch."""
        training, algorithm, rlhf = self.recipe.training, self.recipe.algorithm, self.rlhf
        rate = learning_rate(training, step, training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
        prompts, seed = rlhf.prompts_of_step(step), training.seed * _SAMPLES + step
        rollouts = rlhf.actor.write(prompts, training.responses_per_prompt, seed)
        device = self.policy.model.device
        messages = [r.prompt.messages for r in rollouts]
        rewards = torch.from_numpy(rlhf.reward(messages, [r.texts for r in rollouts])).to(device)
        ended = torch.tensor([end for r in rollouts for end in r.ended], device=device)
        measured = measure_rollouts(self.policy, rlhf.actor, rollouts)
        self.moments = self.moments.including(rewards)
        scores = scores_of(rewards, ended, self.moments, self.recipe.reward)
        targets = advantages_of(measured, scores, algorithm, self.kl_coefficient)
        metrics = update(
            self.policy,
            self.optimizer,
            measured,
            targets,
            algorithm,
            rlhf.actor,
            seed=(training.seed, step),
            max_grad_norm=training.max_grad_norm,
        )
        kl = float(measured.kls.mean())
        values = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(unbiased=False)),
            "length": float(measured.lengths.float().mean()),
            "ended": float(ended.float().mean()),
            "entropy": float(measured.entropies.mean()),
            **metrics,
            "kl": kl,
            "kl_coefficient": self.kl_coefficient,
            "learning_rate": rate,
        }
        self.kl_coefficient = next_kl_coefficient(
            self.kl_coefficient, kl, training.batch_size, algorithm.kl_target, algorithm.kl_horizon
        )
        rlhf.log_batch(step + 1, values)

    def _save(self, step: int) -> None:
        run, folder = self.rlhf.result, self.rlhf.folder
        state: dict[str, Any] = {"run": asdict(run), "moments": asdict(self.moments)}
        state |= {"kl_coefficient": self.kl_coefficient, "batches": self.rlhf.batches}
        save_checkpoint(folder, step, self.policy, self.optimizer, state)
        folder.prune(keep=self.recipe.checkpoint.keep, protect=[run.best_step])

    def _resume(self) -> int | None:
        """Restore the last checkpoint and return its step; None if there is none."""
        folder = self.rlhf.folder.latest_checkpoint()
        if folder is None:
            self.rlhf.folder.truncate_after(-1)
            return None
        state = load_checkpoint(folder, self.policy, self.optimizer)
        self.rlhf.result = from_plain(RlhfResult, state["run"])
        self.kl_coefficient = state["kl_coefficient"]
        self.moments = Moments(**state["moments"])
        self.rlhf.batches = state["batches"]
        step = int(state["step"])
        self.rlhf.folder.truncate_after(step)
        log.info("resuming after step %d of %d", step, self.recipe.training.steps)
        return step
