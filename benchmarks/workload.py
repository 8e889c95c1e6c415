"""What all contenders of the training benchmark share: the same comparisons, ids and model.

A workload is a fixed window of comparisons of a data set, encoded once, and a model shape with random
weights. Nothing here times anything.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from hafrm.data.encoding import Encoder
from hafrm.data.reader import read_preferences
from hafrm.preferences import Group, TokenizedGroup
from hafrm.training.batches import ComparisonOrder

BATCH = 16
"""Comparisons of an optimiser step."""

SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "small": (
        LlamaConfig,
        {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
        },
    ),
    "tiny": (
        LlamaConfig,
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
    "phi-2": (
        PhiConfig,
        {
            "vocab_size": 51200,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "partial_rotary_factor": 0.4,
        },
    ),
    "mistral-7b": (
        MistralConfig,
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": None,
        },
    ),
}
"""Model shapes by name; the last two are those of the paper's models, with random weights."""


@dataclass(frozen=True)
class Workload:
    """The comparisons that are trained on, and the model that is."""

    name: str
    encoder: Encoder
    groups: list[Group]
    encoded: list[TokenizedGroup]
    """Groups that hold the window's comparisons and no others."""
    config: PretrainedConfig
    steps: int
    max_tokens: int
    """Budget of one of our micro-batches."""
    device: torch.device
    lora_rank: int | None = None

    @property
    def num_comparisons(self) -> int:
        return self.steps * BATCH

    def causal_lm(self, dtype: torch.dtype = torch.float32) -> Any:
        """The same random causal LM every time."""
        return self._build(AutoModelForCausalLM, dtype)

    def classifier(self, dtype: torch.dtype = torch.float32) -> Any:
        """A random classifier with one label, of the same shape."""
        config = type(self.config).from_dict(self.config.to_dict() | {"num_labels": 1})
        return self._build(AutoModelForSequenceClassification, dtype, config)

    def _build(self, auto: Any, dtype: torch.dtype, config: Any = None) -> Any:
        torch.manual_seed(0)
        with self.device:
            model = auto.from_config(copy.deepcopy(config or self.config), dtype=dtype)
        return model.to(self.device)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A model directory's tokenizer, or a bare tokenizer.json with <s>, </s> and <unk>."""
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    known = tokenizer.get_vocab()
    for role, names in (
        ("eos_token", ("</s>", "<|endoftext|>")),
        ("bos_token", ("<s>",)),
        ("unk_token", ("<unk>",)),
    ):
        found = next((name for name in names if name in known), None)
        if found is not None:
            setattr(tokenizer, role, found)
    if tokenizer.unk_token is None:  # Phi-2's has one special token and room for a pad
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def load(  # noqa: PLR0913
    data: str,
    tokenizer: Path,
    *,
    shape: str,
    steps: int,
    max_tokens: int,
    max_length: int,
    device: torch.device,
    lora_rank: int | None = None,
) -> Workload:
    """The first `steps` * BATCH comparisons of a seeded order over `data`."""
    encoder = Encoder(load_tokenizer(tokenizer), max_length=max_length)
    everything = read_preferences([data]).groups
    order = ComparisonOrder(encoder.encode(everything)[0], per_prompt=4, seed=0)
    picked: dict[int, list[int]] = {}
    for pick in order.window(0, steps * BATCH):
        picked.setdefault(pick.group, []).append(pick.comparison)
    groups = [_only(everything[index], comparisons) for index, comparisons in picked.items()]
    encoded, _ = encoder.encode(groups)
    kind, sizes = SHAPES[shape]
    config = kind(
        **{"vocab_size": len(encoder.tokenizer), "max_position_embeddings": 4096} | sizes,
        pad_token_id=encoder.pad_id,
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=encoder.eos_id,
    )
    return Workload(
        name=Path(data).name.split(".")[0],
        encoder=encoder,
        groups=groups,
        encoded=encoded,
        config=config,
        steps=steps,
        max_tokens=max_tokens,
        device=device,
        lora_rank=lora_rank,
    )


def _only(group: Group, comparisons: Sequence[int]) -> Group:
    kept = tuple(group.comparisons[c] for c in comparisons)
    used = sorted({side for c in kept for side in (c.chosen, c.rejected)})
    place = {old: new for new, old in enumerate(used)}
    return replace(
        group,
        responses=tuple(group.responses[i] for i in used),
        comparisons=tuple(
            replace(c, chosen=place[c.chosen], rejected=place[c.rejected]) for c in kept
        ),
    )
