"""A hafrm reward model as a reward function of OpenRLHF.

    HAFRM_REWARD=runs/haf python -m openrlhf.cli.train_ppo_ray \\
        --reward.remote_url examples/rlhf/openrlhf_reward.py --data.label_key label ...

OpenRLHF passes texts with the control tokens of the policy's template. So the label of each row must be
the prompt's messages as JSON: then the policy's tokenizer and the reward model's may differ.
"""

import json
import os
import re
from functools import cache

import torch

from hafrm import RewardModel


@cache
def reward_model() -> RewardModel:
    """The reward model, loaded at the first call."""
    return RewardModel.from_pretrained(os.environ["HAFRM_REWARD"])


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, object]:
    """What OpenRLHF calls when --reward.remote_url names this file; a query is prompt and response."""
    model = reward_model()
    tokenizer = model.encoder.tokenizer
    # EOS and padding follow a response
    end = f"(?:{re.escape(tokenizer.eos_token)}|{re.escape(tokenizer.pad_token)})*$"
    responses = [
        re.sub(end, "", query.removeprefix(prompt).strip(" "))
        for query, prompt in zip(queries, prompts, strict=True)
    ]
    messages = [json.loads(label) for label in labels]
    scores = model.score_batch(messages, [[response] for response in responses])
    rewards = torch.tensor([own[0] for own in scores])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"hafrm_reward": rewards}}
