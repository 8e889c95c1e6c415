"""GRPO or RLOO with TRL's trainers; vLLM generates the completions and a hafrm reward model scores them.

    HAFRM_REWARD=runs/haf accelerate launch examples/rlhf/trl_vllm.py POLICY prompts.jsonl OUT
    trl vllm-serve --model POLICY        # on other GPUs, with VLLM_MODE=server; colocate needs no server

For a run with both heads, HAFRM_IMPLICIT_WEIGHT=0.5 makes the implicit reward a second one (GDPO).
In one process and without vLLM, `hafrm rlhf` does the same and watches the run.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset

from hafrm.data.reader import read_preferences
from hafrm.rlhf.rlhf_run import by_name, load_rewards, score_texts

WEIGHT = float(os.environ.get("HAFRM_IMPLICIT_WEIGHT", "0"))


def reward_functions(
    path: str, implicit_weight: float = WEIGHT
) -> list[Callable[..., list[float]]]:
    """The reward model as TRL's reward functions: one reward, or both from one forward pass."""
    model, scored = load_rewards(path, implicit_weight), dict[str, np.ndarray]()

    def hafrm_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        answers = [[completion[-1]["content"]] for completion in completions]
        # the prompt of several completions is laid out once
        scored.update(by_name(score_texts(model, prompts, answers)[0]))
        return scored["reward"].tolist()

    def hafrm_implicit(**_: Any) -> list[float]:
        return scored["implicit"].tolist()  # TRL calls this function second

    return [hafrm_reward, hafrm_implicit] if implicit_weight else [hafrm_reward]


def options(out: str) -> dict[str, Any]:
    """TRL's options: 8 completions per prompt, a KL penalty, vLLM on the training GPUs or on a server."""
    gdpo = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, WEIGHT]}
    return (gdpo if WEIGHT else {}) | {
        "output_dir": out,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 8,
        "num_generations": 8,
        "max_completion_length": 512,
        "beta": 0.02,
        "learning_rate": 1e-6,
        "max_steps": 500,
        "logging_steps": 1,
        "bf16": True,
        "use_vllm": True,
        "vllm_mode": os.environ.get("VLLM_MODE", "colocate"),
        "save_strategy": "steps",
        "save_steps": 50,
    }


def main(policy: str, prompts: str, out: str) -> None:
    """Train."""
    from trl import GRPOConfig, GRPOTrainer  # noqa: PLC0415 - the rest runs without TRL

    groups = read_preferences([prompts], need_responses=False).groups
    rows = [{"prompt": [message._asdict() for message in group.prompt]} for group in groups]
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward_functions(os.environ["HAFRM_REWARD"]),
        args=GRPOConfig(**options(out)),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
