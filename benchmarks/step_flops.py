"""FLOPs of a joint step and of a reference pass, by arithmetic from a model's weights and token counts.

Products and attention, two for each multiply-add, as `torch.utils.flop_counter` counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hafrm.engine.attention import narrow_layer
from hafrm.engine.model import HybridModel, decoder_layers


@dataclass(frozen=True)
class Counts:
    """A model's weights by the FLOPs that they cost."""

    layers: int
    attention_width: int
    """Heads times head size."""
    matrices: int
    """What multiplies every token in the backbone: no embedding, no adapter; a token's part of experts."""
    adapters: int
    """LoRA's matrices; without any, all of the backbone is trained."""
    spared: int
    """Of `matrices`: what the last layer runs only for tokens that a head reads."""
    spared_adapters: int
    head: int
    """Policy head: width times vocabulary; 0 where none is trained."""


@dataclass(frozen=True)
class Work:
    """How much one or several packed sequences hold."""

    tokens: int
    scored: int
    """Response tokens, each with a log-prob."""
    attention: float
    """Query-key pairs: q (k - q) + q^2 / 2 of every causal segment of q queries over k keys."""
    prompts: int = 0
    responses: int = 0

    def unread(self, counts: Counts) -> int:
        """Tokens that no head reads: log-probs read the responses and each prompt's last token, rewards
        alone the last token of each response."""
        return self.tokens - (self.scored + self.prompts if counts.head else self.responses)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by where they are spent."""

    backbone: int
    attention: float
    head: int

    @property
    def total(self) -> float:
        return self.backbone + self.attention + self.head


def count(model: HybridModel) -> Counts:
    """The weights of a model, which may be on the meta device."""
    backbone, head = model.backbone, model.policy_head
    config = backbone.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)  # a recurrent model has none
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    embeddings = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    named = [(n, p) for n, p in backbone.named_parameters() if id(p) not in embeddings]
    layers = decoder_layers(backbone)
    names = narrow_layer(layers[-1]) if layers and model.sharing else []
    spared = [pair for name in names for pair in layers[-1].get_submodule(name).named_parameters()]
    matrices, adapters = _by_kind(named, config)
    spared_matrices, spared_adapters = _by_kind(spared, config)
    return Counts(
        layers=config.num_hidden_layers,
        attention_width=heads * head_size,
        matrices=matrices,
        adapters=adapters,
        spared=spared_matrices,
        spared_adapters=spared_adapters,
        head=0 if head is None else head.weight.numel(),
    )


def _by_kind(named: Iterable[tuple[str, nn.Parameter]], config: Any) -> tuple[int, int]:
    """Elements of (the model's matrices, LoRA's); a token meets only its part of stacked experts."""
    matrices = adapters = 0
    visited = getattr(config, "num_experts_per_tok", None)
    for name, parameter in named:
        if "lora_" in name:
            adapters += parameter.numel()
        elif parameter.dim() == 3 and visited:
            matrices += parameter.numel() * int(visited) // parameter.shape[0]
        elif parameter.dim() >= 2:
            matrices += parameter.numel()
    return matrices, adapters


def work_of(shape: Sequence[tuple[int, Sequence[int]]]) -> Work:
    """The work of groups of (prompt length, response lengths), each prompt laid out once."""
    attention = 0.0
    for prompt, branches in shape:
        for number, length in enumerate(branches):
            queries = length + (prompt if number == 0 else 0)
            attention += queries * (prompt + length - queries) + queries**2 / 2
    scored = sum(sum(branches) for _, branches in shape)
    tokens = sum(prompt for prompt, _ in shape) + scored
    responses = sum(len(branches) for _, branches in shape)
    return Work(tokens, scored, attention, prompts=len(shape), responses=responses)


def step_flops(counts: Counts, work: Work, *, checkpointing: bool = False) -> Flops:
    """FLOPs of forward and backward.

    A product costs 2 per weight and token forward, 2 for the gradient of its input and 2 for that of its
    weight, which a frozen one lacks; checkpointing adds one forward of the backbone. The head makes its
    logits twice when it is trained (8 in all), once when it is frozen and gives its gradient in forward
    (4). At most a few per cent too high: LoRA needs no gradient at the first layer's input, and
    checkpointing does not repeat a layer's last product.
    """
    again = 2 if checkpointing else 0
    unread = work.unread(counts)
    matrices = work.tokens * counts.matrices - unread * counts.spared
    adapters = work.tokens * counts.adapters - unread * counts.spared_adapters
    return Flops(
        backbone=((4 if counts.adapters else 6) + again) * matrices + (6 + again) * adapters,
        attention=(4 if checkpointing else 3) * _attention_flops(counts, work),
        head=(4 if counts.adapters else 8) * counts.head * work.scored,
    )


def reference_flops(counts: Counts, work: Work) -> Flops:
    """FLOPs of the reference's pass: forward only, adapters included, since they are in place."""
    spared = work.unread(counts) * (counts.spared + counts.spared_adapters)
    return Flops(
        backbone=2 * (work.tokens * (counts.matrices + counts.adapters) - spared),
        attention=_attention_flops(counts, work),
        head=2 * counts.head * work.scored,
    )


def _attention_flops(counts: Counts, work: Work) -> float:
    """Attention forward in all layers: two products over every query-key pair."""
    return 4 * counts.layers * counts.attention_width * work.attention
