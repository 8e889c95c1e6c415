"""A tiny hybrid model of any family with a chat tokenizer that fits it, exported to disk."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer

from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel
from hafrm.export.proof import score_in_memory, write_golden
from hafrm.export.stock_export import export_policy, export_reward
from hafrm.preferences import Group, Message
from hafrm.scoring.reward_model import RewardModel
from support.chat_tokenizers import chat_tokenizer
from support.models import FAMILIES, hybrid_of, llama_config, sharpened


def hybrid_with_encoder(family: str = "llama") -> tuple[HybridModel, Encoder]:
    """Random float32 weights, both heads, a vocabulary as large as the tokenizer's."""
    name, sizes = FAMILIES[family]
    encoder = Encoder(chat_tokenizer(), max_length=128)
    torch.manual_seed(0)
    ids = {"pad_token_id": encoder.pad_id, "eos_token_id": encoder.eos_id}
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, **ids, "bos_token_id": None, "vocab_size": len(encoder.tokenizer)}
    )
    return hybrid_of(sharpened(config)), encoder


def export_both(folder: Path, family: str = "llama") -> tuple[HybridModel, Encoder]:
    """`folder/reward` and `folder/policy`, and the model that they were made from."""
    model, encoder = hybrid_with_encoder(family)
    export_reward(model, encoder, folder / "reward")
    export_policy(model, encoder, folder / "policy")
    return model, encoder


def saved_whole(directory: Path, model: HybridModel, auto: Any, to: Path) -> None:
    """The weights of an export as transformers writes them: all gathered, merged, cast, then saved."""
    config = transformers.AutoConfig.from_pretrained(directory)
    stock = auto.from_config(config, dtype=config.dtype)
    prefix, weights = stock.base_model_prefix, dict(model.backbone.state_dict())
    state = {n.replace(".base_layer.", "."): w for n, w in weights.items() if ".lora_" not in n}
    for name, layer in model.backbone.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (weights[f"{name}.lora_{k}.default.weight"].float() for k in "AB")
            delta = layer.scaling["default"] * (b @ a)
            delta = delta.t() if getattr(layer, "fan_in_fan_out", False) else delta
            state[f"{name}.weight"] = state[f"{name}.weight"].float() + delta
    state = {f"{prefix}.{name}": value for name, value in state.items()}
    if hasattr(stock, "score"):
        state["score.weight"] = model.reward_head.weight
    else:
        state["lm_head.weight"] = model.policy_head.weight
    stock.load_state_dict({name: value.to(config.dtype) for name, value in state.items()})
    stock.save_pretrained(to)


def record_golden(directory: Path, *groups: Group) -> int:
    """Golden scores of an export, as it gives them itself; returns their number."""
    rm = RewardModel.from_pretrained(directory, device="cpu")
    memory = score_in_memory(rm.model, rm.encoder, groups, max_tokens=128, autocast=None)
    return write_golden(directory, memory)


def save_stock_classifier(
    folder: Path, tokenizer: Any = None, seed: int = 0, std: float = 0.02
) -> tuple[Any, Any]:
    """A random reward model not made by hafrm, on disk and as (model, tokenizer)."""
    tokenizer = tokenizer or chat_tokenizer()
    torch.manual_seed(seed)
    config = llama_config(tokenizer, num_labels=1, problem_type="regression")
    stock = transformers.LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(stock.score.weight, std=std)
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return stock, tokenizer


GOLDEN_GROUP = Group(
    "g",
    (Message("user", "How do I bake bread?"),),
    ("Mix flour and water, then wait.", "No.", "I think that it is a good idea to ask."),
)
