"""Write a trained model as stock directories; `proof` shows that they give every consumer our scores.

Every directory has the tokenizer with the closed chat template of training. A reward model and a policy are
never one file, because vLLM refuses unknown weights.
"""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
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

from hafrm.atomic import atomic_directory
from hafrm.data.encoding import Encoder
from hafrm.engine.adjustments import with_dropout
from hafrm.engine.model import HybridModel
from hafrm.errors import ModelError
from hafrm.export.plain_model import old_rotary_keys

log = logging.getLogger("hafrm")
T = TypeVar("T")

_ADAPTER = "default"
"""PEFT's name of the one adapter."""


@dataclass(frozen=True)
class StockWeights:
    """A model's complete weights on the CPU, LoRA merged, under their stock names."""

    config: PretrainedConfig
    backbone: Mapping[str, Tensor]
    reward_head: Mapping[str, Tensor]  # a head is empty if the model lacks it
    policy_head: Mapping[str, Tensor]


def gather_weights(model: HybridModel) -> StockWeights:
    """Collect the weights on the main rank; every rank must call this for a sharded model."""
    return StockWeights(
        config=with_dropout(model.backbone.config),
        backbone=_merge_lora(model.backbone, _gather(model.backbone)),
        reward_head={} if model.reward_head is None else _gather(model.reward_head),
        policy_head={} if model.policy_head is None else _gather(model.policy_head),
    )


def export_reward(
    weights: StockWeights, encoder: Encoder, directory: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write the stock sequence classifier: backbone and `score.weight` [1, hidden], no bias.

    Raises ModelError if transformers has no such classifier, or it cannot hold the model.
    """
    if not weights.reward_head:
        raise ModelError("this model has no reward head to export; export its policy instead")
    config = copy.deepcopy(weights.config)
    config.num_labels = 1
    config.id2label, config.label2id = {0: "LABEL_0"}, {"LABEL_0": 0}
    config.problem_type = "regression"  # or servers apply a sigmoid
    stock = _stock(AutoModelForSequenceClassification, config, encoder, dtype)
    head = {f"score.{name}": value for name, value in weights.reward_head.items()}
    _write(stock, weights.backbone, head, encoder, directory)


def export_policy(
    weights: StockWeights, encoder: Encoder, directory: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write the stock causal LM: backbone and retained LM head."""
    if not weights.policy_head:
        raise ModelError("this model has no policy head to export; export its reward model instead")
    config = copy.deepcopy(weights.config)
    stock = _stock(AutoModelForCausalLM, config, encoder, dtype)
    names = {module: name for name, module in stock.named_modules()}
    name = names[stock.get_output_embeddings()]
    inputs = names[stock.get_input_embeddings()].removeprefix(f"{stock.base_model_prefix}.")
    if config.tie_word_embeddings and not torch.equal(
        weights.backbone[f"{inputs}.weight"], weights.policy_head["weight"]
    ):
        # a head of its own under a config that says tied, as merged adapters leave it: tying loses it
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
        stock = _stock(AutoModelForCausalLM, config, encoder, dtype)
    head = {f"{name}.{key}": value for key, value in weights.policy_head.items()}
    if (
        stock.generation_config is not None
    ):  # else plain `generate` writes on past the end of a turn
        ends = encoder.turn_ends(_base_generation(weights.config))
        stock.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    _write(stock, weights.backbone, head, encoder, directory)


def _base_generation(config: PretrainedConfig) -> GenerationConfig | None:
    """The generation config of the checkpoint that a config was read from, as far as it is still there."""
    try:
        return GenerationConfig.from_pretrained(config._name_or_path, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def export_adapter(
    model: HybridModel, encoder: Encoder, directory: Path, base: str, revision: str | None
) -> None:
    """Write the reward model's adapters to `base` and its head in float32, as PEFT loads them."""
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
        _write_for_older_readers(aside)


def _gather(module: nn.Module) -> dict[str, Tensor]:
    """The module's weights on the main rank."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    weights = {}
    for name, value in module.state_dict().items():
        # one at a time: ranks share host memory
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if is_main:
            weights[name] = whole.detach().cpu()
    return weights


def _merge_lora(backbone: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + scaling * B A in float32, under the names from before the adapters."""
    if not weights:
        return {}
    merged = {n.replace(".base_layer.", "."): w for n, w in weights.items() if ".lora_" not in n}
    for name, module in backbone.named_modules():
        if isinstance(module, LoraLayer):
            a, b = (weights[f"{name}.lora_{k}.{_ADAPTER}.weight"].float() for k in "AB")
            delta = module.scaling[_ADAPTER] * (b @ a)
            if getattr(module, "fan_in_fan_out", False):  # GPT-2 stores its weights transposed
                delta = delta.t()
            merged[f"{name}.weight"] = merged[f"{name}.weight"].float() + delta
    return merged


def _stock(
    auto: Any, config: PretrainedConfig, encoder: Encoder, dtype: torch.dtype
) -> PreTrainedModel:
    config.dtype = dtype
    config.pad_token_id, config.eos_token_id = encoder.pad_id, encoder.eos_id
    try:
        with torch.device("meta"):
            return cast(
                "PreTrainedModel", auto.from_config(config, dtype=dtype, trust_remote_code=False)
            )
    except ValueError as error:
        name = type(config).__name__
        raise ModelError(f"transformers has no {auto.__name__} for {name}") from error


def _write(
    stock: PreTrainedModel,
    backbone: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    encoder: Encoder,
    directory: Path,
) -> None:
    prefix, dtype = stock.base_model_prefix, stock.dtype
    state = {f"{prefix}.{name}": value.to(dtype) for name, value in backbone.items()}
    state |= {name: value.to(dtype) for name, value in head.items()}
    if dtype == torch.float16:  # its largest number is 65,504
        over = [name for name, value in state.items() if not torch.isfinite(value).all()]
        if over:
            raise ModelError(f"{over[:4]} do not fit into float16; export bfloat16 or float32")
    surplus = stock.load_state_dict(state, strict=False, assign=True).unexpected_keys
    stock.tie_weights()
    left = [name for name, parameter in stock.named_parameters() if parameter.is_meta]
    if left or surplus:
        name = type(stock).__name__
        raise ModelError(
            f"{name} cannot hold this model: it lacks {left}, and has {surplus} too many"
        )
    with atomic_directory(directory) as aside:
        stock.save_pretrained(aside)
        encoder.export_tokenizer(aside)
        _write_for_older_readers(aside)


def _targets(backbone: nn.Module, layers: dict[str, LoraLayer]) -> list[str]:
    """Short names if they match exactly these layers, else the layers' full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    matched = {
        name
        for name, module in backbone.named_modules()
        if name.rsplit(".", 1)[-1] in short and isinstance(module, (nn.Linear, LoraLayer))
    }
    return short if matched == set(layers) else sorted(layers)


def _write_for_older_readers(directory: Path) -> None:
    """Add transformers 4's keys to the JSON files of an export; version 5 reads both."""
    for name, convert in (("config.json", old_config), ("tokenizer_config.json", old_tokenizer)):
        file = directory / name
        if file.is_file():
            content = convert(json.loads(file.read_bytes()))
            text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
            file.write_text(text + "\n", encoding="utf-8")


def old_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with version 4's names for rotary settings and dtype beside 5's, nested configs too."""
    result = {
        key: old_config(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    dtype = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    # without them version 4 takes its class's default base, and says nothing (vllm-project/vllm#42624)
    return old_rotary_keys(config) | dtype | result


def old_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's config with a class that both versions have, and extra tokens under the old key."""
    result = dict(config)
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
        # or version 4's class adds token_type_ids, which decoders refuse
        result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(result.get("extra_special_tokens"), list):
        # not under both keys: version 5 would then drop them (huggingface/transformers#47838)
        result["additional_special_tokens"] = result.pop("extra_special_tokens")
    return result
