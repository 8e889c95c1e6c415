"""PPO, top to bottom: sample, reward, measure, update; then evaluate and save.

Every number of a run follows from its recipe and data: a resumed run repeats the batches that an
uninterrupted one would have taken, bit for bit on a CPU, since prompts, samples and the order of updates
follow from (seed, step) alone.
"""

import logging
from dataclasses import asdict
from typing import Any

import torch

from hafrm.engine.packing import is_out_of_memory
from hafrm.errors import MemoryBudgetError
from hafrm.rlhf.ppo_terms import Moments, missing_eos_scores, next_kl_coefficient, scores_of
from hafrm.rlhf.ppo_update import PolicyWithValue, advantages_of, measure_rollouts, update
from hafrm.rlhf.rlhf_run import RlhfResult, RlhfRun
from hafrm.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from hafrm.training.loop import StoppedError
from hafrm.training.runtime import StopSignal, learning_rate
from hafrm.training.step import build_optimizer

log = logging.getLogger("hafrm")
_SAMPLES = 2**16  # batches have sampling seeds of their own: seed * this + step


class Ppo:
    """One PPO run: what all runs share, what is trained, and what is remembered between batches."""

    def __init__(self, rlhf: RlhfRun) -> None:
        self.rlhf, self.recipe = rlhf, rlhf.recipe
        self.policy = PolicyWithValue(rlhf.actor.model)
        training, algorithm = self.recipe.training, self.recipe.algorithm
        self.optimizer = build_optimizer(
            self.policy.model, weight_decay=0.0, betas=training.betas, eps=training.eps
        )
        head = {"params": [self.policy.value_head.weight], "weight_decay": 0.0}
        self.optimizer.add_param_group(head | {"rate": algorithm.value_rate})
        self.kl_coefficient = algorithm.kl_coefficient
        self.moments = Moments()

    def train(self, *, resume: bool) -> RlhfResult:
        """The run from wherever it stands to its exported policy.

        Raises NumericsError before an update that would follow a number that is not finite, StoppedError
        after a signal, when the state has been saved.
        """
        rlhf, num_steps = self.rlhf, self.recipe.training.steps
        step = self._resume() if resume else None
        stop = StopSignal()
        with stop, rlhf.log:
            if step is None:
                rlhf.evaluate(0)
                self._save(step := 0)
            while step < num_steps and rlhf.stopped is None:
                self._batch(step)
                step += 1
                improved = rlhf.is_due(step, self.recipe.evaluation.every) and rlhf.evaluate(step)
                stopping = bool(stop.received)
                if improved or stopping or rlhf.is_due(step, self.recipe.checkpoint.every):
                    self._save(step)
                if stopping and step < num_steps and rlhf.stopped is None:
                    raise StoppedError(
                        f"stopped by signal {stop.received} after step {step} of {num_steps}; resume "
                        f"with: hafrm rlhf --resume {rlhf.folder.path}"
                    )
        if rlhf.best.step != step:
            load_weights(rlhf.folder.checkpoint_path(rlhf.best.step), self.policy)
        return rlhf.finish(step)

    def _batch(self, step: int) -> None:
        """One batch; raises MemoryBudgetError where it does not fit, with how to resume."""
        try:
            self._take_batch(step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            what = str(error).split("\n", 1)[0]
            budget = self.recipe.training.max_tokens
            raise MemoryBudgetError(
                f"batch {step + 1} ran out of memory ({what}). Resume from the last checkpoint with: hafrm "
                f"rlhf --resume {self.rlhf.folder.path} training.max_tokens={budget // 2}; or set "
                "training.gradient_checkpointing: true, or write fewer responses at a time "
                "(sampling.batch_size)"
            ) from error

    def _take_batch(self, step: int) -> None:
        """Sample, reward, measure, and take all updates that the batch is good for."""
        training, algorithm, rlhf = self.recipe.training, self.recipe.algorithm, self.rlhf
        rate = learning_rate(training, step, training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
        rollouts = rlhf.actor.write(
            rlhf.prompts_of_step(step),
            training.responses_per_prompt,
            seed=training.seed * _SAMPLES + step,
        )
        rewards = torch.from_numpy(rlhf.reward(rollouts)).to(self.policy.device)
        measured = measure_rollouts(self.policy, rlhf.actor, rollouts)
        self.moments = self.moments.including(rewards)
        scores = missing_eos_scores(
            scores_of(rewards, self.moments, self.recipe.reward),
            measured.ended,
            self.recipe.reward.missing_eos_penalty,
        )
        stats = update(
            self.policy,
            self.optimizer,
            measured,
            advantages_of(measured, scores, algorithm, self.kl_coefficient),
            algorithm,
            rlhf.actor,
            seed=(training.seed, step),
            max_grad_norm=training.max_grad_norm,
        )
        kl = float(measured.kls.mean())
        values = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(unbiased=False)),
            "gold": rlhf.gold_mean(rollouts),
            "length": float(measured.lengths.float().mean()),
            "ended": float(measured.ended.float().mean()),
            "entropy": float(measured.entropies.mean()),
            **asdict(stats),
            "score": float(scores.mean()),
            "kl": kl,
            "kl_coefficient": self.kl_coefficient,
            "learning_rate": rate,
        }
        self.kl_coefficient = next_kl_coefficient(
            self.kl_coefficient,
            kl,
            training.batch_size,
            target=algorithm.kl_target,
            horizon=algorithm.kl_horizon,
        )
        rlhf.log_batch(step + 1, values)

    def _save(self, step: int) -> None:
        state: dict[str, Any] = self.rlhf.state()
        state |= {"kl_coefficient": self.kl_coefficient, "moments": asdict(self.moments)}
        save_checkpoint(self.rlhf.folder, step, self.policy, self.optimizer, state)
        self.rlhf.folder.prune(keep=self.recipe.checkpoint.keep, protect=[self.rlhf.best.step])

    def _resume(self) -> int | None:
        """The step of the last checkpoint, its state in place; None where there is none."""
        folder = self.rlhf.folder.latest_checkpoint()
        if folder is None:
            self.rlhf.folder.truncate_after(-1)
            return None
        state = load_checkpoint(folder, self.policy, self.optimizer)
        self.rlhf.restore(state)
        self.kl_coefficient = state["kl_coefficient"]
        self.moments = Moments(**state["moments"])
        self.rlhf.folder.truncate_after(state["step"])
        log.info("resuming after step %d of %d", state["step"], self.recipe.training.steps)
        return int(state["step"])
