"""From a recipe to what a run starts with: groups of each split, and the model with its heads and adapters.

The test set is read only to prove that no prompt of it is trained on. Start at `read_splits` and
`build_model`.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hafrm.data.encoding import Encoder
from hafrm.data.reader import PreferenceData, parse_sources, read_preferences
from hafrm.data.splits import check_leakage, mix, split_by_prompt, without_prompts
from hafrm.engine.model import (
    HybridModel,
    hidden_size,
    longest_sequence,
    new_reward_head,
    sharing_obstacle,
    split_causal_lm,
)
from hafrm.errors import ConfigError, ModelError
from hafrm.preferences import Group
from hafrm.recipe import DataSection, LoraSection, Recipe, Section
from hafrm.scoring.loading import (
    has_bfloat16,
    head_directory,
    load_base,
    load_tokenizer,
    meta_causal_lm,
    starting_reward_head,
)
from hafrm.training import parallel
from hafrm.training.methods import Method

log = logging.getLogger("hafrm")
Root = TypeVar("Root", bound=Section)

# Outside users' seeds: a test split made with the same seed has already taken the prompts to hold out.
VALIDATION_SEED = 2**32


def read_splits(
    recipe: Recipe, bad_rows_file: Path | None = None
) -> tuple[PreferenceData, Sequence[Group], Sequence[Group], int]:
    """(what was read, training groups, validation groups, number of groups dropped because another split
    has their prompt). Raises DataError for unusable data and for shared prompts."""
    data, seed = recipe.data, recipe.training.seed
    options = data.reading_options
    reading = read_preferences(data.train, bad_rows_file=bad_rows_file, **options)
    train: Sequence[Group] = _mixed(reading, data, seed)

    def read(sources: Sequence[str]) -> Sequence[Group]:
        return read_preferences(sources, **options).groups if sources else ()

    validation, test = read(data.validation), read(data.test)
    if not data.validation:
        fraction, seed = data.validation_fraction, VALIDATION_SEED + seed
        train, validation = split_by_prompt(train, fraction=fraction, seed=seed)
    num_groups = len(train) + len(validation)
    if data.shared_prompts == "drop":
        validation = without_prompts(validation, test)
        train = without_prompts(without_prompts(train, validation), test)
    check_leakage(train, test, names=("data.train", "data.test"))
    check_leakage(validation, test, names=("data.validation", "data.test"))
    check_leakage(train, validation, names=("data.train", "data.validation"))
    return reading, train, validation, num_groups - len(train) - len(validation)


def _mixed(reading: PreferenceData, data: DataSection, seed: int) -> Sequence[Group]:
    """The training groups, capped and weighted per set."""
    ends = list(itertools.accumulate(reading.num_groups))
    sets = [reading.groups[end - n : end] for end, n in zip(ends, reading.num_groups, strict=True)]
    weights: list[float] | None = None
    if data.weights is not None:
        # An entry may name several sets, which all get its weight.
        pairs = zip(data.train, data.weights, strict=True)
        weights = [weight for entry, weight in pairs for _ in parse_sources(entry)]
    return mix(sets, weights=weights, cap=data.cap, seed=seed)


def build_encoder(recipe: Recipe, **changes: Any) -> Encoder:
    """The encoder that the recipe trains with, or one with other options."""
    data = recipe.data
    names = ("max_length", "max_prompt_length", "too_long")
    options = {name: getattr(data, name) for name in names} | changes
    return Encoder(load_tokenizer(recipe.model), **options)


def with_precision(recipe: Root, device: str) -> Root:
    """The recipe with `training.precision: auto` replaced by what the device type computes in; the run's
    copy of the recipe records it."""
    if dict(recipe)["training"].precision != "auto":
        return recipe
    precision = "bf16" if has_bfloat16(device) else "fp32"
    if parallel.is_main():
        log.info("training.precision auto: %s on %s", precision, device)
    return with_training(recipe, precision=precision)


def with_training(recipe: Root, **changes: Any) -> Root:
    """The recipe, of any kind, with other values in its section `training`."""
    training = dict(recipe)["training"].model_copy(update=changes)
    return recipe.model_copy(update={"training": training})


def build_model(
    recipe: Recipe, method: Method, encoder: Encoder, device: torch.device
) -> HybridModel:
    """The backbone with the heads that the method trains, and LoRA if the recipe asks for it."""
    causal = load_base(recipe.model, starting_dtype(recipe), device, policy=method.trains_policy)
    backbone, policy_head = split_causal_lm(causal)
    check_vocabulary(backbone.config, encoder)
    model = assemble(backbone, policy_head, recipe, method)
    start_reward_head(model, recipe, method)
    if recipe.training.compile:
        model.compile_layers()
    return model.to(device)


def start_reward_head(model: HybridModel, recipe: Recipe, method: Method) -> None:
    """Start from the base's reward head, if it has one and the recipe does not ask for a new one."""
    stored = starting_reward_head(recipe.model, hidden_size(model.backbone.config))
    place = head_directory(recipe.model.path, "reward")
    if model.reward_head is not None:
        # a resumed run is built the same way: "a new one" would suggest that its trained head was lost
        if stored is not None or recipe.model.reward_head == "new":
            log.info("reward head: %s", "a new one" if stored is None else f"that of {place}")
        if stored is not None:
            with torch.no_grad():
                model.reward_head.weight.copy_(stored)
    elif stored is not None:
        log.warning("method %s does not train the reward head of %s", method.name, place)


def starting_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype to load the base model in: bfloat16 if it is frozen and computes in bfloat16."""
    frozen_half = recipe.lora is not None and recipe.training.precision == "bf16"
    return torch.bfloat16 if frozen_half else torch.float32


def meta_model(config: PretrainedConfig, recipe: Recipe, method: Method) -> HybridModel:
    """The model of `build_model` on torch's meta device, made without drawing random numbers."""
    causal = meta_causal_lm(config, recipe.model.path, dtype=starting_dtype(recipe))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return assemble(causal.base_model, causal.get_output_embeddings(), recipe, method)


def assemble(
    backbone: PreTrainedModel, policy_head: nn.Linear, recipe: Recipe, method: Method
) -> HybridModel:
    """The recipe's HybridModel around a loaded base model, or around one on the meta device."""
    lora, training = recipe.lora, recipe.training
    # tried before there are float32 adapters, which need autocast
    sharing = training.sharing == "auto" and sharing_obstacle(backbone) is None
    if lora is not None:
        backbone.requires_grad_(False)
        policy_head.requires_grad_(False)
        inject_lora(lora, backbone, under_autocast=training.precision == "bf16")
    head = None
    if method.trains_reward:
        generator = torch.Generator().manual_seed(training.seed)
        head = new_reward_head(hidden_size(backbone.config), generator)
    model = HybridModel(
        backbone,
        reward_head=head,
        policy_head=policy_head if method.trains_policy else None,
        sharing=sharing,
    )
    model.transform = replace(model.transform, normalised=not method.reads_logits)
    if training.gradient_checkpointing:
        model.checkpoint_activations(offload=training.offload in ("activations", "all"))
    return model


def inject_lora(
    lora: LoraSection, backbone: PreTrainedModel, *, under_autocast: bool = False
) -> None:
    """Put float32 adapters into the backbone's linear layers; ConfigError if lora.targets matches none.

    `under_autocast`: the backbone always runs under autocast, which casts; peft would copy inputs too.
    """
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    scale: Any = lora.alpha  # typed int upstream, used as a factor
    config = LoraConfig(
        r=lora.rank, lora_alpha=scale, target_modules=targets, lora_dropout=0.0, bias="none"
    )
    linear = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    allowed = f"it has {sorted({name.rsplit('.', 1)[-1] for name in linear})}"
    try:
        inject_adapter_in_model(config, backbone)
    except ValueError as error:
        raise ConfigError(
            f"lora.targets {lora.targets!r} matches no linear layer of this model; {allowed}"
        ) from error
    layers = {n: m for n, m in backbone.named_modules() if isinstance(m, LoraLayer)}
    # experts and routers kept as parameters, embeddings: their adapters cannot be merged or exported
    for name, layer in layers.items():
        if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            raise ConfigError(
                f"lora.targets {lora.targets!r} takes {name}, which is not a linear layer: name the layers "
                f"to adapt; {allowed}"
            )
    # PEFT silently drops a name that matches nothing if another name matches
    for target in () if isinstance(targets, str) else targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ConfigError(
                f"lora.targets names {target!r}, which is not a linear layer of the backbone; {allowed}"
            )
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    for layer in layers.values() if under_autocast else ():
        layer.cast_input_dtype_enabled = False


def check_length(config: PretrainedConfig, recipe: Recipe) -> None:
    """Raise ConfigError if the model takes fewer than data.max_length tokens."""
    longest = longest_sequence(config)
    if longest is not None and recipe.data.max_length > longest:
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}, but the model takes {longest} tokens: lower it"
        )


def check_vocabulary(config: PretrainedConfig, encoder: Encoder) -> None:
    """Raise if the model lacks embeddings for some token."""
    vocab_size = config.get_text_config().vocab_size
    if len(encoder.tokenizer) > vocab_size:
        raise ModelError(
            f"the tokenizer has {len(encoder.tokenizer)} tokens, the model {vocab_size}: use "
            "the tokenizer that the model came with"
        )
