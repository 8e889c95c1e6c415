"""What the scoring benchmarks share: a reward model of 6 layers and width 384, and its FLOPs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hafrm.data.encoding import Encoder
from hafrm.engine.layout import Branches
from hafrm.engine.model import new_reward_head

WIDTH, LAYERS, HEADS, INNER = 384, 6, 6, 1024
POSITIONS = 2048


def write_reward_model(encoder: Encoder, folder: Path) -> Path:
    """A stock reward directory with random weights, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        pad_token_id=encoder.pad_id,
        eos_token_id=encoder.eos_id,
        num_labels=1,
        problem_type="regression",
    )
    model = LlamaForSequenceClassification(config)
    model.score = new_reward_head(WIDTH, torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    encoder.export_tokenizer(folder)
    return folder


def forward_flops(groups: Sequence[Branches], *, shared: bool) -> float:
    """Useful FLOPs of a reward for every response: products and the causal half of attention.

    Shared, a prompt counts once for all responses to it; else once for each. Of the last layer only keys
    and values are needed of every token; queries, output and MLP count for last tokens alone.
    """
    attention, mlp = WIDTH * WIDTH, 3 * WIDTH * INNER
    by_prompt: dict[bytes, list[int]] = {}
    for group in groups:
        lengths = by_prompt.setdefault(group.prompt_ids.tobytes(), [])
        lengths += [len(ids) for ids in group.response_ids]
    total = 0.0
    for ids, lengths in by_prompt.items():
        prompt = len(ids) // groups[0].prompt_ids.itemsize
        repeats = 1 if shared else len(lengths)
        tokens = repeats * prompt + sum(lengths)
        pairs = repeats * prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in lengths)
        total += (LAYERS - 1) * (2 * (4 * attention + mlp) * tokens + 4 * WIDTH * pairs)
        total += 2 * 2 * attention * tokens  # the last layer's keys and values
        ends = sum(prompt + n for n in lengths)
        total += 2 * (2 * attention + mlp) * len(lengths) + 4 * WIDTH * ends
    return total
