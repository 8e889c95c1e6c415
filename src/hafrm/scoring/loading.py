"""Directories that stock transformers saves, as models that score: whole, or refused.

What lacks weights is refused, because transformers would fill them in at random: a score from a fresh
head is worse than none. Only safetensors are read, never a pickle, and no code of a model directory is
run. Nothing here scores.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from hafrm.atomic import fingerprint
from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel, longest_sequence, sharing_obstacle, split_causal_lm
from hafrm.errors import ModelError

_UNBOUNDED = 2**20
"""Length limit of models that have no position limit."""


def load_reward(
    path: str | Path, *, dtype: torch.dtype, device: str | torch.device | None
) -> HybridModel:
    """A `...ForSequenceClassification` with one label and a trained linear head.

    Raises ModelError for anything else.
    """
    loaded, missing = _load(AutoModelForSequenceClassification, path, dtype)
    if missing:
        kind = str((loaded.config.architectures or ["?"])[0])
        what = "it is a causal LM (a policy), not a reward model" if "CausalLM" in kind else kind
        raise ModelError(
            f"{path} lacks weights for {missing}, which would be random: {what}; give a trained reward "
            "model's directory (of a hafrm run: <run>/model/reward)"
        )
    if loaded.config.num_labels != 1:
        raise ModelError(
            f"{path} has {loaded.config.num_labels} labels, and a reward model has one: it is a "
            "classifier of another kind"
        )
    head = getattr(loaded, "score", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{path} is a {type(loaded).__name__} without a linear `score` head, which hafrm reads "
            "rewards from; decoder models such as Llama, Qwen or Gemma have one"
        )
    backbone = loaded.base_model
    model = HybridModel(backbone, reward_head=head, sharing=sharing_obstacle(backbone) is None)
    return model.to(device or default_device())


def load_reward_head(directory: str | Path) -> nn.Linear:
    """The `score` head of an exported reward model alone; raises ModelError where there is none."""
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if "score.weight" in tensors.keys():  # noqa: SIM118 - it is no dictionary
                weight = tensors.get_tensor("score.weight").float()
                head = nn.Linear(weight.shape[1], 1, bias=False)
                head.weight = nn.Parameter(weight)
                return head
    raise ModelError(f"{directory} holds no score.weight; give the export of a run's reward model")


def load_policy(
    path: str | Path, *, dtype: torch.dtype, device: str | torch.device | None
) -> HybridModel:
    """A `...ForCausalLM` that scores; raises ModelError for anything else."""
    backbone, head = split_causal_lm(load_causal_lm(path, dtype=dtype, device="cpu"))
    model = HybridModel(backbone, policy_head=head, sharing=sharing_obstacle(backbone) is None)
    return model.to(device or default_device())


def load_causal_lm(
    path: str | Path, *, dtype: torch.dtype, device: str | torch.device | None = None
) -> PreTrainedModel:
    """A stock `...ForCausalLM` that writes; raises ModelError for anything else."""
    loaded, missing = _load(AutoModelForCausalLM, path, dtype)
    if missing:
        raise ModelError(
            f"{path} lacks weights for {missing}, which would be random; give the directory of a causal "
            "LM (of a hafrm run: <run>/model/policy)"
        )
    model: PreTrainedModel = loaded.to(device or default_device())
    return model


def load_encoder(
    path: str | Path,
    config: PretrainedConfig,
    max_length: int | None,
    too_long: Literal["cut", "drop"] = "cut",
) -> Encoder:
    """The directory's tokenizer and template, taken literally, for inputs of up to `max_length` tokens.

    Raises ModelError for no usable tokenizer or template, or more length than the model has positions.
    """
    longest = longest_sequence(config) or _UNBOUNDED
    if max_length is not None and max_length > longest:
        raise ModelError(
            f"max_length is {max_length}, but {path} takes at most {longest} tokens; lower it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer from {path}: {error}") from error
    limit = longest if max_length is None else max_length
    return Encoder(tokenizer, max_length=limit, too_long=too_long, close=False)


def is_reward_directory(path: str | Path) -> bool:
    """Whether a directory or hub id is a sequence classifier's, as opposed to a causal LM's.

    Raises ModelError when there is no model.
    """
    architectures = getattr(load_config(path), "architectures", None) or [""]
    return str(architectures[0]).endswith("ForSequenceClassification")


def load_config(path: str | Path) -> PretrainedConfig:
    """The config of a directory or hub id; raises ModelError when there is no model."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no model directory and no known hub id: {error}") from error
    return config


def model_digest(path: str | Path) -> str:
    """What tells one model's weights from another's: a digest of a directory, a hub id's commit."""
    directory = Path(path)
    if not directory.is_dir():
        return f"{path}@{getattr(load_config(path), '_commit_hash', None)}"
    files = sorted([*directory.glob("*.safetensors"), directory / "config.json"])
    known = [f"{file.name} {fingerprint(file)}" for file in files if file.is_file()]
    return "sha256:" + hashlib.sha256("\n".join(known).encode()).hexdigest()


def _load(auto: Any, path: str | Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The model, and the names of the weights that its files lack."""
    try:
        loaded: tuple[Any, Mapping[str, Any]] = auto.from_pretrained(
            path, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot load a model from {path}: {error}") from error
    return loaded[0], sorted(loaded[1]["missing_keys"])


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
