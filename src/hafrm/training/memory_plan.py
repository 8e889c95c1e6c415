"""An estimate of the memory that a run needs, before anything is loaded, and the token budget that fits.

Weights are counted on torch's meta device; docs/memory_plan.md compares the formulas with traces.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hafrm.engine.logprobs import chunk_rows
from hafrm.engine.model import HybridModel, decoder_layers, hidden_size, num_kv_heads
from hafrm.errors import ConfigError
from hafrm.export.plain_model import proof_bytes
from hafrm.recipe import Recipe
from hafrm.results import Column, Table
from hafrm.scoring.loading import check_base
from hafrm.scoring.model_files import default_device
from hafrm.training import parallel
from hafrm.training.methods import Method
from hafrm.training.passes import pass_tokens
from hafrm.training.setup import check_length, meta_model, with_precision, with_training

log = logging.getLogger("hafrm")

GIB = 2**30
FLOAT32, HALF = 4, 2  # bytes per number
NF4 = 0.516  # with a one-byte scale per 64 weights, and a scale per 256 of those
LARGEST = 2**15  # tokens beyond which matrix products become no more efficient
GRAIN = 256  # tokens between two automatic budgets
SCORED = 0.6  # fraction of a micro-batch's tokens in responses: two fifths of a comparison are its prompt
# Headroom: a GPU's allocator leaves gaps, and glibc's heap holds up to 2.4 times what is alive.
SPARE = {"cuda": 0.1, "cpu": 0.6}
REMEDIES = (
    "training.max_tokens=auto, training.gradient_checkpointing=true, training.precision=bf16, "
    "lora.rank=64, with it model.quantization=nf4, more GPUs with training.parallel=fsdp"
)


@dataclass(frozen=True)
class Target:
    """The device of one rank, its available bytes before anything is loaded, and the number of ranks."""

    device: Literal["cuda", "cpu"]
    memory: int
    ranks: int = 1

    @property
    def usable(self) -> int:
        return int(self.memory * (1 - SPARE[self.device]))

    def shards(self, recipe: Recipe) -> int:
        """The number of ranks that FSDP2 shards a model over; with hsdp, the ranks of one node."""
        near = parallel.per_node(8) if recipe.training.parallel == "hsdp" else self.ranks
        return min(self.ranks, near)

    def team(self, recipe: Recipe, weights: "Weights") -> int:
        """Ranks that run one sequence together."""
        return parallel.team_size(recipe.training.parallel, self.ranks, weights.kv_heads)


class Weights(NamedTuple):
    """Numbers of weights by their cost, and the widths that determine a layer's activations."""

    total: int
    trainable: int
    frozen_bytes: int
    layer: int
    layer_trainable: int
    outside: int  # outside of layers, without the reward head
    outside_trainable: int
    adapters: bool  # LoRA: the policy head is frozen too
    layers: int
    width: int
    kv_heads: int
    vocab: int  # of the policy head; 0 without one
    features: int  # inputs and outputs of a layer's matrices, and a gated MLP's product
    normed: int  # numbers per token that a layer's norms read
    head_normed: int  # the same of norms over attention heads (Qwen3, Gemma3)
    rms: bool
    capped_heads: int  # attention heads, if their scores are soft-capped
    largest: int  # numbers in the largest weight
    dequantised: int  # numbers in the largest quantised weight, for its product; 0 if there is none


@dataclass(frozen=True)
class MemoryNeed:
    """Peak bytes of one rank: in a step's backward pass, and in passes without one."""

    weights: int
    gradients: int
    optimiser: int
    exchange: int  # FSDP2's gathered layers and whole gradients; DDP's buckets are the gradients
    activations: int  # what autograd keeps of the micro-batch
    working: int  # what backward holds at once: a layer's, or logits and the head's gradient
    passes: int  # without gradients: the reference's, over whole weights, or validation
    host: int  # what is offloaded, plus one weight that is being written to a file

    @property
    def step(self) -> int:
        states = self.weights + self.gradients + self.optimiser + self.exchange
        return states + self.activations + self.working


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank of a run needs, and whether it fits."""

    target: Target
    sharded: bool
    max_tokens: int  # for auto, the largest budget that fits
    tokens: int  # of the largest micro-batch: the budget, or the whole step if that is less
    need: MemoryNeed
    proof: int  # bytes to replay the export in float32, after training, by the main rank

    @property
    def prover(self) -> str:
        """Where the export is proved: on the GPU if it has room once the model in memory is freed."""
        return (
            "GPU" if self.target.device == "cuda" and self.proof <= self.target.memory else "host"
        )

    @property
    def fits(self) -> bool:
        return max(self.need.passes, self.need.step) <= self.target.usable

    def __str__(self) -> str:
        need, usable = self.need, self.target.usable / GIB
        verdict = "fits" if self.fits else f"does not fit; what needs less: {REMEDIES}"
        return (
            f"{need.step / GIB:.3g} GiB for a step in micro-batches of {self.tokens} tokens, "
            f"{need.passes / GIB:.3g} for passes without gradients, {usable:.3g} usable: "
            f"training.max_tokens {self.max_tokens} {verdict}; proof of the export: at "
            f"most {self.proof / GIB:.3g} on the {self.prover}"
        )

    def tables(self) -> tuple[Table, ...]:
        need, target = self.need, self.target
        sizes = {**asdict(need), "a step in all": need.step}
        sizes["passes without gradients"] = sizes.pop("passes")
        sizes["host, before the proof"] = sizes.pop("host")
        sizes[f"proof of the export, on the {self.prover}"] = self.proof
        rows = tuple((name, size / GIB) for name, size in sizes.items() if size)
        title = f"memory of {target.ranks} {target.device.upper()} rank(s), each"
        return (Table(title, (Column("what"), Column("GiB", "general")), rows, (str(self),)),)


def count_weights(model: HybridModel, *, quantised: bool = False) -> Weights:
    """The weights of a model, which may be on the meta device, by their cost; linear layers are in nf4 if
    `quantised`."""

    def size(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
        sizes = [(p.numel(), p.requires_grad) for p in parameters]
        return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)

    config, head = model.backbone.config.get_text_config(), model.policy_head
    layers, width = list(decoder_layers(model.backbone)), hidden_size(model.backbone.config)
    parts = layers if model.reward_head is None else [*layers, model.reward_head]
    inside = {id(p) for part in parts for p in part.parameters()}
    linear = (m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear | Conv1D))
    packed = {id(m.weight): m.weight.numel() for m in linear if quantised}
    features, gated, normed, head_normed = 0, 0, 0, 0
    visited = getattr(config, "num_experts_per_tok", None) or 1
    capped = getattr(config, "attn_logit_softcapping", None)
    for name, p in layers[0].named_parameters() if layers else ():
        if p.dim() > 1 and "lora_" not in name:
            times = visited if p.dim() == 3 else 1  # stacked experts, of which a token visits a few
            features += times * sum(p.shape[-2:])
            if "qkv" in name or "query_key_value" in name:  # rotated parts are copies of its output
                features += max(p.shape)
            if "gate" in name:
                product = times * p.shape[-2:].numel() // width
                gated = max(gated, product // 2 if "gate_up" in name else product)
        elif name.endswith(("q_norm.weight", "k_norm.weight")) and p.numel() < width:
            heads = config.num_attention_heads if "q_norm" in name else config.num_key_value_heads
            head_normed += p.numel() * heads
        elif p.dim() == 1 and name.endswith("weight"):
            normed += p.numel()
    return Weights(
        *size(model.parameters()),
        sum(
            int(NF4 * p.numel()) if id(p) in packed else p.nbytes
            for p in model.parameters()
            if not p.requires_grad
        ),
        *max((size(layer.parameters()) for layer in layers), default=(0, 0)),
        *size(p for p in model.parameters() if id(p) not in inside),
        adapters=any("lora_" in name for name, _ in model.named_parameters()),
        layers=len(layers),
        width=width,
        kv_heads=num_kv_heads(config),
        vocab=0 if head is None else head.out_features,
        features=features + gated,
        normed=normed,
        head_normed=head_normed,
        rms=any("RMSNorm" in type(m).__name__ for m in model.backbone.modules()),
        capped_heads=config.num_attention_heads if capped else 0,
        largest=max(p.numel() for p in model.parameters()),
        dequantised=max(packed.values(), default=0),
    )


def state_bytes(
    weights: Weights, *, shards: int = 1, gathered: int = FLOAT32, accumulates: bool = False
) -> tuple[int, int, int, int]:
    """Bytes of (weights, gradients, optimiser, exchange) of a rank: alone, under DDP, or one of FSDP2's
    `shards`, which gathers `gathered` bytes per number; gradients stay whole if a step `accumulates`."""
    trained = FLOAT32 * weights.trainable
    parts = trained + weights.frozen_bytes, trained, 2 * trained
    if shards == 1:
        return *parts, 0
    # Gathered: this layer, the next, and what is outside of layers, which stays from forward to backward.
    # Gradients in flight: one layer's, as they are and in float32, and those outside of layers.
    exchange = gathered * (2 * weights.layer + weights.outside + weights.outside_trainable)
    exchange += (gathered + FLOAT32) * weights.layer_trainable
    whole, gradients, optimiser = (-(-part // shards) for part in parts)
    return whole, gradients, optimiser, exchange + (trained if accumulates else 0)


def activation_bytes(
    recipe: Recipe, weights: Weights, tokens: int, *, sharded: bool
) -> tuple[int, int, int]:
    """Bytes (kept for backward, held on top in it, held in a pass without gradients), without log-probs."""
    half, frozen = recipe.training.precision == "bf16", sharded or weights.adapters
    size, norm = FLOAT32, 2.0  # bytes per number, fitted to traces
    if half:
        size, norm = HALF, 4.0  # the float32 input of a LayerNorm
        if weights.rms:  # with float32 weights autocast casts the norm's output for every matrix
            norm = 2.0 if frozen else 7.25
    layer = int(size * weights.features + norm * weights.normed + 7.5 * weights.head_normed)
    layer += 8 * weights.capped_heads * recipe.data.max_length  # Gemma2's scores are written out
    layer *= tokens
    stream = tokens * weights.width * (HALF if half and frozen else FLOAT32)
    # Autocast keeps a bfloat16 copy of every trained weight until backward has used it.
    copies = HALF * weights.layers * weights.layer_trainable if half and not sharded else 0
    gradient = weights.layer_trainable  # bytes: a matrix is a quarter of a layer
    gradient += size * weights.dequantised
    ends, forward = 2 * stream, copies + layer + size * weights.dequantised
    if recipe.training.gradient_checkpointing:  # keeps only a layer's input, and no copies
        working = max(copies + layer, 5 * layer // 4 + gradient)
        return ends + weights.layers * stream, working, forward
    return ends + copies + weights.layers * layer, layer // 3 + gradient, forward


def logprob_bytes(
    recipe: Recipe, weights: Weights, tokens: int, target: Target, *, train: bool
) -> int:
    """Peak bytes of `token_logprobs`: logits, copies of the head, hidden states."""
    if not weights.vocab:
        return 0
    half, scored = recipe.training.precision == "bf16", int(SCORED * tokens)
    half_product = half and target.device == "cuda"
    half_head = half and (weights.adapters or (train and is_sharded(recipe, target)))
    # float32 products share a buffer; others allocate one while the last is still referenced. A frozen
    # head computes its gradient in forward, from a copy of both.
    chunks = 3 if train and (weights.adapters or half_product) else 1 + half_product
    logits = FLOAT32 * chunks * min(scored, chunk_rows(weights.vocab, target.device))
    head = FLOAT32 * half_head if not half_product else HALF * (not half_head)  # cast for products
    if train and not weights.adapters:
        head += FLOAT32 * (1 + half_product)  # its gradient, summed over chunks
    states = FLOAT32 * weights.width * (tokens + scored + scored * train)
    return (logits + head * weights.width) * weights.vocab + states


def memory_need(
    recipe: Recipe, weights: Weights, target: Target, tokens: int, budget: int, *, accumulates: bool
) -> MemoryNeed:
    """The need for micro-batches of `tokens`; passes without gradients use a multiple of `budget`."""
    sharded, reference = is_sharded(recipe, target), pass_tokens(budget)
    team = target.team(recipe, weights)  # which divides what layers hold, and gathers hidden states
    shards = target.shards(recipe) if sharded else 1
    gathered = HALF if recipe.training.precision == "bf16" else FLOAT32
    states = state_bytes(weights, shards=shards, gathered=gathered, accumulates=accumulates)
    saved, working, _ = activation_bytes(recipe, weights, -(-tokens // team), sharded=sharded)
    *_, forward = activation_bytes(recipe, weights, -(-reference // team), sharded=sharded)
    gathers = gathered * (2 * weights.layer + weights.outside) if sharded else 0
    beside = states[0] + states[2] + gathers
    if target.device == "cuda" and (gathered == FLOAT32 or weights.capped_heads):
        # No varlen kernel: masks of padded groups, and positions subtracted in int64 to make them.
        masks, more = (n * min(n, 2 * recipe.data.max_length) for n in (tokens, reference))
        saved, working, forward = saved + 5 * masks, max(working, 10 * masks), forward + 15 * more
    working = max(working, logprob_bytes(recipe, weights, tokens, target, train=True))
    forward = max(forward, logprob_bytes(recipe, weights, reference, target, train=False))
    # A weight and what is added to it in float32, their sum, and the sum in the file's dtype.
    host = 4 * FLOAT32 * weights.largest
    if sharded and recipe.training.offload in ("weights", "all"):  # except what is gathered of them
        host += sum(states[:3])
        states, beside = (0, 0, 0, states[3]), gathers
    if recipe.training.offload in ("activations", "all"):
        host += saved
        saved //= weights.layers
    return MemoryNeed(*states, saved, working, beside + forward, host)


def is_sharded(recipe: Recipe, target: Target) -> bool:
    """Whether the ranks divide the model."""
    return parallel.shards(recipe.training.parallel, target.ranks, target.device)


def scatters_gradients(trainable: int, target: Target) -> bool:
    """Whether every micro-batch exchanges gradients. Whole gradients, kept until the last one, would save
    traffic but take more than a tenth of the memory."""
    return FLOAT32 * trainable > target.memory // 10


def agree_on_scatter(model: HybridModel, ranks: parallel.Ranks) -> bool:
    """`scatters_gradients` of a model, the same on all ranks."""
    num = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return parallel.smallest(scatters_gradients(num, target_here(ranks))) > 0


def plan_memory(recipe: Recipe, weights: Weights, target: Target) -> MemoryPlan:
    """The plan at the recipe's token budget; for auto, at the largest that fits, or else the smallest."""
    training, least = recipe.training, 2 * recipe.data.max_length
    step = training.batch_size * least
    proof = proof_bytes(weights.total - weights.adapters * weights.trainable)

    team = target.team(recipe, weights)

    def plan(budget: int) -> MemoryPlan:
        tokens = min(budget, step)
        # A rank's part of a step; prompts are two fifths of it and laid out once: 5/8 of the maximum.
        accumulates = tokens < -(-step * 5 * team // (8 * target.ranks))
        accumulates = accumulates and not scatters_gradients(weights.trainable, target)
        need = memory_need(recipe, weights, target, tokens, budget, accumulates=accumulates)
        return MemoryPlan(target, is_sharded(recipe, target), budget, tokens, need, proof)

    if training.max_tokens != "auto":
        return plan(training.max_tokens)
    # Not a bisection: if a step takes several micro-batches, FSDP2 keeps whole gradients.
    budgets = range(min(max(LARGEST * team, least), step), least, -GRAIN)
    return next((p for p in map(plan, budgets) if p.fits), plan(least))


def plan_recipe(
    recipe: Recipe, method: Method, *, memory: float | None = None, ranks: int = 1
) -> MemoryPlan:
    """The plan of one of `ranks` ranks on a GPU of `memory` GiB, by default on this machine's device."""
    target = target_here(parallel.Ranks(0, ranks, default_device()))
    if memory is not None:
        target = Target("cuda", int(memory * GIB), ranks)
    return _choose(with_precision(recipe, target.device), method, target)[1]


def with_token_budget(recipe: Recipe, method: Method, ranks: parallel.Ranks) -> Recipe:
    """The recipe with max_tokens as a number, precision decided and, for adapters, `parallel` chosen, the
    same on all ranks; ConfigError if not even the smallest budget fits."""
    recipe = with_precision(recipe, ranks.device.type)  # which the plan depends on
    auto = recipe.training.max_tokens == "auto"
    choice, plan = _choose(recipe, method, target_here(ranks))
    if recipe.training.offload in ("weights", "all") and not plan.sharded:
        raise ConfigError(
            f"training.offload is {recipe.training.offload}, but nothing is sharded: launch several "
            "processes with training.parallel fsdp or hsdp, or offload activations only"
        )
    budget = parallel.smallest(plan.max_tokens if plan.fits else 0)
    if auto and budget == 0:
        raise ConfigError(f"not even 2 x data.max_length tokens fit: {plan}")
    if parallel.is_main():
        log.log(logging.INFO if budget else logging.WARNING, "plan: %s", plan)
    return with_training(choice, max_tokens=budget) if auto else choice


def target_here(ranks: parallel.Ranks) -> Target:
    """This process's device, and the free memory of its GPU or its part of the RAM."""
    if ranks.device.type == "cuda":
        return Target("cuda", torch.cuda.mem_get_info(ranks.device)[0], ranks.size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return Target("cpu", memory // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)), ranks.size)


def _choose(recipe: Recipe, method: Method, target: Target) -> tuple[Recipe, MemoryPlan]:
    """The recipe and its plan; with `parallel: auto`, adapters use DDP if full copies fit."""
    if recipe.model.quantization:  # bytes that FSDP2 cannot divide
        recipe = with_training(recipe, parallel="ddp")
    heads = {"policy": method.trains_policy, "reward": method.trains_reward}
    config = check_base(recipe.model, **heads)
    check_length(config, recipe)  # before minutes of encoding
    model = meta_model(config, recipe, method)
    weights = count_weights(model, quantised=recipe.model.quantization is not None)
    # DDP exchanges adapters' gradients once per step; FSDP2 gathers the model twice per micro-batch.
    on_device = recipe.training.offload in ("none", "activations")
    is_open = recipe.training.parallel == "auto" and on_device
    if recipe.lora and is_open and is_sharded(recipe, target):
        copies = with_training(recipe, parallel="ddp")
        plan = plan_memory(copies, weights, target)
        if parallel.smallest(plan.fits):  # on all ranks, which must agree
            return copies, plan
    return recipe, plan_memory(recipe, weights, target)
