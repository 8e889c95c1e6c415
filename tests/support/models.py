"""Tiny random models of every family that must work, and groups to run through them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from hafrm.engine.model import HybridModel, hidden_size, new_reward_head, split_causal_lm

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOWED = {**GROUPED, "sliding_window": 7}
"""The window is smaller than the pairs below, so that it cuts into prompts."""
GEMMA = {**WINDOWED, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {k: v for k, v in SIZES.items() if k not in ("pad_token_id", "intermediate_size")}

FAMILIES = {
    "llama": ("Llama", GROUPED),
    "llama-tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("Mistral", WINDOWED),
    "phi": ("Phi", {**SIZES, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", WINDOWED),
    "qwen2": ("Qwen2", {**GROUPED, "use_sliding_window": False}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GEMMA, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "query_pre_attn_scalar": 8}),
    "gpt-neox": ("GPTNeoX", SIZES),
    "gpt2": ("GPT2", GPT2),
    "granite": ("Granite", {**GROUPED, "logits_scaling": 4.0}),
    "cohere": ("Cohere", {**GROUPED, "logit_scale": 0.25}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def llama_config(tokenizer: transformers.PreTrainedTokenizerFast, **sizes: object):
    """The config of a Llama as small as can be, for a tokenizer."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "max_position_embeddings": 256}
    return transformers.LlamaConfig(vocab_size=len(tokenizer), **{**small, **ids, **sizes})


def tiny_causal_lm(family: str, seed: int = 0) -> PreTrainedModel:
    """A random causal LM of the family, float32, in evaluation mode."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    return sharpened(getattr(transformers, f"{name}Config")(**sizes))


def sharpened(config: transformers.PretrainedConfig) -> PreTrainedModel:
    """A random causal LM with sharper logits than the usual 0.02 gives: differences must show."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    return model.eval()


def hybrid_of(model: PreTrainedModel, seed: int = 0, *, sharing: bool = True) -> HybridModel:
    """A causal LM with both heads."""
    backbone, policy_head = split_causal_lm(model)
    generator = torch.Generator().manual_seed(seed)
    reward_head = new_reward_head(hidden_size(backbone.config), generator)
    return HybridModel(backbone, reward_head=reward_head, policy_head=policy_head, sharing=sharing)


def tiny_hybrid(family: str = "llama", seed: int = 0, *, sharing: bool = True) -> HybridModel:
    """The family's causal LM with both heads."""
    return hybrid_of(tiny_causal_lm(family, seed), seed, sharing=sharing)


@torch.no_grad()
def one_at_a_time(
    stock: PreTrainedModel, reward_head: nn.Linear, groups: Sequence["TokenGroup"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and log-prob sums from the stock model's own forward, a single sequence each, no padding."""
    rewards, logps = [], []
    for group in groups:
        for response in group.response_ids:
            ids = torch.tensor([[*group.prompt_ids.tolist(), *response.tolist()]])
            hidden = stock.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            rewards.append(reward_head(hidden.float())[0])
            start = len(group.prompt_ids)
            logits = stock(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
            logps.append(logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum())
    return torch.stack(rewards), torch.stack(logps)


def stock_classifier(family: str, model: HybridModel, pad: int, eos: int) -> PreTrainedModel:
    """transformers' own sequence classifier with the weights of `tiny_hybrid(family)`."""
    causal = tiny_causal_lm(family)
    causal.config.num_labels, causal.config.pad_token_id, causal.config.eos_token_id = 1, pad, eos
    stock = transformers.AutoModelForSequenceClassification.from_config(causal.config).eval()
    stock.base_model.load_state_dict(causal.base_model.state_dict())
    stock.score.weight.data.copy_(model.reward_head.weight.data)
    return stock


@dataclass(frozen=True)
class TokenGroup:
    """The least that a layout needs."""

    prompt_ids: NDArray[np.int32]
    response_ids: tuple[NDArray[np.int32], ...]


def token_groups(
    shapes: Sequence[tuple[int, tuple[int, ...]]], seed: int = 0, vocab: int = VOCAB
) -> list[TokenGroup]:
    """Random ids for (prompt length, response lengths) of each group; pad, BOS and EOS stay out."""
    draw = np.random.default_rng(seed)

    def ids(n: int) -> NDArray[np.int32]:
        return draw.integers(3, vocab, n).astype(np.int32)

    return [TokenGroup(ids(p), tuple(ids(r) for r in responses)) for p, responses in shapes]


SHAPES = ((11, (5, 9)), (1, (1, 2)), (4, (13, 3, 6)), (7, (8,)), (20, (2, 4)))
"""Pairs, a single response, three branches, prompts and branches of one token, and unequal lengths."""
