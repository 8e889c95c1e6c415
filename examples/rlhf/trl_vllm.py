"""GRPO or RLOO with TRL's trainers, vLLM writing the completions and a hafrm reward model scoring them.

    HAFRM_REWARD=runs/haf accelerate launch examples/rlhf/trl_vllm.py POLICY prompts.jsonl OUT
    trl vllm-serve --model POLICY        # on other GPUs, with VLLM_MODE=server; colocate needs no server

Within one process and without vLLM, `hafrm rlhf` does the same and watches the run.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from hafrm import RewardModel
from hafrm.data.reader import read_preferences


def reward_function(path: str) -> Callable[..., list[float]]:
    """The reward model as TRL asks for it."""
    model = RewardModel.from_pretrained(path)

    def hafrm_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        answers = [[completion[-1]["content"]] for completion in completions]
        # the prompt of several completions is laid out once
        return [own[0] for own in model.score_batch(prompts, answers)]

    return hafrm_reward


def options(out: str) -> dict[str, Any]:
    """TRL's options: 8 completions of a prompt, a KL price, vLLM on the training GPUs or on a server."""
    return {
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
        reward_funcs=reward_function(os.environ["HAFRM_REWARD"]),
        args=GRPOConfig(**options(out)),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
