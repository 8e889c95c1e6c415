"""The model that training starts from: a causal LM, a reward model, an adapter, or a run of ours.

`check_base` looks at configs and headers before any data is read, `load_base` loads.
"""

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hafrm.data.chat_template import choose_pad, read_template
from hafrm.engine.model import hidden_size
from hafrm.errors import ConfigError, ModelError
from hafrm.recipe import ModelSection
from hafrm.scoring.loading import (
    base_directory,
    check_complete,
    head_directory,
    is_classifier,
    load_any_tokenizer,
    load_config,
    load_parts,
    load_whole,
)
from hafrm.scoring.model_files import (
    check_shapes,
    check_unquantised,
    find_adapter,
    model_errors,
    stored_reward_head,
)


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerFast:
    """The base model's fast tokenizer, with its section's template and a pad of its own."""
    path = base_directory(model.path)
    tokenizer = load_any_tokenizer(path, model.revision)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise ModelError(f"{model.path} has a slow {kind}; convert it to a tokenizer.json")
    if model.chat_template is not None:
        tokenizer.chat_template = read_template(model.chat_template)
    try:
        choose_pad(tokenizer)
    except ModelError:
        # Phi-2 has no token to spare for padding, but more embeddings than tokens: use one of those.
        if len(tokenizer) >= load_config(path, model.revision).get_text_config().vocab_size:
            raise
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def load_base(
    model: ModelSection, dtype: torch.dtype, device: torch.device, *, policy: bool = True
) -> PreTrainedModel:
    """The causal LM to start from; without `policy` its LM head may be random. Raises ModelError when it
    cannot be loaded whole."""
    path = base_directory(model.path)
    # None: a base may have only a pickle, which torch reads as weights alone
    options = {"revision": model.revision, "use_safetensors": None}
    causal, missing = load_parts(AutoModelForCausalLM, path, dtype, device, **options)
    head = causal.get_output_embeddings()
    name = next((n for n, module in causal.named_modules() if module is head), None)
    lacking = {n for n in missing if name and n.startswith(f"{name}.")}
    check_complete(causal, path, missing - lacking)
    if lacking and policy:
        if model.policy_from is None:
            raise ModelError(_no_lm_head(path))
        place = base_directory(model.policy_from)
        other = load_whole(AutoModelForCausalLM, place, dtype, "cpu", use_safetensors=None)
        with model_errors(f"the LM head of model.policy_from {place} does not fit {path}"):
            head.load_state_dict(other.get_output_embeddings().state_dict())
    return cast("PreTrainedModel", causal)


def _no_lm_head(path: str) -> str:
    return (
        f"{path} is a model without an LM head: name the model that it was trained from in "
        "model.policy_from, or train the reward alone (method.name: bt)"
    )


def check_base(
    model: ModelSection, *, policy: bool = True, reward: bool = False
) -> PretrainedConfig:
    """The config of the base; ModelError for what `load_base` or an export would refuse, as far as configs
    and the headers of local files tell."""
    path = base_directory(model.path)
    config = load_config(path, model.revision)
    check_unquantised(path, config)
    adapter = find_adapter(path, model.revision)
    check_shapes(Path(path if adapter is None else adapter.base), meta_causal_lm(config, path))
    is_headless = is_classifier(config) and not config.tie_word_embeddings
    if policy and is_headless and model.policy_from is None:
        raise ModelError(_no_lm_head(path))
    if model.policy_from is not None and not is_headless:
        raise ConfigError(
            f"model.policy_from is of no use: {path} needs no other LM head; remove it"
        )
    if reward and Path(path).is_dir():
        starting_reward_head(model, hidden_size(config))
    if reward and type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ModelError(
            f"transformers has no sequence classifier for the {type(config).__name__} of {path}, so its "
            "reward model could not be exported: take another base"
        )
    return config


def meta_causal_lm(config: PretrainedConfig, path: str, **options: Any) -> Any:
    """A causal LM on torch's meta device, drawing no random number."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
        except ValueError as error:
            raise ModelError(f"model.path {path!r} is no causal LM: {error}") from error


def starting_reward_head(model: ModelSection, size: int) -> Float[Tensor, "1 hidden"] | None:
    """The reward head that training continues with, None for a new one.

    Raises ModelError where model.reward_head says keep and there is none, or one of another size.
    """
    if model.reward_head == "new":
        return None
    path = head_directory(model.path, "reward")
    stored = stored_reward_head(path, model.revision)
    if stored is None and model.reward_head == "keep":
        raise ModelError(
            f"model.reward_head is keep, but {path} has no reward head: remove the key"
        )
    if stored is not None and stored.shape[1] != size:
        raise ModelError(
            f"the reward head of {path} has {stored.shape[1]} inputs, the model {size}"
        )
    return stored


def reference_place(model: ModelSection) -> str | None:
    """The files that a base's log-probs follow from; None where they are those of two models."""
    return None if model.policy_from else base_directory(model.path)
