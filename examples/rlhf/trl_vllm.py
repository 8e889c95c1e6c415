"""GRPO or RLOO with TRL's trainers, vLLM writing the completions and a hafrm reward model scoring them.

    HAFRM_REWARD=runs/haf accelerate launch examples/rlhf/trl_vllm.py POLICY prompts.jsonl OUT
    trl vllm-serve --model POLICY        # on other GPUs, with VLLM_MODE=server; colocate needs no server

Within one process and without vLLM, `hafrm rlhf` does the same and watches the run.
"""

import os
import sys
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from hafrm.data.reader import read_preferences
from hafrm.rlhf.adapters import trl_reward
from hafrm.rlhf.rewards import Rewards
from hafrm.rlhf.rlhf_recipe import RewardSection


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
    models = tuple(os.environ["HAFRM_REWARD"].split(","))
    groups = read_preferences([prompts], need_responses=False).groups
    rows = [{"prompt": [message._asdict() for message in group.prompt]} for group in groups]
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=trl_reward(Rewards.load(RewardSection(models=models))),
        args=GRPOConfig(**options(out)),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
