"""From a recipe to what the loop runs on: encoded data, the model, the reference's log-probs.

Everything here happens before the first step. Nothing is trained, and the test set is only looked at
to prove that no prompt of it is trained on.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hafrm.data.chat_template import choose_pad, read_template
from hafrm.data.encoding import Encoder
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
from hafrm.recipe import LoraSection, ModelSection, Recipe
from hafrm.training.methods import Method
from hafrm.training.parts import NUM_GOLDEN, read_parts


@dataclass(frozen=True)
class PreparedData:
    """Encoded groups, and what became of the rows."""

    encoder: Encoder
    train: list[TokenizedGroup]
    validation: list[TokenizedGroup]
    golden: list[Group]
    """Held-out conversations whose scores are exported for consumers to replay."""
    counts: dict[str, Any]


def prepare_data(recipe: Recipe, bad_rows_file: Path | None = None) -> PreparedData:
    """Read, split by prompt, check for leakage, and encode.

    Raises DataError for unusable data, for prompts shared between parts, and for an empty part.
    """
    encoder = build_encoder(recipe)
    parts = read_parts(recipe, bad_rows_file)
    reading, train, validation = parts.reading, parts.train, parts.validation
    encoded_train, report = encoder.encode(train)
    encoded_validation, _ = encoder.encode(validation)
    for name, part in (("data.train", encoded_train), ("data.validation", encoded_validation)):
        if not any(not c.tie for group in part for c in group.comparisons):
            raise DataError(
                f"{name} holds no comparison that is not a tie; add preference data to it"
            )
    counts = {
        "rows": reading.num_rows,
        "bad_rows": len(reading.bad_rows),
        "left_out": reading.left_out,
        "groups_with_shared_prompts_dropped": parts.num_dropped,
        "train_groups": len(encoded_train),
        "validation_groups": len(encoded_validation),
        "train_comparisons": sum(len(group.comparisons) for group in encoded_train),
        "ties_not_trained_on": sum(c.tie for group in encoded_train for c in group.comparisons),
        "encoding": asdict(report),
    }
    return PreparedData(
        encoder, encoded_train, encoded_validation, list(validation[:NUM_GOLDEN]), counts
    )


def build_encoder(recipe: Recipe) -> Encoder:
    """The encoder that the recipe trains with; raises as `load_tokenizer` does."""
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
            "tokenizer.json, which every current checkpoint ships"
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


def build_model(
    recipe: Recipe, method: Method, encoder: Encoder, device: torch.device
) -> HybridModel:
    """The backbone with the heads that the method trains; LoRA injected where asked.

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


def assemble(
    backbone: PreTrainedModel, policy_head: nn.Linear, recipe: Recipe, method: Method
) -> HybridModel:
    """The recipe's HybridModel around a loaded base model, or around one without contents."""
    lora, training = recipe.lora, recipe.training
    if lora is not None:
        backbone.requires_grad_(False)
        policy_head.requires_grad_(False)
        inject_lora(lora, backbone)
        if training.precision == "bf16":
            leave_casting_to_autocast(backbone)
    generator = torch.Generator().manual_seed(training.seed)
    head = (
        new_reward_head(hidden_size(backbone.config), generator) if method.trains_reward else None
    )
    shares = training.sharing == "auto" and sharing_obstacle(backbone) is None
    model = HybridModel(
        backbone,
        reward_head=head,
        policy_head=policy_head if method.trains_policy else None,
        sharing=shares,
    )
    if training.gradient_checkpointing:
        model.checkpoint_activations()
    return model


def _check_fits(backbone: PreTrainedModel, encoder: Encoder, recipe: Recipe) -> None:
    """The lengths and ids that the data will bring must exist in the model."""
    config = backbone.config.get_text_config()
    longest = longest_sequence(backbone.config)
    if longest is not None and recipe.data.max_length > longest:
        more = getattr(config, "max_position_embeddings", longest) > longest
        why = (
            ", because longer ones would change the rotary factors of others in a row"
            if more
            else ""
        )
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}, but the model takes {longest} tokens{why}; "
            f"set data.max_length to {longest} or less"
        )
    if len(encoder.tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(encoder.tokenizer)} tokens, the model {config.vocab_size}: some ids "
            "have no embedding; use the tokenizer that the model came with"
        )


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
    """Keep peft from making a float32 copy of every adapted layer's input, of which autocast would make a
    bfloat16 one again. The model then runs under autocast only."""
    for module in backbone.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
