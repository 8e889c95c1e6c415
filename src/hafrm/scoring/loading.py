"""Find and load models: `find_heads` in a run folder, `load_*` from directories of stock transformers.

Models to score with are read from safetensors, never a pickle, and no code of a model directory is run.
Every other module loads configs, tokenizers and models through this one.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from hafrm.atomic import fingerprint
from hafrm.data.encoding import Encoder
from hafrm.engine.adjustments import with_dropout
from hafrm.engine.model import HybridModel, longest_sequence, sharing_obstacle, split_causal_lm
from hafrm.errors import ConfigError, ModelError
from hafrm.scoring.model_files import (
    ADAPTER,
    check_config_file,
    check_place,
    check_unquantised,
    find_adapter,
    is_head,
    merge_adapter,
    model_errors,
)

log = logging.getLogger("hafrm")

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes of loaded weights. auto: the checkpoint's dtype on a GPU, float32 on a CPU."""
FUSED_RULE = "fused.json"  # beside reward/ and policy/: how their scores are added


_OF_A_HEAD = {
    *("architectures", "id2label", "label2id", "num_labels", "problem_type", "dtype"),
    *("_name_or_path", "transformers_version", "tie_word_embeddings", "use_cache"),
}
"""What the configs of a run's two exports may differ in."""


@dataclass(frozen=True)
class Heads:
    """The directories that a model path refers to."""

    reward: Path | None
    policy: Path | None
    fused: Path | None = None  # the file with the rule of their fused score


def find_heads(path: str | os.PathLike[str]) -> Heads:
    """Reward and policy directories of a run folder, of its `model/`, or the directory itself."""
    root = Path(_checked_path(path))
    for folder in (root / "model", root):  # a run folder has its exports in model/
        reward, policy = (p if p.is_dir() else None for p in (folder / "reward", folder / "policy"))
        if reward or policy:
            rule = folder / FUSED_RULE
            # the rule of one head alone is of no use
            return Heads(reward, policy, rule if reward and policy and rule.is_file() else None)
    if root.is_dir() and not any((root / name).is_file() for name in ("config.json", ADAPTER)):
        raise ModelError(
            f"{root} holds no model: neither model/reward nor model/policy nor a config.json (a run has "
            "none before its end)"
        )
    adapter = find_adapter(root)
    is_reward = is_classifier(load_config(root)) if adapter is None else adapter.scores
    return Heads(root, None) if is_reward else Heads(None, root)


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a config is that of a `...ForSequenceClassification`."""
    return str((config.architectures or [""])[0]).endswith("ForSequenceClassification")


def head_directory(path: str | Path, head: Literal["reward", "policy"]) -> str | Path:
    """One head's directory in a run folder or its `model/`; any other path or hub id as it is."""
    folders = (Path(_checked_path(path)) / "model" / head, Path(path) / head)
    return next((folder for folder in folders if folder.is_dir()), path)


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
    device: str | None = None  # None: the GPU where there is one, else the CPU

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
    path: str | Path, dtype: torch.dtype | str, device: str | torch.device | None
) -> torch.dtype:
    """The dtype to load weights in: `auto` is the checkpoint's on a GPU, which is logged, else float32."""
    named = dtype if isinstance(dtype, str) else "auto"
    Placement(named, None if device is None else str(device))  # raises ConfigError
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return cast("torch.dtype", getattr(torch, dtype))
    kind = torch.device(device or default_device()).type
    # on a CPU half precision is neither faster nor more accurate
    stored = torch.float32 if kind == "cpu" else load_config(path).dtype
    for half in (torch.float16, torch.bfloat16):
        if stored == half and (half == torch.float16 or has_bfloat16(kind)):
            log.info("%s runs in %s, as it is stored (otherwise: --dtype float32)", path, half)
            return half
    return torch.float32


def has_bfloat16(device: str) -> bool:
    """Whether a device type computes in bfloat16 natively; assumed of a GPU that this machine lacks."""
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
    ):  # it carries no config, and its reward is read where its tokenizer ends a turn
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
    for file in sorted(directory.glob("*.safetensors")) if own == other else ():
        for name, value in _tensors(file):
            inside = name.removeprefix(f"{prefix}.")
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


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one at a time; of a damaged one none, as loading it will say."""
    with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - no mapping
            yield name, stored.get_tensor(name)


def load_policy(
    path: str | Path, *, dtype: torch.dtype | str, device: str | torch.device | None
) -> HybridModel:
    """A `...ForCausalLM` that scores."""
    backbone, head = split_causal_lm(load_causal_lm(path, dtype=dtype, device=device))
    return HybridModel(backbone, policy_head=head, sharing=sharing_obstacle(backbone) is None)


def load_causal_lm(
    path: str | Path, *, dtype: torch.dtype | str, device: str | torch.device | None = None
) -> PreTrainedModel:
    """A stock `...ForCausalLM` for generation; ModelError for anything else."""
    dtype = choose_dtype(path, dtype, device)
    return cast("PreTrainedModel", load_whole(AutoModelForCausalLM, path, dtype, device))


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


def load_any_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a directory or hub id, of any kind; raises ModelError when there is none."""
    files = ("tokenizer_config.json", "tokenizer.json")
    check_place(path, *files)
    if (adapter := find_adapter(path, revision)) and not any(
        (Path(path) / f).is_file() for f in files
    ):
        return load_any_tokenizer(adapter.base, adapter.revision)
    with model_errors(f"cannot load a tokenizer from {path}"):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def load_config(path: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The config of a directory or hub id, for an adapter its base's; ModelError when there is no model."""
    check_place(path)
    if adapter := find_adapter(path, revision):
        return load_config(adapter.base, adapter.revision)
    if Path(path).is_dir():
        check_config_file(Path(path) / "config.json")
    with model_errors(f"{path} is no model directory and no hub id that can be read"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=False
        )
    return config


def load_generation_config(path: str | Path) -> GenerationConfig:
    """The generation config of a directory or hub id, from its config where it has none."""
    try:
        return GenerationConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(load_config(path))


def model_digest(path: str | Path) -> str:
    """Identifies a model's weights: a digest of a directory's files, or a hub id's commit; with those of
    its base where it is an adapter."""
    directory, adapter = Path(path), find_adapter(path)
    base = "" if adapter is None else model_digest(adapter.base)
    if not directory.is_dir():
        return f"{path}@{getattr(load_config(path), '_commit_hash', None)}{base}"
    # not the directory's path, so that a copy is the same model
    files = sorted([*directory.glob("*.safetensors"), directory / "config.json"])
    digests = [f"{file.name} {fingerprint(file)}" for file in files if file.is_file()]
    return "sha256:" + hashlib.sha256("\n".join([*digests, *base.split()]).encode()).hexdigest()


def load_whole(
    auto: Any,
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device | None,
    **options: Any,
) -> Any:
    """A stock model of the class `auto`; raises ModelError when it cannot be loaded or lacks weights."""
    model, missing = load_parts(auto, path, dtype, device, **options)
    check_complete(model, path, missing)
    return model


def check_complete(model: Any, path: str | Path, missing: set[str]) -> None:
    """Raise ModelError for weights that are missing: transformers only warns, and initialises them."""
    if missing:
        kind = (model.config.architectures or ["?"])[0]
        raise ModelError(
            f"{path} holds a {kind} without {len(missing)} weights ({', '.join(sorted(missing)[:3])}), "
            f"which a {type(model).__name__} has; give a run folder or the directory of such a model"
        )


def load_parts(
    auto: Any,
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device | None,
    **options: Any,
) -> tuple[Any, set[str]]:
    """A stock model of the class `auto`, an adapter merged into its base, and the names of weights that its
    files lack. Those that it has no place for are logged, except reward heads."""
    revision, own = options.get("revision"), set[str]()
    if adapter := find_adapter(path, revision):
        labels = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
        options |= {"revision": adapter.revision, **labels}
        model, missing = load_parts(auto, adapter.base, dtype, device, **options)
        with model_errors(f"cannot merge the adapter {path} into {adapter.base}"):
            model, own, surplus = merge_adapter(model, path, revision)
    else:
        check_unquantised(path, load_config(path, revision))
        with model_errors(f"cannot load a model from {path}"):
            model, info = auto.from_pretrained(
                path,
                dtype=dtype,
                # each weight goes there as it is read: the host never holds the whole model
                device_map={"": device or default_device()},
                output_loading_info=True,
                trust_remote_code=False,
                **{"use_safetensors": True, **options},
            )
        missing, surplus = set(info["missing_keys"]), set(info["unexpected_keys"])
    if surplus := {name for name in surplus if not is_head(name)}:
        kind = type(model).__name__
        log.warning("%s holds weights that a %s has no place for: %s", path, kind, sorted(surplus))
    return model, missing - own


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
