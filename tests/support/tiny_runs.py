"""A tiny base model, tiny preference data and recipes, on disk, so that a whole run takes seconds."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe
from support.chat_tokenizers import chat_tokenizer
from support.models import llama_config

WORDS = ["sun", "sea", "tree", "boat", "bird", "rain", "song", "moon", "leaf", "hill"]


def write_base(folder: Path, *, tied: bool = False, width: int = 32) -> Path:
    """A random Llama with a chat tokenizer, as `model.path` wants it."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    config = llama_config(
        tokenizer,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    base = folder / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    return base


def write_preferences(file: Path, num: int = 40, start: int = 0) -> Path:
    """Prompts about words; the chosen response repeats the word, the rejected one rambles."""
    rows = [
        {
            "prompt": f"Say {WORDS[i % 10]} number {i}." + " Please." * (i % 5),
            "chosen": f"Here you are: {WORDS[i % 10]}.",
            "rejected": f"I would say {WORDS[(i * 7 + 3) % 10]} " + "and so on " * (1 + i % 4),
        }
        for i in range(start, start + num)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tiny_recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """A run of 6 steps of 4 comparisons; sections are merged over these defaults."""
    base = folder / "base"
    if not base.is_dir():
        write_base(folder)
    data = folder / "train.jsonl"
    if not data.is_file():
        write_preferences(data)
    values: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"train": [str(data)], "validation_fraction": 0.2, "max_length": 64},
        "method": {"name": "haf"},
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "max_tokens": 256},
        "evaluation": {"every": 3},
        "checkpoint": {"every": 2},
        "tracking": {"log_every": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build_recipe(values)
