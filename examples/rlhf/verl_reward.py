"""A hafrm reward model for verl, and the Parquet files that it needs.

    python examples/rlhf/verl_reward.py prompts.jsonl train.parquet     # prompts into verl's columns
    HAFRM_REWARD=runs/haf python -m verl.trainer.main_ppo \\
        reward.custom_reward_function.path=examples/rlhf/verl_reward.py \\
        reward.custom_reward_function.name=compute_score ...

verl hands a reward function the response without its prompt, so the prompt travels in `extra_info`. Before
verl 0.7 the two options are called custom_reward_function.path and .name.
"""

import os
import sys
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hafrm.data.reader import read_preferences
from hafrm.rlhf.adapters import verl_score
from hafrm.rlhf.rewards import Rewards
from hafrm.rlhf.rlhf_recipe import RewardSection


@cache
def _score() -> Any:
    models = tuple(os.environ["HAFRM_REWARD"].split(","))
    return verl_score(Rewards.load(RewardSection(models=models)))


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """What verl calls for every response."""
    score: dict[str, float] = _score()(
        data_source, solution_str, ground_truth, extra_info, **kwargs
    )
    return score


def write_parquet(prompts: str, out: str) -> int:
    """Rows of verl's columns, one for each prompt; returns how many."""
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
