"""A hafrm reward model for verl, and the Parquet files that it needs.

    python examples/rlhf/verl_reward.py prompts.jsonl train.parquet     # prompts into verl's columns
    HAFRM_REWARD=runs/haf python -m verl.trainer.main_ppo \\
        reward.custom_reward_function.path=examples/rlhf/verl_reward.py \\
        reward.custom_reward_function.name=compute_score ...

verl passes the response to a reward function without its prompt, so the prompt is in `extra_info`. Before
verl 0.7 the two options are called custom_reward_function.path and .name. With HAFRM_IMPLICIT_WEIGHT the
same forward pass also gives the implicit reward: verl.sh makes it a second reward (GDPO).
"""

import os
import sys
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hafrm.data.reader import read_preferences
from hafrm.rlhf.rlhf_run import by_name, load_rewards, score_texts
from hafrm.scoring.reward_model import Scorer


@cache
def reward_model() -> Scorer:
    """The reward model, loaded at the first call."""
    weight = float(os.environ.get("HAFRM_IMPLICIT_WEIGHT", "0"))
    return load_rewards(os.environ["HAFRM_REWARD"], weight)


def compute_score(solution_str: str, extra_info: dict[str, Any], **_: Any) -> dict[str, float]:
    """The function that verl calls for every response; Parquet returns the messages as an array."""
    rewards, _ = score_texts(reward_model(), [list(extra_info["prompt"])], [[solution_str]])
    values = {name: float(own[0]) for name, own in by_name(rewards).items()}
    return {"score": values["reward"], **values}


def write_parquet(prompts: str, out: str) -> int:
    """Write rows with verl's columns, one for each prompt; returns how many."""
    groups = read_preferences([prompts], need_responses=False).groups
    rows = []
    for group in groups:
        messages = [message._asdict() for message in group.prompt]
        rows.append(
            {
                "data_source": group.source,
                "prompt": messages,
                "reward_model": {"style": "model", "ground_truth": ""},
                "extra_info": {"prompt": messages, "id": group.id},
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), out)
    return len(rows)


if __name__ == "__main__":
    print(write_parquet(*sys.argv[1:]), "prompts written")
