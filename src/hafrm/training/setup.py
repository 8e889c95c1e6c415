"""From a recipe to what a run starts with: encoded groups, and the model with its heads and adapters.

Data are read, mixed, split by prompt, checked for leakage and tokenised. The test set is read only to
prove that no prompt of it is trained on. Start at `prepare_data` and `build_model`.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hafrm.data.chat_template import choose_pad, read_template
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
from hafrm.errors import ConfigError, DataError, ModelError
from hafrm.preferences import Group, TokenizedGroup
from hafrm.recipe import DataSection, LoraSection, ModelSection, Recipe
from hafrm.scoring.loading import has_bfloat16
from hafrm.training import parallel
from hafrm.training.methods import Method

log = logging.getLogger("hafrm")

NUM_GOLDEN = 16  # held-out conversations whose scores are exported
VALIDATION_SEED = 2**32
"""Beyond the seeds that a user can split with: cut by the same hash as a user's own test split, nothing
would be left to validate on."""


@dataclass(frozen=True)
class PreparedData:
    """Encoded groups, and how many rows became what."""

    encoder: Encoder
    train: list[TokenizedGroup]
    validation: list[TokenizedGroup]
    golden: list[Group]  # held-out conversations whose scores are exported for consumers to replay
    counts: dict[str, Any]


def prepare_data(recipe: Recipe, bad_rows_file: Path | None = None) -> PreparedData:
    """Read, split by prompt, check for leakage, and encode.

    Raises DataError for unusable data, for prompts shared between splits, and for an empty split.
    """
    encoder = build_encoder(recipe)
    splits = read_splits(recipe, bad_rows_file)
    train, report = encoder.encode(splits.train)
    validation, _ = encoder.encode(splits.validation)
    for name, groups in (("data.train", train), ("data.validation", validation)):
        if not any(not c.tie for group in groups for c in group.comparisons):
            raise DataError(
                f"{name} holds no comparison that is not a tie; add preference data to it"
            )
    counts = {
        "rows": splits.reading.num_rows,
        "bad_rows": len(splits.reading.bad_rows),
        "left_out": splits.reading.left_out,
        "groups_with_shared_prompts_dropped": splits.num_dropped,
        "train_groups": len(train),
        "validation_groups": len(validation),
        "train_comparisons": sum(len(group.comparisons) for group in train),
        "ties_not_trained_on": sum(c.tie for group in train for c in group.comparisons),
        "encoding": asdict(report),
    }
    return PreparedData(encoder, train, validation, list(splits.validation[:NUM_GOLDEN]), counts)


class Splits(NamedTuple):
    """Groups to train on and to validate on."""

    reading: PreferenceData
    train: Sequence[Group]
    validation: Sequence[Group]
    num_dropped: int  # groups left out because another split has their prompt


def read_splits(recipe: Recipe, bad_rows_file: Path | None = None) -> Splits:
    """Read and split by prompt; raises DataError for unusable data and for shared prompts."""
    data, seed, bad = recipe.data, recipe.training.seed, recipe.data.max_bad_fraction
    reading = read_preferences(data.train, max_bad_fraction=bad, bad_rows_file=bad_rows_file)
    train: Sequence[Group] = _mixed(reading, data, seed)
    validation: Sequence[Group]
    if data.validation:
        validation = read_preferences(data.validation, max_bad_fraction=bad).groups
    else:
        train, validation = split_by_prompt(
            train, fraction=data.validation_fraction, seed=VALIDATION_SEED + seed
        )
    test: Sequence[Group] = ()
    if data.test:
        test = read_preferences(data.test, max_bad_fraction=bad).groups
    num_groups = len(train) + len(validation)
    if data.shared_prompts == "drop":
        validation = without_prompts(validation, test)
        train = without_prompts(train, [*validation, *test])
    check_leakage([*train, *validation], test, names=("data.train", "data.test"))
    check_leakage(train, validation, names=("data.train", "data.validation"))
    return Splits(reading, train, validation, num_groups - len(train) - len(validation))


def _mixed(reading: PreferenceData, data: DataSection, seed: int) -> list[Group]:
    """The training groups, capped and weighted set by set."""
    ends = list(itertools.accumulate(reading.num_groups))
    sets = [reading.groups[end - n : end] for end, n in zip(ends, reading.num_groups, strict=True)]
    weights: list[float] | None = None
    if data.weights is not None:
        # An entry may name several sets, which share its weight.
        weights = [
            weight
            for entry, weight in zip(data.train, data.weights, strict=True)
            for _ in parse_sources(entry)
        ]
    return mix(sets, weights=weights, cap=data.cap, seed=seed)


def build_encoder(recipe: Recipe) -> Encoder:
    """The encoder that the recipe trains with."""
    data = recipe.data
    return Encoder(
        load_tokenizer(recipe.model),
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        too_long=data.too_long,
    )


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerFast:
    """The base model's tokenizer, with its section's template and a pad of its own.

    Raises ModelError when there is no fast tokenizer or no pad, ConfigError for an unknown template.
    """
    path, revision = model.path, model.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        spare = AutoConfig.from_pretrained(path, revision=revision).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a tokenizer from model.path {path!r}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"model.path {path!r} has a slow tokenizer ({type(tokenizer).__name__}); convert it to a "
            "tokenizer.json"
        )
    if model.chat_template is not None:
        tokenizer.chat_template = read_template(model.chat_template)
    try:
        choose_pad(tokenizer)
    except ModelError:
        # Phi-2 has no token to spare for padding, but more embeddings than tokens: use one of those.
        if len(tokenizer) >= spare:
            raise
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def with_precision(recipe: Recipe, device: str) -> Recipe:
    """The recipe with training.precision decided for a device type; a run's own copy records that."""
    return with_training(recipe, precision=choose_precision(recipe.training.precision, device))


def with_training(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other values in its section `training`."""
    training = recipe.training.model_copy(update=changes)
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
    """The backbone with the heads that the method trains, and LoRA where the recipe asks for it."""
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
    """The causal LM to start from; raises ModelError when it cannot be loaded whole."""
    path, revision = model.path, model.revision
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            # each weight goes there as it is read: the host never holds the whole model
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
    """The model of `build_model` on torch's meta device, drawing no random number.

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
