"""A tiny policy, a tiny reward model and prompts, on disk, so that a whole RLHF run takes seconds."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from hafrm.recipe_file import build_as
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from support.exports import save_stock_classifier
from support.tiny_runs import WORDS, write_base


def write_reward(
    folder: Path,
    name: str = "reward",
    seed: int = 1,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A random sequence classifier with one label; by default with the policy's tokenizer."""
    save_stock_classifier(folder / name, tokenizer, seed, std=1.0)
    return folder / name


def write_prompts(file: Path, num: int = 24) -> Path:
    rows = [{"prompt": f"Say {WORDS[i % 10]} number {i}."} for i in range(num)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tiny_rlhf(folder: Path, **sections: dict[str, Any]) -> RlhfRecipe:
    """Four batches of 8 responses; sections are merged over these defaults."""
    if not (folder / "base").is_dir():
        write_base(folder)
    if not (folder / "reward").is_dir():
        write_reward(folder)
    if not (folder / "prompts.jsonl").is_file():
        write_prompts(folder / "prompts.jsonl")
    values: dict[str, Any] = {
        "model": {"path": str(folder / "base")},
        "data": {"train": [str(folder / "prompts.jsonl")], "validation_fraction": 0.3}
        | {"max_prompt_length": 40},
        "reward": {"model": str(folder / "reward")},
        "sampling": {"max_new_tokens": 6},
        "algorithm": {"epochs": 2, "mini_batches": 2},
        "training": {"steps": 4, "batch_size": 8, "responses_per_prompt": 2}
        | {"learning_rate": 1e-3, "max_tokens": 128},
        "evaluation": {"every": 2, "prompts": 4},
        "checkpoint": {"every": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build_as(RlhfRecipe, values)
