"""Find and load models: `find_heads` in a run folder, `load_*` to score with, `load_base` to train from.

Models to score with are read from safetensors, never from a pickle. A base is a causal LM, a reward model,
an adapter, or a run; `check_base` looks at its configs and headers before any data is read.
"""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hafrm.atomic import fingerprint
from hafrm.data.chat_template import choose_pad, read_template
from hafrm.data.encoding import Encoder
from hafrm.engine.model import (
    HybridModel,
    hidden_size,
    longest_sequence,
    sharing_obstacle,
    split_causal_lm,
    with_dropout,
)
from hafrm.errors import ConfigError, ModelError
from hafrm.recipe import ModelSection, PolicySection
from hafrm.scoring.model_files import (
    ADAPTER,
    check_complete,
    check_shapes,
    check_unquantised,
    default_device,
    find_adapter,
    is_classifier,
    load_any_tokenizer,
    load_config,
    load_parts,
    load_whole,
    model_errors,
    nf4_config,
    settle_nf4,
    stored_reward_head,
    stored_tensors,
)

log = logging.getLogger("hafrm")

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes of loaded weights. auto: the checkpoint's dtype on a GPU, float32 on a CPU."""
_OF_A_HEAD = {
    *("architectures", "id2label", "label2id", "num_labels", "problem_type", "dtype"),
    *("_name_or_path", "transformers_version", "tie_word_embeddings", "use_cache"),
}
"""Config keys in which a run's two exports may differ."""


@dataclass(frozen=True)
class Heads:
    """The directories of the heads that a model path refers to."""

    reward: Path | None
    policy: Path | None


def find_heads(path: str | os.PathLike[str]) -> Heads:
    """Reward and policy directories of a run folder, of its `model/`, or the directory itself."""
    root = Path(_checked_path(path))
    for folder in (root / "model", root):  # a run folder has its exports in model/
        reward, policy = (p if p.is_dir() else None for p in (folder / "reward", folder / "policy"))
        if reward or policy:
            return Heads(reward, policy)
    if root.is_dir() and not any((root / name).is_file() for name in ("config.json", ADAPTER)):
        raise ModelError(
            f"{root} holds no model: neither model/reward nor model/policy nor a config.json (a run has "
            "none before its end)"
        )
    if not root.exists() and not root.is_absolute():
        log.info(
            "there is no folder %s here: asking the Hugging Face hub for a model of this name", root
        )
    adapter = find_adapter(root)
    is_reward = is_classifier(load_config(root)) if adapter is None else adapter.scores
    return Heads(root, None) if is_reward else Heads(None, root)


def head_directory(path: str | os.PathLike[str], head: Literal["reward", "policy"]) -> str | Path:
    """One head's directory in a run folder or its `model/`; any other path or hub id as it is."""
    folders = (Path(_checked_path(path)) / "model" / head, Path(path) / head)
    return next((folder for folder in folders if folder.is_dir()), os.fspath(path))


def _checked_path(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    if not isinstance(path, str | os.PathLike):
        raise ModelError(f"a model is the path of a run or directory, or a hub id; got {path!r}")
    return path


def base_directory(path: str) -> str:
    """A run folder's policy, else its reward model, to start training from; any other path as it is."""
    policy = head_directory(path, "policy")
    return str(head_directory(path, "reward") if policy == path else policy)


@dataclass(frozen=True)
class Placement:
    """The device that models run on, and the dtype of their weights."""

    dtype: str = "auto"  # one of DTYPES
    device: str | None = None  # None: a GPU if there is one, else the CPU

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype (--dtype) must be one of {', '.join(DTYPES)}, got {self.dtype!r}"
            )
        try:
            device = torch.device(self.device or "cpu")
        except RuntimeError:
            raise ConfigError(
                f"device (--device) must be cpu, cuda or cuda:1, got {self.device!r}"
            ) from None
        if device.type == "cuda" and (device.index or 0) >= (num := torch.cuda.device_count()):
            raise ConfigError(
                f"device (--device) is {self.device}, but this torch sees {num} GPUs; on a machine with a "
                "GPU, is its CUDA build installed?"
            )


AUTO = Placement()


def choose_dtype(
    path: str | Path,
    dtype: torch.dtype | str,
    device: str | torch.device | None,
    revision: str | None = None,
) -> torch.dtype:
    """The dtype to load weights in: `auto` is the checkpoint's on a GPU, which is logged, else float32."""
    named = "auto" if isinstance(dtype, torch.dtype) else dtype
    Placement(named, None if device is None else str(device))  # raises ConfigError
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return cast("torch.dtype", getattr(torch, dtype))
    kind = torch.device(device or default_device()).type
    # on a CPU half precision is neither faster nor more accurate
    stored = torch.float32 if kind == "cpu" else load_config(path, revision).dtype
    for half in (torch.float16, torch.bfloat16):
        if stored == half and (half == torch.float16 or has_bfloat16(kind)):
            log.info("%s runs in %s, as it is stored (otherwise: --dtype float32)", path, half)
            return half
    return torch.float32


def has_bfloat16(device: str) -> bool:
    """Whether a device type computes in bfloat16 natively; assumed for a GPU that this machine lacks."""
    if device != "cuda" or not torch.cuda.is_available():
        return device == "cuda"
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def load_reward(
    path: str | Path, *, dtype: torch.dtype | str, device: str | torch.device | None
) -> HybridModel:
    """A `...ForSequenceClassification` with one label and a linear head; ModelError for anything else."""
    dtype = choose_dtype(path, dtype, device)
    loaded = load_whole(AutoModelForSequenceClassification, path, dtype, device)
    if (num := loaded.config.num_labels) != 1:
        raise ModelError(f"{path} has {num} labels, but a reward model has one")
    head = getattr(loaded, "score", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{path} is a {type(loaded).__name__} without a linear `score` head")
    if find_adapter(
        path
    ):  # an adapter has no config, and its reward is read where its tokenizer ends a turn
        loaded.config.get_text_config().pad_token_id = load_any_tokenizer(path).pad_token_id
    backbone = loaded.base_model
    return HybridModel(backbone, reward_head=head, sharing=sharing_obstacle(backbone) is None)


def shared_reward_head(directory: Path, policy: HybridModel) -> nn.Linear | None:
    """The head of an exported reward model whose backbone is the policy's, weight by weight; else None.

    The backbone of a hybrid run is exported twice, once with each head.
    """
    prefix, weights = policy.backbone.base_model_prefix, dict(policy.backbone.state_dict())
    configs = [load_config(directory), with_dropout(policy.backbone.config)]
    own, other = ({k: v for k, v in c.to_dict().items() if k not in _OF_A_HEAD} for c in configs)
    head, left = None, set(weights)
    for name, stored in stored_tensors(directory) if own == other else ():
        value, inside = stored.get_tensor(name), name.removeprefix(f"{prefix}.")
        same = weights.get(inside)
        if name == "score.weight":
            head = value
        elif same is None or not torch.equal(value.to(same), same):
            return None
        left.discard(inside)
    if head is None or left:
        return None
    score = nn.Linear(head.shape[1], 1, bias=False, device=policy.device)
    score.weight = nn.Parameter(head.to(policy.device).float())
    return score


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype | str,
    device: str | torch.device | None,
    revision: str | None = None,
) -> HybridModel:
    """A `...ForCausalLM` as a model that scores."""
    causal = load_causal_lm(path, dtype=dtype, device=device, revision=revision)
    backbone, head = split_causal_lm(causal)
    return HybridModel(backbone, policy_head=head, sharing=sharing_obstacle(backbone) is None)


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype | str,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A stock `...ForCausalLM` for generation; ModelError for anything else."""
    dtype = choose_dtype(path, dtype, device, revision)
    loaded = load_whole(AutoModelForCausalLM, path, dtype, device, revision=revision)
    return cast("PreTrainedModel", loaded)


def load_encoder(
    path: str | Path,
    config: PretrainedConfig,
    max_length: int | None,
    too_long: Literal["cut", "drop"] = "cut",
) -> Encoder:
    """The directory's tokenizer and unchanged template, for inputs of up to `max_length` tokens."""
    longest = longest_sequence(config) or 2**20  # some models have no limit
    if max_length is not None and max_length > longest:
        raise ModelError(f"max_length is {max_length}, but {path} takes at most {longest} tokens")
    limit = longest if max_length is None else max_length
    # close=False: the template is used as published, whatever it writes after the response
    return Encoder(
        load_any_tokenizer(path),
        max_length=limit,
        too_long=too_long,
        close=False,
        vocab_size=config.get_text_config().vocab_size,
    )


def model_digest(path: str | Path) -> str:
    """Identifies a model's weights: a digest of a directory's files, or a hub id's commit; for an adapter,
    together with those of its base."""
    directory, adapter = Path(path), find_adapter(path)
    base = "" if adapter is None else model_digest(adapter.base)
    if not directory.is_dir():
        return f"{path}@{getattr(load_config(path), '_commit_hash', None)}{base}"
    # not the directory's path, so that a copy is the same model
    files = sorted([*directory.glob("*.safetensors"), directory / "config.json"])
    digests = [f"{file.name} {fingerprint(file)}" for file in files if file.is_file()]
    return "sha256:" + hashlib.sha256("\n".join([*digests, *base.split()]).encode()).hexdigest()


def load_tokenizer(model: PolicySection) -> PreTrainedTokenizerFast:
    """The base model's fast tokenizer, with its section's template and its own pad token."""
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
        # Phi-2 has no token to spare for padding, but more embeddings than tokens: use a free one.
        if len(tokenizer) >= load_config(path, model.revision).get_text_config().vocab_size:
            raise
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def load_base(
    model: PolicySection, dtype: torch.dtype, device: torch.device, *, policy: bool = True
) -> PreTrainedModel:
    """The causal LM to start from; without `policy` its LM head may be random. Raises ModelError when it
    cannot be loaded whole."""
    path = base_directory(model.path)
    # None: a base may have only a pickle, which torch reads as weights alone
    options: dict[str, Any] = {"revision": model.revision, "use_safetensors": None}
    quantised = isinstance(model, ModelSection) and model.quantization is not None
    if quantised:
        options["quantization_config"] = nf4_config(path, dtype)
    causal, missing = load_parts(AutoModelForCausalLM, path, dtype, device, **options)
    if quantised:
        settle_nf4(causal, path, device)
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
    model: PolicySection, *, policy: bool = True, reward: bool = False
) -> PretrainedConfig:
    """The config of the base; ModelError for what `load_base` or an export would refuse, as far as configs
    and the headers of local files show it."""
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
            f"model.policy_from is not needed: {path} needs no other LM head; remove it"
        )
    if reward and isinstance(model, ModelSection) and Path(path).is_dir():
        starting_reward_head(model, hidden_size(config))
    if reward and type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ModelError(
            f"transformers has no sequence classifier for the {type(config).__name__} of {path}, so its "
            "reward model could not be exported: take another base"
        )
    return config


def meta_causal_lm(config: PretrainedConfig, path: str, **options: Any) -> Any:
    """A causal LM on torch's meta device, made without drawing random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
        except ValueError as error:
            raise ModelError(f"model.path {path!r} is not a causal LM: {error}") from error


def starting_reward_head(model: ModelSection, size: int) -> Float[Tensor, "1 hidden"] | None:
    """The reward head that training continues with, None for a new one.

    Raises ModelError if model.reward_head is keep and there is none, or its size differs.
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
    """The files that determine a base's log-probs; None if they come from two models."""
    return None if model.policy_from else base_directory(model.path)
