"""Directories that stock transformers saves, as models that score: whole, or refused.

What lacks weights is refused, because transformers would fill them in at random: a score from a fresh
head is worse than none. Only safetensors are read, never a pickle, and no code of a model directory is
run. Nothing here scores.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
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
from hafrm.errors import ConfigError, ModelError

log = logging.getLogger("hafrm")

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What weights can be loaded in, by name; auto is the checkpoint's dtype on a GPU, float32 on a CPU."""
_UNBOUNDED = 2**20
"""Length limit of models that have no position limit."""


@dataclass(frozen=True)
class Placement:
    """Where models are run, and in what."""

    dtype: str = "auto"
    """One of DTYPES."""
    device: str | None = None
    """None: the GPU where there is one, else the CPU."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise ConfigError(
                f"--device must be cpu, cuda or cuda:1, got {self.device!r}"
            ) from None

    def options(self, max_length: int | None) -> dict[str, Any]:
        """What `from_pretrained` takes."""
        return {"dtype": self.dtype, "device": self.device, "max_length": max_length}


AUTO = Placement()


def choose_dtype(
    path: str | Path, dtype: torch.dtype | str, device: str | torch.device | None
) -> torch.dtype:
    """The dtype that weights are loaded in; `auto` follows the checkpoint on a GPU, which says so in the
    log, and is float32 on a CPU, where half precision is neither faster nor better."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, Placement(dtype).dtype)
        return chosen
    kind = torch.device(device or default_device()).type
    stored = torch.float32 if kind == "cpu" else load_config(path).dtype
    for half in (torch.float16, torch.bfloat16):
        if stored == half and (half == torch.float16 or has_bfloat16(kind)):
            log.info("%s runs in %s, as it is stored (otherwise: --dtype float32)", path, half)
            return half
    return torch.float32


def has_bfloat16(device: str) -> bool:
    """Whether a device type computes in bfloat16 natively; a GPU that is not here is taken to."""
    if device != "cuda" or not torch.cuda.is_available():
        return device == "cuda"
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def load_reward(
    path: str | Path, *, dtype: torch.dtype | str, device: str | torch.device | None
) -> HybridModel:
    """A `...ForSequenceClassification` with one label and a trained linear head.

    Raises ModelError for anything else.
    """
    loaded, missing = _load(
        AutoModelForSequenceClassification, path, choose_dtype(path, dtype, device)
    )
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
    path: str | Path, *, dtype: torch.dtype | str, device: str | torch.device | None
) -> HybridModel:
    """A `...ForCausalLM` that scores; raises ModelError for anything else."""
    dtype = choose_dtype(path, dtype, device)
    backbone, head = split_causal_lm(load_causal_lm(path, dtype=dtype, device="cpu"))
    model = HybridModel(backbone, policy_head=head, sharing=sharing_obstacle(backbone) is None)
    return model.to(device or default_device())


def load_causal_lm(
    path: str | Path, *, dtype: torch.dtype | str, device: str | torch.device | None = None
) -> PreTrainedModel:
    """A stock `...ForCausalLM` that writes; raises ModelError for anything else."""
    loaded, missing = _load(AutoModelForCausalLM, path, choose_dtype(path, dtype, device))
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
