"""Find and load models: `find_heads` in a run folder, `load_*` from directories of stock transformers.

Models to score with are read from safetensors, never a pickle, and no code of a model directory is run.
Every other module loads configs, tokenizers and models through this one.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
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
from hafrm.engine.model import HybridModel, longest_sequence, sharing_obstacle, split_causal_lm
from hafrm.errors import ConfigError, HafrmError, ModelError

log = logging.getLogger("hafrm")

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes of loaded weights. auto: the checkpoint's dtype on a GPU, float32 on a CPU."""
_MOST = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_labels"), 10_000)
_MOST_OF_ALL = 10**30  # some tokenizers and configs write this for "no limit"
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
    root = Path(path)
    for folder in (root / "model", root):  # a run folder has its exports in model/
        reward, policy = (p if p.is_dir() else None for p in (folder / "reward", folder / "policy"))
        if reward or policy:
            rule = folder / FUSED_RULE
            # the rule of one head alone is of no use
            return Heads(reward, policy, rule if reward and policy and rule.is_file() else None)
    if root.is_dir() and not (root / "config.json").is_file():
        raise ModelError(
            f"{root} holds no model: neither model/reward nor model/policy nor a config.json (a run has "
            "none before its end)"
        )
    architectures = load_config(root).architectures or [""]
    is_reward = str(architectures[0]).endswith("ForSequenceClassification")
    return Heads(root, None) if is_reward else Heads(None, root)


def head_directory(path: str | Path, head: Literal["reward", "policy"]) -> str | Path:
    """One head's directory in a run folder or its `model/`; any other path or hub id as it is."""
    if not isinstance(path, str | os.PathLike):
        raise ModelError(f"a model is the path of a run or directory, or a hub id; got {path!r}")
    folders = (Path(path) / "model" / head, Path(path) / head)
    return next((folder for folder in folders if folder.is_dir()), path)


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
    backbone = loaded.base_model
    return HybridModel(backbone, reward_head=head, sharing=sharing_obstacle(backbone) is None)


def shared_reward_head(directory: Path, policy: HybridModel) -> nn.Linear | None:
    """The head of an exported reward model whose backbone is the policy's, weight by weight; else None.

    The backbone of a hybrid run is exported twice, once with each head.
    """
    prefix, weights = policy.backbone.base_model_prefix, dict(policy.backbone.state_dict())
    configs = [load_config(directory), policy.backbone.config]
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
    check_place(path, "tokenizer_config.json", "tokenizer.json")
    with _model_errors(f"cannot load a tokenizer from {path}"):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def load_config(path: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The config of a directory or hub id; raises ModelError when there is no model."""
    check_place(path)
    if Path(path).is_dir():
        _check_sizes(Path(path) / "config.json")
    with _model_errors(f"{path} is no model directory and no hub id that can be read"):
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


@contextlib.contextmanager
def _model_errors(what: str) -> Iterator[None]:
    """Turn whatever the libraries raise for a damaged or foreign model into a ModelError."""
    try:
        yield
    except HafrmError:
        raise
    # transformers, tokenizers, safetensors, torch and the hub raise anything, a bare Exception too
    except BaseException as error:
        # nor is a panic in the tokenizers' Rust an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{what}: {said if len(said) <= 400 else said[:400] + '...'}") from error


def check_place(path: str | Path, *files: str) -> None:
    """Raise ModelError for a folder without a model, and for a local path that is not there: the hub is
    asked for nothing but hub ids."""
    place, name = Path(path), str(path)
    if place.is_dir():
        if not any((place / file).is_file() for file in ("config.json", *files)):
            advice = ""
            if (place / "adapter_config.json").is_file():
                advice = "; it is an adapter: merge it into its base, and give the result"
            elif (place / "model").is_dir():
                advice = "; it is a run: give its model/policy or model/reward"
            raise ModelError(f"{path} is not a model directory: it has no config.json{advice}")
        _check_shards(place)
    elif place.exists():
        raise ModelError(f"{path} is a file; give the directory of a model, or a hub id")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or (
        place.parent.is_dir() and place.parent != Path()
    ):
        raise ModelError(f"{path} does not exist; give the directory of a model, or a hub id")


def _check_shards(directory: Path) -> None:
    """Raise ModelError for an index that names files outside its directory, which would be read."""
    for index in directory.glob("*.index.json"):
        with _model_errors(f"{index} is damaged"):
            files = set(json.loads(index.read_bytes())["weight_map"].values())
            bad = [str(file) for file in files if Path(file).name != file or file == ".."]
        if bad:
            raise ModelError(f"{index} names {bad[0]!r}, which is not a file of its directory")


def _check_sizes(file: Path) -> None:
    """Raise ModelError for numbers of layers or labels that would keep transformers busy for minutes."""
    with _model_errors(f"{file} is damaged"):
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ModelError(f"{file} holds no JSON object")
        nested = [config, *(part for part in config.values() if isinstance(part, dict))]
        for key, value in (item for part in nested for item in part.items()):
            limit = _MOST.get(key, _MOST_OF_ALL)
            if isinstance(value, int | float) and not abs(value) <= limit:
                raise ModelError(f"{file}: {key} is {value!r}, but at most {limit:,} is possible")


def model_digest(path: str | Path) -> str:
    """Identifies a model's weights: a digest of a directory's files, or a hub id's commit."""
    directory = Path(path)
    if not directory.is_dir():
        return f"{path}@{getattr(load_config(path), '_commit_hash', None)}"
    # not the directory's path, so that a copy is the same model
    files = sorted([*directory.glob("*.safetensors"), directory / "config.json"])
    digests = [f"{file.name} {fingerprint(file)}" for file in files if file.is_file()]
    return "sha256:" + hashlib.sha256("\n".join(digests).encode()).hexdigest()


def load_whole(
    auto: Any,
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device | None,
    **options: Any,
) -> Any:
    """A stock model of the class `auto`; raises ModelError when it cannot be loaded or lacks weights."""
    config = load_config(path, options.get("revision"))
    check_unquantised(path, config)
    with _model_errors(f"cannot load a model from {path}"):
        model, info = auto.from_pretrained(
            path,
            dtype=dtype,
            # each weight goes there as it is read: the host never holds the whole model
            device_map={"": device or default_device()},
            output_loading_info=True,
            trust_remote_code=False,
            **{"use_safetensors": True, **options},
        )
    if missing := sorted(info["missing_keys"]):  # transformers only warns, and initialises them
        kind = (model.config.architectures or ["?"])[0]
        raise ModelError(
            f"{path} holds a {kind} without {len(missing)} weights ({', '.join(missing[:3])}), which would "
            f"be random in a {type(model).__name__}; give a run folder or the directory of such a model"
        )
    if surplus := sorted(info["unexpected_keys"]):
        log.warning(
            "%s holds weights that a %s has no place for: %s", path, type(model).__name__, surplus
        )
    return model


def stored_reward_head(path: str | Path) -> Float[Tensor, "1 hidden"] | None:
    """`score.weight` of a directory in float32, or None where it has none; ModelError for other labels."""
    for file in sorted(Path(path).glob("*.safetensors")):
        with _model_errors(f"{file} is damaged"), safe_open(file, "pt") as stored:
            if "score.weight" in stored.keys():  # noqa: SIM118 - no mapping
                head: Tensor = stored.get_tensor("score.weight").float()
                if head.dim() != 2 or len(head) != 1:
                    labels = f"score.weight {list(head.shape)}, but a reward model has one label"
                    raise ModelError(f"{path} has {labels}")
                return head
    return None


def check_unquantised(path: str | Path, config: PretrainedConfig) -> None:
    """Raise ModelError for quantised weights, which neither train nor score here."""
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ModelError(
            f"{path} is quantised ({method}); give the checkpoint that it was quantised from"
        )


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
