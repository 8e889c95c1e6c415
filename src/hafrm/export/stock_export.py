"""Write a trained model as stock directories, with the tokenizer and the closed chat template of training.

A reward model and a policy are never one file, because vLLM refuses unknown weights.
"""

import collections
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hafrm.atomic import atomic_directory
from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel, with_dropout
from hafrm.errors import ModelError
from hafrm.export.plain_model import write_for_older_readers
from hafrm.tensor_files import write_files

_ADAPTER = "default"  # PEFT's name of the one adapter


def export_reward(
    model: HybridModel, encoder: Encoder, directory: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write the stock sequence classifier: backbone and `score.weight` [1, hidden], no bias. All ranks of a
    sharded model call this; only one weight at a time is whole.

    Raises ModelError if transformers has no such classifier, or if it cannot hold the model.
    """
    if model.reward_head is None:
        raise ModelError("this model has no reward head to export; export its policy instead")
    config = with_dropout(model.backbone.config)
    config.num_labels = 1
    config.id2label, config.label2id = {0: "LABEL_0"}, {"LABEL_0": 0}
    config.problem_type = "regression"  # else servers apply a sigmoid
    stock = _stock(AutoModelForSequenceClassification, config, encoder, dtype)
    _write(stock, model.backbone, ("score", model.reward_head), encoder, directory)


def export_policy(
    model: HybridModel, encoder: Encoder, directory: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write the stock causal LM: backbone and LM head; otherwise like `export_reward`."""
    head = model.policy_head
    if head is None:
        raise ModelError("this model has no policy head to export; export its reward model instead")
    config = with_dropout(model.backbone.config)
    embeddings: Any = model.backbone.get_input_embeddings().weight
    if config.tie_word_embeddings and head.weight is not embeddings:
        differ = _full((head.weight != embeddings).any())
        # an untied head under a config that says tied, as merged adapters leave it: tying would lose it
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = not differ.item()
    stock = _stock(AutoModelForCausalLM, config, encoder, dtype)
    if stock.generation_config is not None:
        generation = None  # that of the base, if it is still there
        with contextlib.suppress(OSError, ValueError):
            name = config._name_or_path
            generation = GenerationConfig.from_pretrained(name, trust_remote_code=False)
        # else plain `generate` does not stop at the end of a turn
        ends = encoder.turn_ends(generation)
        stock.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    names = {module: name for name, module in stock.named_modules()}
    output = names[stock.get_output_embeddings()]
    _write(stock, model.backbone, (output, head), encoder, directory)


def export_adapter(
    model: HybridModel, encoder: Encoder, directory: Path, base: str, revision: str | None
) -> None:
    """Write the reward model's adapters to `base`, and its head, in float32, as PEFT loads them."""
    layers = {n: m for n, m in model.backbone.named_modules() if isinstance(m, LoraLayer)}
    weights = {
        f"{model.backbone.base_model_prefix}.{name}.{part}.weight": getattr(layer, part)[_ADAPTER]
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    # The complete head goes with the adapters: PEFT omits it by default (peft#2502, TRL#1379).
    weights["score.weight"] = model.reward_head
    tensors = {
        f"base_model.model.{name}": module.weight.detach().float().cpu().contiguous()
        for name, module in weights.items()
    }
    one = next(iter(layers.values()))
    config = LoraConfig(
        r=one.r[_ADAPTER],
        lora_alpha=one.lora_alpha[_ADAPTER],
        fan_in_fan_out=bool(getattr(one, "fan_in_fan_out", False)),
        task_type="SEQ_CLS",
        modules_to_save=["score"],
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    # set here: the constructor makes a set of it, which is written in varying order
    config.target_modules = _targets(model.backbone, layers)
    with atomic_directory(directory) as aside:
        config.save_pretrained(str(aside))
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        encoder.export_tokenizer(aside)
        write_for_older_readers(aside)


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _full(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _whole(weight: Tensor) -> Tensor:
    """The full weight, on the main rank's CPU; other ranks must call this too, and get a meta tensor."""
    return _full(weight).to("cpu" if _is_main() else "meta")


def _read_weight(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """A weight, by its name before adapters; W + scaling * B A is summed in float32, then cast."""
    path, _, leaf = name.rpartition(".")
    layer: Any = module.get_submodule(path)
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    value = (dequantize_module_weight(base) if leaf == "weight" else getattr(base, leaf)).detach()
    if base is layer or leaf != "weight":
        return _whole(value.to(dtype))
    factors = (getattr(layer, f"lora_{k}")[_ADAPTER].weight for k in "BA")
    value, b, a = (_whole(part).float() for part in (value, *factors))
    delta = layer.scaling[_ADAPTER] * (b @ a)
    if getattr(layer, "fan_in_fan_out", False):  # GPT-2 stores its weights transposed
        delta = delta.t()
    merged: Tensor = (value + delta).to(dtype)
    return merged


def _stock(
    auto: Any, config: PretrainedConfig, encoder: Encoder, dtype: torch.dtype
) -> PreTrainedModel:
    config.dtype = dtype
    config.pad_token_id, config.eos_token_id = encoder.pad_id, encoder.eos_id
    try:
        with torch.device("meta"):
            stock: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        kind = type(config).__name__
        raise ModelError(f"transformers has no {auto.__name__} for {kind}") from error
    return stock


def _write(
    stock: PreTrainedModel,
    backbone: PreTrainedModel,
    head: tuple[str, nn.Module],
    encoder: Encoder,
    directory: Path,
) -> None:
    """Write the weights of `backbone` and `head` in the files' form of `stock`, which has none itself."""
    sources: dict[str, tuple[nn.Module, str]] = {}
    for prefix, module in ((stock.base_model_prefix, backbone), head):
        for n in module.state_dict():
            if ".lora_" not in n and ".weight." not in n:  # what bitsandbytes keeps of a weight
                own = n.replace(".base_layer.", ".")
                sources[f"{prefix}.{own}"] = module, own
    stock.tie_weights()
    stored = _stored_tensors(stock)
    left = sorted({name for names, _ in stored for name in names} - sources.keys())
    surplus = sorted(sources.keys() - stock.state_dict().keys())
    if left or surplus:
        problem = f"cannot hold this model: it lacks {left}, and has {surplus} too many"
        raise ModelError(f"{type(stock).__name__} {problem}")
    read = ([(n, _read_weight(*sources[n], stock.dtype)) for n in names] for names, _ in stored)

    def values() -> Iterator[Tensor]:
        for weights in map(dict, read):
            half = stock.dtype == torch.float16  # its largest number is 65,504
            if over := [name for name, w in weights.items() if half and not w.isfinite().all()]:
                raise ModelError(f"{over[:4]} do not fit into float16; export bfloat16 or float32")
            yield from revert_weight_conversion(stock, weights).values()

    try:
        if _is_main():
            with atomic_directory(directory) as aside:
                stock.save_pretrained(aside, state_dict={})  # the configs
                # clones: parts of a converted tensor would count as all of it
                tensors = {n: tensor.clone() for _, own in stored for n, tensor in own.items()}
                write_files(aside, tensors, values())
                encoder.export_tokenizer(aside)
                write_for_older_readers(aside)
    finally:
        collections.deque(read, maxlen=0)  # the other ranks only gather


def _stored_tensors(stock: PreTrainedModel) -> list[tuple[list[str], dict[str, Tensor]]]:
    """(weights, one each if possible; the tensors, on the meta device, that they become in files)."""
    state = remove_tied_weights_from_state_dict(stock.state_dict(), stock)
    files = revert_weight_conversion(stock, state)
    if files is state:
        return [([name], {name: state[name]}) for name in sorted(state)]
    alone = [([n], revert_weight_conversion(stock, {n: state[n]})) for n in sorted(state)]
    shapes = {name: tensor.shape for _, part in alone for name, tensor in part.items()}
    if shapes == {name: tensor.shape for name, tensor in files.items()}:
        return alone
    return [(sorted(state), files)]  # several weights of the model are one in its files


def _targets(backbone: nn.Module, layers: dict[str, LoraLayer]) -> list[str]:
    """Short names if they match exactly these layers, else the layers' full names."""
    linear = [n for n, m in backbone.named_modules() if isinstance(m, (nn.Linear, LoraLayer))]
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    matched = {name for name in linear if name.rsplit(".", 1)[-1] in short}
    return short if matched == set(layers) else sorted(layers)
