"""A tiny hybrid model of any family with a chat tokenizer that fits it, exported to disk."""

from pathlib import Path
from typing import Any

import torch
import transformers

from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel, hidden_size, new_reward_head, split_causal_lm
from hafrm.export.stock_export import (
    export_policy,
    export_reward,
    gather_weights,
    write_golden,
)
from hafrm.preferences import Group, Message
from support.chat_tokenizers import CHATML, chat_tokenizer
from support.models import FAMILIES


def hybrid_with_encoder(family: str = "llama") -> tuple[HybridModel, Encoder]:
    """Random float32 weights, both heads, a vocabulary as large as the tokenizer's."""
    name, sizes = FAMILIES[family]
    encoder = Encoder(chat_tokenizer(), max_length=128)
    torch.manual_seed(0)
    ids = {"pad_token_id": encoder.pad_id, "eos_token_id": encoder.eos_id}
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, **ids, "bos_token_id": None, "vocab_size": len(encoder.tokenizer)}
    )
    causal = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in causal.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    backbone, head = split_causal_lm(causal.eval())
    generator = torch.Generator().manual_seed(0)
    reward_head = new_reward_head(hidden_size(backbone.config), generator)
    return HybridModel(backbone, reward_head=reward_head, policy_head=head), encoder


def export_both(folder: Path, family: str = "llama") -> tuple[HybridModel, Encoder]:
    """`folder/reward` and `folder/policy`, and the model that they were made from."""
    model, encoder = hybrid_with_encoder(family)
    weights = gather_weights(model)
    export_reward(weights, encoder, folder / "reward")
    export_policy(weights, encoder, folder / "policy")
    return model, encoder


def save_stock_classifier(folder: Path, template: str = CHATML) -> tuple[Any, Any]:
    """A random reward model not made by hafrm, on disk and as (model, tokenizer)."""
    tokenizer = chat_tokenizer(template)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        problem_type="regression",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    stock = transformers.LlamaForSequenceClassification(config).eval()
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return stock, tokenizer


GOLDEN_GROUP = Group(
    "g",
    (Message("user", "How do I bake bread?"),),
    ("Mix flour and water, then wait.", "No.", "I think that it is a good idea to ask."),
)


def export_with_golden(folder: Path, family: str = "llama") -> Path:
    """A reward directory as `hafrm export` leaves it, golden scores of five conversations included."""
    model, encoder = hybrid_with_encoder(family)
    export_reward(gather_weights(model), encoder, folder)
    assert write_golden(folder, [GOLDEN_GROUP]) == 5
    return folder
