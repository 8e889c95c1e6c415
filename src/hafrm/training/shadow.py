"""A run's model without its weights: counted and traced before anything is loaded.

The shadow is made by the lines that make the real model, on torch's "meta" device, and traced by running
one micro-batch through it on tensors that have sizes and no contents. What autograd keeps and what
backward holds is thus added up from the code that will run, for any family, LoRA, checkpointing and
autocast, in about a second. On a CPU the sums equal a real step's to the byte. For a GPU the trace
casts as CUDA's autocast does, but walks attention segment by segment, which keeps a little more than
the varlen kernel.
"""

import contextlib
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from hafrm.engine.adjustments import narrow_layer
from hafrm.engine.layout import Layout, lay_out
from hafrm.engine.model import HybridModel, decoder_layers, hidden_size, new_reward_head
from hafrm.errors import ModelError
from hafrm.recipe import Recipe
from hafrm.training.costs import Counts
from hafrm.training.methods import Method
from hafrm.training.prepare import assemble, starting_dtype

CAST_TO_FLOAT32 = {"exp", "layer_norm", "log_softmax", "pow", "rsqrt", "softmax", "softplus", "sum"}
"""What CUDA's autocast computes in float32 and a CPU's does not, as far as language models use it."""

_fake_mode = functools.cache(FakeTensorMode)
"""One for all traces: a model may keep a tensor of the last one, such as longrope's long factors."""
_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one micro-batch beside weights, gradients and optimiser, the log-probs left out."""

    kept: int
    """What forward leaves for backward."""
    temporaries: int
    """What backward holds above that at its fullest."""


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all storages made under it and alive, real ones or not; those of `known` tensors
    are left out."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, num_bytes: int) -> None:
        self.alive -= num_bytes


def load_config(recipe: Recipe) -> PretrainedConfig:
    """The base model's config; raises ModelError when there is none."""
    path, revision = recipe.model.path, recipe.model.revision
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a config from model.path {path!r}: {error}") from error
    return config


def shadow_model(config: PretrainedConfig, recipe: Recipe, method: Method) -> HybridModel:
    """The model of `build_model`, without contents; the run's random numbers are left alone.

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


def count(model: HybridModel) -> Counts:
    """The weights of a model, or of its shadow, by what they cost."""
    backbone, head = model.backbone, model.policy_head
    config = backbone.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)  # a recurrent model has none
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    embeddings = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    named = [(n, p) for n, p in backbone.named_parameters() if id(p) not in embeddings]
    everything = list(model.parameters())
    layers = [list(layer.parameters()) for layer in decoder_layers(backbone)]
    inside = {id(p) for layer in layers for p in layer}
    if model.reward_head is not None:
        inside.add(id(model.reward_head.weight))
    outside = [p for p in everything if id(p) not in inside]
    return Counts(
        layers=config.num_hidden_layers,
        width=hidden_size(backbone.config),
        attention_width=heads * head_size,
        vocab=config.vocab_size if head is None else head.out_features,
        matrices=sum(_multiplying(p, config) for n, p in named if "lora_" not in n),
        adapters=sum(p.numel() for n, p in named if "lora_" in n),
        spared=sum(_multiplying(p, config) for n, p in _spared(model) if "lora_" not in n),
        spared_adapters=sum(p.numel() for n, p in _spared(model) if "lora_" in n),
        head=0 if head is None else head.weight.numel(),
        trainable=_elements(everything, trainable=True),
        frozen=_elements(everything) - _elements(everything, trainable=True),
        frozen_bytes=sum(p.nbytes for p in everything if not p.requires_grad),
        layer=max((_elements(layer) for layer in layers), default=0),
        layer_trainable=max((_elements(layer, trainable=True) for layer in layers), default=0),
        outside=_elements(outside),
        outside_trainable=_elements(outside, trainable=True),
    )


def _spared(model: HybridModel) -> list[tuple[str, nn.Parameter]]:
    """The weights of the last layer that tokens meet only if a head reads them."""
    layers = decoder_layers(model.backbone)
    if not layers or not model.sharing:
        return []
    names = narrow_layer(layers[-1])
    return [pair for name in names for pair in layers[-1].get_submodule(name).named_parameters()]


def _elements(parameters: Iterable[nn.Parameter], *, trainable: bool = False) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not trainable)


def _multiplying(parameter: nn.Parameter, config: Any) -> int:
    """Elements that a token meets in products: none of a vector, of stacked experts its share."""
    if parameter.dim() < 2:
        return 0
    visited = getattr(config, "num_experts_per_tok", None)
    if parameter.dim() == 3 and visited:
        return parameter.numel() * int(visited) // parameter.shape[0]
    return parameter.numel()


@dataclass(frozen=True)
class _Lengths:
    prompt_ids: NDArray[np.int32]
    response_ids: Sequence[NDArray[np.int32]]


def layout_of(shape: Sequence[tuple[int, Sequence[int]]]) -> Layout:
    """A layout of (prompt length, response lengths) whose token ids mean nothing."""

    def ids(number: int) -> NDArray[np.int32]:
        return np.zeros(number, np.int32)

    return lay_out([_Lengths(ids(p), [ids(r) for r in branches]) for p, branches in shape])


def makes_scores(config: PretrainedConfig) -> bool:
    """Whether attention holds a score for every query and key, so that memory grows with their product:
    where scores are soft-capped."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def trace(
    model: HybridModel, layout: Layout, *, half: bool, cuda: bool, train: bool = True
) -> Footprint:
    """What one micro-batch of this layout keeps and holds, or with `train` False a pass without gradients;
    the shadow can be traced again after.

    `half` is autocast to bfloat16, `cuda` a GPU's way of it. Log-probs are left out, because their
    kernel works otherwise on a GPU: `costs.logprob_bytes` knows both. Raises ModelError for a model
    whose forward asks for contents.
    """
    policy, reward = model.policy_head, model.reward_head
    with contextlib.ExitStack() as stack:
        stack.enter_context(_fake_mode())
        stack.callback(_FAKE_LOG.setLevel, _FAKE_LOG.level)
        _FAKE_LOG.setLevel(logging.CRITICAL)  # what fails is raised, and told in a line
        stack.callback(setattr, model, "policy_head", policy)
        stack.callback(setattr, model, "reward_head", reward)
        model.policy_head = None
        model.reward_head = reward or new_reward_head(hidden_size(model.backbone.config))
        if cuda:
            stack.enter_context(_CastLikeCuda() if half else _RepeatLikeCuda())
        tensors: dict[str, Any] = {n: _hollow(t) for n, t in _tensors_of(layout).items()}
        emptied = dataclasses.replace(layout, masks={}, **tensors)
        live = stack.enter_context(LiveBytes([*_empty(model), *tensors.values()]))
        stack.enter_context(torch.set_grad_enabled(train))
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                outputs = model(emptied)
            kept = live.alive if train else 0
            if train:
                _run_backward(outputs.rewards.sum())
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"{type(model.backbone).__name__} cannot be run on tensors without contents, so its memory "
                f"cannot be told before a run ({str(error).splitlines()[0]}); give training.max_tokens "
                "as a number"
            ) from error
        return Footprint(kept, live.peak - kept)


def _run_backward(total: Tensor) -> None:
    """`total.backward()`, but under the function modes that are on: layers that are computed again in
    backward must be cast as they were in forward, and torch's method leaves the modes out."""
    ones = torch.ones_like(total)
    _engine_run_backward(
        (total,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _empty(model: HybridModel) -> list[Tensor]:
    """Put tensors without contents in the place of all weights and buffers; returns them, with a
    gradient for each that is trained: no micro-batch but a step's first has to make those."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = _hollow(old)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    if new.requires_grad:
                        new.grad = torch.empty_like(new)
                    made[id(old)] = new
                store[name] = made[id(old)]
    return [*made.values(), *(t.grad for t in made.values() if t.grad is not None)]


def _tensors_of(layout: Layout) -> dict[str, Tensor]:
    fields = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


class _CastLikeCuda(TorchFunctionMode):
    """Gives half-precision inputs of some functions to them in float32, as CUDA's autocast does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in CAST_TO_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        return func(*args, **kwargs)


class _RepeatLikeCuda(TorchFunctionMode):
    """Gives attention keys and values for every query head, as padded groups do in float32 on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].shape[1] != args[1].shape[1]:
            repeat = args[0].shape[1] // args[1].shape[1]
            args = (args[0], *(x.repeat_interleave(repeat, 1) for x in args[1:]))
        return func(*args, **kwargs)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
