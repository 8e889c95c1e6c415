"""RLOO and GRPO on TRL's trainers, with our rewards, our held-out measures and our rules for stopping.

TRL samples, computes the loss and steps; all completions of a prompt are scored in one shared layout.
TRL's checkpoints are pickles, so none are written: the best weights wait in memory and are exported.
"""

import copy
import importlib
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from hafrm.errors import DataError
from hafrm.rlhf.actor import Prompt
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from hafrm.rlhf.rlhf_run import RlhfResult, RlhfRun, by_name
from hafrm.training.checkpoint import trainable_weights

log = logging.getLogger("hafrm")


def run_trl(rlhf: RlhfRun) -> RlhfResult:
    """Train with RLOO or GRPO as the run's recipe says."""
    from datasets import Dataset  # noqa: PLC0415 - TRL takes seconds to load

    name, weight = rlhf.recipe.algorithm.name.upper(), rlhf.recipe.reward.implicit_weight
    if ignored := rlhf.recipe.ppo_keys:
        log.warning("%s does not read %s", rlhf.recipe.algorithm.name, ", ".join(ignored))
    rlhf.evaluate(0)
    watcher = _Watcher(rlhf)
    prompts = usable_prompts(rlhf)
    rows = [{"prompt": [m._asdict() for m in p.messages]} for p in prompts]
    # TRL takes no step at all with fewer prompts than a batch has
    training = rlhf.recipe.training
    rows *= -(-training.batch_size // (training.responses_per_prompt * len(rows)))
    causal = rlhf.actor.causal
    with rlhf.log, tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # warnings of renames between TRL and transformers, which users cannot fix
        warnings.simplefilter("ignore", FutureWarning)
        trl: Any = importlib.import_module("trl")
        config = getattr(trl, f"{name}Config")
        trainer = getattr(trl, f"{name}Trainer")(
            model=causal,
            reward_funcs=[watcher.reward, watcher.implicit] if weight else watcher.reward,
            # options that the recipe does not set keep TRL's defaults
            args=config(output_dir=scratch, **trl_options(rlhf.recipe)),
            train_dataset=Dataset.from_list(rows),
            processing_class=trl_tokenizer(rlhf),
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)  # our own log has it
        if getattr(trainer, "ref_model", None) is not None:
            start_reference(trainer.ref_model, causal)
        trainer.train()
    parameters = dict(rlhf.actor.model.named_parameters())
    with torch.no_grad():
        for key, value in watcher.best.items():
            parameters[key].copy_(value)
    return rlhf.finish(watcher.step)


def start_reference(reference: nn.Module, policy: nn.Module) -> None:
    """Give TRL's reference the start policy's weights. TRL loads it from the path in the config, which says
    nothing of adapters that were merged into the start, nor of its revision."""
    start = policy.state_dict()  # adapters are still zero
    named = {n.replace(".base_layer.", "."): v for n, v in start.items() if ".lora_" not in n}
    reference.load_state_dict(named)


def trl_options(recipe: RlhfRecipe) -> dict[str, Any]:
    """The recipe as TRL's options; several updates on a batch are one of our steps."""
    training, algorithm, sampling = recipe.training, recipe.algorithm, recipe.sampling
    micro, gdpo = micro_batch(recipe), {}
    if weight := recipe.reward.implicit_weight:  # GDPO (arXiv 2601.05242), in TRL's words
        gdpo = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1, weight]}
    return gdpo | {
        "max_steps": training.steps * algorithm.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": training.batch_size // micro,
        "num_generations": training.responses_per_prompt,
        "num_iterations": algorithm.epochs,
        "epsilon": algorithm.clip,
        "beta": algorithm.kl_coefficient,
        "max_completion_length": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule.replace("constant", "constant_with_warmup"),
        "warmup_steps": round(training.warmup_fraction * training.steps * algorithm.epochs),
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "bf16": training.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": training.gradient_checkpointing,
        "logging_steps": algorithm.epochs,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def micro_batch(recipe: RlhfRecipe) -> int:
    """Responses per forward: the largest divisor of the batch that fits into training.max_tokens padded."""
    longest = recipe.data.max_prompt_length + recipe.sampling.max_new_tokens
    most = max(1, recipe.training.max_tokens // longest)
    size = recipe.training.batch_size
    return next(n for n in range(min(most, size), 0, -1) if size % n == 0)


def trl_tokenizer(rlhf: RlhfRun) -> PreTrainedTokenizerFast:
    """The policy's tokenizer, whose EOS is the token that ends a turn: TRL masks what follows."""
    tokenizer = copy.deepcopy(rlhf.actor.encoder.tokenizer)
    end = rlhf.actor.turn_ends[0]
    if end != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def usable_prompts(rlhf: RlhfRun) -> list[Prompt]:
    """The prompts for which TRL's rendering gives the same ids as ours; DataError if there are none."""
    tokenizer, usable = trl_tokenizer(rlhf), []
    for prompt in rlhf.train_prompts:
        messages, ours = [m._asdict() for m in prompt.messages], prompt.ids.tolist()
        # TRL renders one text: a control token that a user typed would act as one
        rendered: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        rest = str(tokenizer.decode(rendered[len(ours) :]))  # blanks before the answer may differ
        if rendered[: len(ours)] == ours and not rest.strip():
            usable.append(prompt)
    if not usable:
        raise DataError(
            "TRL's rendering of every prompt differs from ours (control tokens in the text, or another "
            "generation prompt than stands before answers): fix the template, or take algorithm ppo"
        )
    num_lost = len(rlhf.train_prompts) - len(usable)
    if num_lost:
        log.warning("%d prompts hold control tokens and are left out under TRL", num_lost)
    return usable


class _Watcher(TrainerCallback):
    """TRL's callback: logs, evaluates, keeps the best weights, and stops a run that diverges."""

    def __init__(self, rlhf: RlhfRun) -> None:
        self.rlhf, self.step = rlhf, 0
        self.best: dict[str, Tensor] = trainable_weights(rlhf.actor.model)
        self._rewards: list[NDArray[np.float32]] = []

    def reward(
        self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """One reward per completion, minus the penalty of an unfinished one."""
        actor = self.rlhf.actor
        read = [actor.encoder.read_response(ids, actor.turn_ends) for ids in completion_ids]
        # the prompt of several completions is still laid out only once
        self._rewards.append(self.rlhf.reward(prompts, [[text] for text, _ in read]))
        rewards = by_name(self._rewards[-1])["reward"].tolist()
        penalty = self.rlhf.recipe.reward.missing_eos_penalty
        return [r - penalty * (not end) for r, (_, end) in zip(rewards, read, strict=True)]

    def implicit(self, **_: Any) -> list[float]:
        """The second reward; `reward`, which TRL calls first, has just computed both in one forward."""
        return [*by_name(self._rewards[-1])["implicit"].tolist()]

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:  # noqa: ARG002
        logs = values.get("logs") or {}
        if "reward" not in logs:
            return  # the summary at the end
        self.step += 1
        self.rlhf.log_batch(self.step, self._values(logs))
        due = self.rlhf.is_due(self.step, self.rlhf.recipe.evaluation.every)
        if due and self.rlhf.evaluate(self.step):
            self.best = trainable_weights(self.rlhf.actor.model)
        control.should_training_stop |= self.rlhf.result.stopped is not None

    def _values(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """TRL's numbers under our names; its KL is per token, ours per response."""
        length = float(logs["completions/mean_length"])
        rewards = by_name(np.concatenate(self._rewards))
        self._rewards = []
        return {name: float(own.mean()) for name, own in rewards.items()} | {
            "reward_std": float(rewards["reward"].std()),
            # without a KL penalty TRL computes no KL: use that of the last evaluation
            "kl": float(logs["kl"]) * length if "kl" in logs else self.rlhf.last_kl,
            "length": length,
            "ended": 1.0 - float(logs["completions/clipped_ratio"]),
            "entropy": float(logs["entropy"]),
            "clip_fraction": float(logs["clip_ratio/region_mean"]),
            "policy_loss": float(logs["loss"]),
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": float(logs["learning_rate"]),
        }
