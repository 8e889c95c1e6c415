"""The bytes of one micro-batch, from the run's own model on torch's meta device, and by formulas.

Tensors on the meta device have sizes and no contents, so a model of any size is built and run there in
about a second. The formulas are for what the meta device does not show: states, FSDP2, log-probs.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # documented in torch's notes on modes
from transformers import AutoModelForCausalLM, PretrainedConfig

from hafrm.engine.layout import Layout, lay_out
from hafrm.engine.logprobs import chunk_rows
from hafrm.engine.model import HybridModel, decoder_layers, hidden_size
from hafrm.errors import ModelError
from hafrm.preferences import TokenizedGroup
from hafrm.recipe import Recipe
from hafrm.training.methods import Method
from hafrm.training.model_setup import assemble, starting_dtype

FLOAT32, HALF = 4, 2
"""Bytes of a number."""
NARROWED = {"linear", "matmul", "__matmul__", "bmm", "addmm", "baddbmm"}
WIDENED = {"exp", "layer_norm", "log_softmax", "pow", "rsqrt", "softmax", "softplus", "sum"}
"""What CUDA's autocast computes in bfloat16 and in float32, as far as language models use it."""
Shape = Sequence[tuple[int, Sequence[int]]]
"""(prompt length, response lengths) of each group."""


@dataclass(frozen=True)
class Weights:
    """Numbers of weights by what they cost; `outside` are those of no layer and not the reward head."""

    total: int
    trainable: int
    frozen_bytes: int
    layer: int
    layer_trainable: int
    outside: int
    outside_trainable: int
    head: int
    """Of the policy head; 0 where none is trained."""
    vocab: int
    width: int
    adapters: bool
    """LoRA: the policy head is frozen too."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one rank at its fullest moments: in a step's backward pass, and in passes without one."""

    weights: int
    gradients: int
    optimiser: int
    exchange: int
    """Gathered layers and whole gradients of FSDP2; DDP's buckets are the gradients."""
    activations: int
    """What autograd keeps of the micro-batch."""
    working: int
    """What the backward pass holds at once: of the layers, or logits and the head's gradient."""
    passes: int
    """The fullest pass without gradients: the reference's before the first step, over whole weights under
    FSDP2 too, or validation's beside the optimiser's state."""

    @property
    def states(self) -> int:
        """What stays, however large the micro-batch."""
        return self.weights + self.gradients + self.optimiser + self.exchange

    @property
    def step(self) -> int:
        """The fullest moment of a step."""
        return self.states + self.activations + self.working

    @property
    def total(self) -> int:
        """The fullest moment of all."""
        return max(self.passes, self.step)


class Footprint(NamedTuple):
    """Bytes of one micro-batch beside weights, gradients and optimiser, without the log-probs."""

    kept: int
    """What the forward pass leaves for backward."""
    working: int
    """What is held above that at the fullest moment."""


def meta_model(config: PretrainedConfig, recipe: Recipe, method: Method) -> HybridModel:
    """The model of `build_model` on the meta device; no random number is drawn.

    Raises ModelError for a config that is no causal LM's.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            causal = AutoModelForCausalLM.from_config(config, dtype=starting_dtype(recipe))
        except ValueError as error:
            raise ModelError(
                f"model.path {recipe.model.path!r} is no causal LM: {error}"
            ) from error
        return assemble(causal.base_model, causal.get_output_embeddings(), recipe, method)


def count_weights(model: HybridModel) -> Weights:
    """The weights of a model by what they cost."""

    def size(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
        sizes = [(p.numel(), p.requires_grad) for p in parameters]
        return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)

    layers = [list(layer.parameters()) for layer in decoder_layers(model.backbone)]
    inside = {id(p) for layer in layers for p in layer}
    if model.reward_head is not None:
        inside.add(id(model.reward_head.weight))
    total, trainable = size(model.parameters())
    layer, layer_trainable = max(map(size, layers), default=(0, 0))
    outside, outside_trainable = size(p for p in model.parameters() if id(p) not in inside)
    head = model.policy_head
    return Weights(
        total,
        trainable,
        sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        layer,
        layer_trainable,
        outside,
        outside_trainable,
        head=0 if head is None else head.weight.numel(),
        vocab=0 if head is None else head.out_features,
        width=hidden_size(model.backbone.config),
        adapters=any("lora_" in name for name, _ in model.named_parameters()),
    )


def state_bytes(
    weights: Weights, *, shards: int = 1, gathered: int = FLOAT32, accumulates: bool = False
) -> tuple[int, int, int, int]:
    """(weights, gradients, optimiser, exchange) of a rank: alone or under DDP, or one of FSDP2's `shards`.

    FSDP2 gathers this layer and the next, in `gathered` bytes a number, and what is outside of layers,
    which stays from forward to backward. On their way: the gradients of one layer, as they are and in
    float32, and those of the outside. Where a step `accumulates` over several micro-batches, gradients
    stay whole on every rank until the last.
    """
    trained = FLOAT32 * weights.trainable
    parts = trained + weights.frozen_bytes, trained, 2 * trained
    if shards == 1:
        return *parts, 0
    exchange = gathered * (2 * weights.layer + weights.outside + weights.outside_trainable)
    exchange += (gathered + FLOAT32) * weights.layer_trainable
    whole, gradients, optimiser = (-(-part // shards) for part in parts)
    return whole, gradients, optimiser, exchange + (trained if accumulates else 0)


def logprob_bytes(
    weights: Weights, shape: Shape, *, device: str, product: int, stored: int, train: bool = True
) -> int:
    """Bytes that `token_logprobs` holds at its fullest, for products in `product` bytes a number and a
    head stored in `stored`; without `train` in a pass without gradients.

    float32 products share one buffer of logits, others bring a new one, and the last is still referred
    to when the next is made. A frozen head keeps a second copy, of this chunk and of the last; a trained
    one sums its gradient in float32.
    """
    if not weights.head:
        return 0
    scored = sum(sum(responses) for _, responses in shape)
    tokens = scored + sum(prompt for prompt, _ in shape)
    rows = min(scored, chunk_rows(weights.vocab, device))
    chunk, following = (n * weights.vocab for n in (rows, min(rows, scored - rows)))
    head = product * weights.head if product != stored else 0  # the copy that products read
    if not train:
        logits = FLOAT32 * chunk * (1 if product == FLOAT32 else 2)
        return logits + head + FLOAT32 * weights.width * (scored + tokens)
    if weights.adapters:
        logits = FLOAT32 * (2 * chunk + following)
    elif product == FLOAT32:
        logits, head = FLOAT32 * chunk, head + FLOAT32 * weights.head
    else:
        logits = (FLOAT32 + product) * chunk + FLOAT32 * following
        head += 2 * FLOAT32 * weights.head
    # Hidden states that predict a response token: kept, their gradient, and that spread over all tokens.
    return logits + head + FLOAT32 * weights.width * (2 * scored + tokens)


def trace(model: HybridModel, shape: Shape, *, half: bool, train: bool = True) -> Footprint:
    """What a micro-batch of this shape keeps and holds, without log-probs; `half` is bfloat16 autocast.

    Raises ModelError for a model whose forward reads contents.
    """
    layout = meta_layout(shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # a step's first micro-batch makes them, and no other
        parameter.grad = torch.empty_like(parameter)
    existing = [*model.parameters(), *model.buffers(), *(p.grad for p in trained)]
    existing += [value for value in vars(layout).values() if isinstance(value, Tensor)]
    casts = _CudaAutocast(half)
    if model.checkpointing:
        # A backward pass has no function modes, but layers are computed again in it.
        model.checkpoint_activations(context_fn=lambda: (contextlib.nullcontext(), casts))
    with LiveBytes(t for t in existing if t is not None) as live, casts:
        try:
            with torch.set_grad_enabled(train):
                loss = _read_states(model, layout).float().sum()
            casts.copies = None  # autocast ends, and with it its copies of weights
            kept = live.alive if train else 0
            if train:
                loss.backward()
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"{type(model.backbone).__name__} cannot run on the meta device, so its memory cannot be "
                f"planned ({str(error).splitlines()[0]}); give training.max_tokens as a number"
            ) from error
        return Footprint(kept, live.peak - kept)


def meta_layout(shape: Shape) -> Layout:
    """A layout of groups of these lengths, on the meta device."""

    def ids(number: int) -> Any:
        return np.zeros(number, np.int32)

    return lay_out([TokenizedGroup(ids(p), tuple(map(ids, r))) for p, r in shape]).to("meta")


def _read_states(model: HybridModel, layout: Layout) -> Tensor:
    """The hidden states that rewards are read from."""
    if model.sharing:
        states = model.hidden_states(layout)
        return states.hidden[states.last]
    number, longest = len(layout.key_lengths), max(layout.key_lengths)
    ids = torch.empty(number, longest, dtype=torch.int64, device="meta")
    mask = None
    if hasattr(model.backbone.config.get_text_config(), "num_attention_heads"):
        # Whole, because transformers would read the contents of a mask of padding.
        mask = torch.empty(number, 1, longest, longest, dtype=torch.bool, device="meta")
    outputs = model.backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    hidden: Tensor = outputs.last_hidden_state
    return hidden[:, -1]


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all storages made under it and alive, without those of `existing` tensors."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        # Held, so that no id is used again; `_seen` forgets the ids of those that are freed.
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._seen = {id(storage) for storage in self._existing}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(id(storage))
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        return result

    def _forget(self, storage: int, num_bytes: int) -> None:
        self._seen.discard(storage)
        self.alive -= num_bytes


class _CudaAutocast(TorchFunctionMode):
    """bfloat16 autocast, if `half`, and fused attention for the meta device, where torch has neither."""

    def __init__(self, half: bool) -> None:
        super().__init__()
        self._half = half
        self.copies: dict[int, Tensor] | None = {}
        """Of trained weights, which autocast makes once and keeps until it ends."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            apply: Any = _FusedAttention.apply
            return apply(*(self._narrow(x) if self._half else x for x in args[:3]))
        change = {**dict.fromkeys(NARROWED, self._narrow), **dict.fromkeys(WIDENED, _widen)}.get(
            getattr(func, "__name__", "") if self._half else ""
        )
        if change is not None:
            args = [change(x) for x in args]
            kwargs = {name: change(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    def _narrow(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if self.copies is None or not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        return self.copies.setdefault(id(x), x.to(torch.bfloat16))


def _widen(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x


class _FusedAttention(torch.autograd.Function):
    """What flash attention keeps: its inputs, its output, and a float32 number for each query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
