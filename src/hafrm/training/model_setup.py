"""From a recipe to the model that is trained: its precision, its weights, its heads, its adapters."""

import logging
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hafrm.data.encoding import Encoder
from hafrm.engine.model import (
    HybridModel,
    hidden_size,
    longest_sequence,
    new_reward_head,
    sharing_obstacle,
    split_causal_lm,
)
from hafrm.errors import ConfigError, ModelError
from hafrm.recipe import LoraSection, ModelSection, Recipe
from hafrm.scoring.loading import has_bfloat16
from hafrm.training import parallel
from hafrm.training.methods import Method

log = logging.getLogger("hafrm")


def with_precision(recipe: Recipe, device: str) -> Recipe:
    """The recipe with training.precision decided for a device type, `cuda` or `cpu`.

    A run's own copy records what it computed in, and a resume on another machine cannot change that.
    """
    precision = choose_precision(recipe.training.precision, device)
    training = recipe.training.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"training": training})


def choose_precision(precision: str, device: str) -> str:
    """`bf16` or `fp32`: the recipe's word, or for `auto` what the device type computes in."""
    if precision != "auto":
        return precision
    precision = "bf16" if has_bfloat16(device) else "fp32"
    if parallel.is_main():
        log.info("training.precision auto: %s on %s", precision, device)
    return precision


def build_model(
    recipe: Recipe, method: Method, encoder: Encoder, device: torch.device
) -> HybridModel:
    """The backbone with the heads that the method trains; LoRA injected where the recipe asks for it.

    A head that the method does not train is left out, so it costs neither memory nor time.
    """
    backbone, policy_head = split_causal_lm(load_base(recipe.model, starting_dtype(recipe), device))
    _check_fits(backbone, encoder, recipe)
    model = assemble(backbone, policy_head, recipe, method)
    if recipe.training.compile:
        model.compile_layers()
    return model.to(device)


def starting_dtype(recipe: Recipe) -> torch.dtype:
    """What the base model is loaded in: bfloat16 where it is frozen and computes in it."""
    frozen_half = recipe.lora is not None and recipe.training.precision == "bf16"
    return torch.bfloat16 if frozen_half else torch.float32


def load_base(
    model: ModelSection, dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """The causal LM to start from; raises ModelError when it cannot be loaded whole.

    With a `device` each weight goes there as it is read, so that the host never holds the whole model.
    """
    path, revision = model.path, model.revision
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            device_map=None if device is None else {"": device},
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a causal LM from model.path {path!r}: {error}") from error
    causal, info = loaded
    if info["missing_keys"]:
        raise ModelError(
            f"model.path {path!r} lacks weights for {sorted(info['missing_keys'])}, which would start "
            "random; give the checkpoint of a causal LM with its LM head"
        )
    return cast("PreTrainedModel", causal)


def meta_model(config: PretrainedConfig, recipe: Recipe, method: Method) -> HybridModel:
    """The model of `build_model` on torch's meta device: shapes without contents; draws no random number.

    Raises ModelError for a config that is no causal LM's.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            causal = AutoModelForCausalLM.from_config(config, dtype=starting_dtype(recipe))
        except ValueError as error:
            path = recipe.model.path
            raise ModelError(f"model.path {path!r} is no causal LM: {error}") from error
        return assemble(causal.base_model, causal.get_output_embeddings(), recipe, method)


def assemble(
    backbone: PreTrainedModel, policy_head: nn.Linear, recipe: Recipe, method: Method
) -> HybridModel:
    """The recipe's HybridModel around a loaded base model, or around one on the meta device."""
    lora, training = recipe.lora, recipe.training
    if lora is not None:
        backbone.requires_grad_(False)
        policy_head.requires_grad_(False)
        inject_lora(lora, backbone)
        if training.precision == "bf16":
            leave_casting_to_autocast(backbone)
    head = None
    if method.trains_reward:
        generator = torch.Generator().manual_seed(training.seed)
        head = new_reward_head(hidden_size(backbone.config), generator)
    model = HybridModel(
        backbone,
        reward_head=head,
        policy_head=policy_head if method.trains_policy else None,
        sharing=training.sharing == "auto" and sharing_obstacle(backbone) is None,
    )
    if training.gradient_checkpointing:
        model.checkpoint_activations()
    return model


def inject_lora(lora: LoraSection, backbone: PreTrainedModel) -> None:
    """Put float32 adapters into the backbone's linear layers; the heads are not adapted.

    Raises ConfigError when lora.targets matches no linear layer.
    """
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    scale: Any = lora.alpha  # typed int upstream, used as a factor
    config = LoraConfig(
        r=lora.rank, lora_alpha=scale, target_modules=targets, lora_dropout=0.0, bias="none"
    )
    try:
        inject_adapter_in_model(config, backbone)
    except ValueError as error:
        names = sorted(
            {n.rsplit(".", 1)[-1] for n, m in backbone.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ConfigError(
            f"lora.targets {lora.targets!r} matches no linear layer of this model; it has {names}"
        ) from error
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def leave_casting_to_autocast(backbone: PreTrainedModel) -> None:
    """Keep peft from copying every adapted layer's input to float32, which autocast would cast back to
    bfloat16. The model then runs under autocast only."""
    for module in backbone.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def _check_fits(backbone: PreTrainedModel, encoder: Encoder, recipe: Recipe) -> None:
    """Raise for lengths and token ids that the data may bring and the model does not have."""
    config = backbone.config.get_text_config()
    longest = longest_sequence(backbone.config)
    if longest is not None and recipe.data.max_length > longest:
        why = ""
        if getattr(config, "max_position_embeddings", longest) > longest:
            why = ", because a longer one would change the rotary factors of all others packed with it"
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}, but the model takes {longest} tokens{why}; "
            f"set data.max_length to {longest} or less"
        )
    if len(encoder.tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(encoder.tokenizer)} tokens, the model {config.vocab_size}: some ids "
            "have no embedding; use the tokenizer that the model came with"
        )
