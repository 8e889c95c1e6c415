"""What a model's files hold: config, tokenizer, weights and heads, an adapter merged into its base.

A model is the directory or hub id of a stock model, or of a PEFT adapter, which names its base. A
directory's code never runs, and only names are read from pickles. Every other module loads configs,
tokenizers and models through this one.
"""

import contextlib
import json
import logging
import re
import socket
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hafrm.errors import ConfigError, HafrmError, ModelError

log = logging.getLogger("hafrm")

ADAPTER = "adapter_config.json"
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_labels")
_MOST_LAYERS = 10_000
_HEAD = re.compile(r"(base_model\.model\.)?(score|v_head|value_head|reward_head|classifier)\.")


class Adapter(NamedTuple):
    """What a PEFT adapter says about itself."""

    base: str  # the directory or hub id that it was trained on
    revision: str | None
    scores: bool  # made for a sequence classifier


@contextlib.contextmanager
def model_errors(what: str) -> Iterator[None]:
    """Turn whatever the libraries raise for a damaged or unknown model into a ModelError."""
    try:
        yield
    except HafrmError:
        raise
    # transformers, tokenizers, safetensors, torch and the hub raise anything, a bare Exception too
    except BaseException as error:
        # and a panic in the tokenizers' Rust is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{what}: {said if len(said) <= 400 else said[:400] + '...'}") from error


def _check_place(path: str | Path, *files: str) -> None:
    """Raise ModelError for a folder without a model, and for a missing local path: the hub is asked only
    for hub ids."""
    place, name = Path(path), str(path)
    if place.is_dir():
        if not any((place / file).is_file() for file in ("config.json", ADAPTER, *files)):
            advice = ""
            if (place / "model").is_dir():
                advice = "; it is a run: give its model/policy or model/reward"
            elif (place / "recipe.yaml").is_file():
                advice = "; it is a run that has not finished: resume it, or hafrm export it"
            raise ModelError(f"{path} is not a model directory: it has no config.json{advice}")
        _check_shards(place)
    elif place.exists():
        raise ModelError(f"{path} is a file; give the directory of a model, or a hub id")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or (
        place.parent.is_dir() and place.parent != Path()
    ):
        raise ModelError(f"{path} does not exist; give the directory of a model, or a hub id")
    else:
        _check_hub(name)


def _check_hub(name: str) -> None:
    """Raise ModelError for a model that is not in the cache if the hub's host has no address, as without a
    network: the hub's own client tries again for more than a minute."""
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    if constants.HF_HUB_OFFLINE or cached.is_dir() or getproxies():
        return
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ModelError(
            f"{name} is not a directory here and not in the cache of hub models, and {host} cannot be "
            f"reached ({error}): check the path, or the network"
        ) from error


def _check_shards(directory: Path) -> None:
    """Raise ModelError for an index that names files that are missing, or outside its directory."""
    for index in directory.glob("*.index.json"):
        with model_errors(f"{index} is damaged"):
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            own = {file.name for file in directory.iterdir() if file.is_file()}
            if strange := [file for file in files if file not in own]:
                problem = "which is not a file of its directory: copy the whole model"
                raise ModelError(f"{index} names {strange[0]!r}, {problem}")


def _check_config_file(file: Path) -> None:
    """Raise ModelError if the number of layers or labels would keep transformers busy for minutes."""
    with model_errors(f"{file} is damaged"):
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ModelError(f"{file} holds no JSON object")
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        sizes = {key: part[key] for part in parts for key in _LAYERS if key in part}
        for key, value in sizes.items():
            if isinstance(value, int | float) and not value <= _MOST_LAYERS:
                raise ModelError(f"{file}: {key} is {value}, more than {_MOST_LAYERS:,}")


def check_unquantised(path: str | Path, config: PretrainedConfig) -> None:
    """Raise ModelError for quantised weights, which cannot train or score here."""
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ModelError(
            f"{path} is quantised ({method}); give the checkpoint that it was quantised from"
        )


def nf4_config(path: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's config: linear weights in 4 bits, an 8-bit scale per 64 of them, products in `dtype`."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError("model.quantization needs bitsandbytes: pip install 'hafrm[qlora]'")
    if find_adapter(path) is not None:
        raise ConfigError(f"{path} is an adapter, which cannot be merged in 4 bits: merge it first")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def settle_nf4(causal: PreTrainedModel, path: str, device: torch.device) -> None:
    """Make a quantised base ready to train and to export; ModelError if its weights would be wrong."""
    del causal.config.quantization_config  # an export has unquantised weights
    layers: Any = (module for module in causal.modules() if hasattr(module, "quant_state"))
    for layer in layers:
        # or an evaluation on a CPU rounds products to bfloat16, and repacks the weights
        layer.support_avx512bf16_for_cpu = False
        # GPT-2's are transposed, and bitsandbytes 0.50's CPU kernel reads rows of whole blocks
        if layer.source_cls is not nn.Linear or (device.type == "cpu" and layer.in_features % 64):
            why = "transposed layers, or on a CPU widths of other than multiples of 64"
            raise ModelError(f"{path} has {why}: it trains without model.quantization only")


def stored_tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """(name, open file) of every tensor in a directory's safetensors; ModelError for a damaged file."""
    for file in sorted(directory.glob("*.safetensors")):
        with model_errors(f"{file} is damaged"), safe_open(file, "pt") as stored:
            yield from ((name, stored) for name in stored.keys())  # noqa: SIM118 - no mapping


def check_shapes(directory: Path, model: PreTrainedModel) -> None:
    """Raise ModelError for damaged safetensors, and for sizes that differ from those of a model built from
    the directory's config; no weight is read."""
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    for name, stored in stored_tensors(directory):
        shape = list(stored.get_slice(name).get_shape())
        if own.get(name, shape) != shape:
            raise ModelError(
                f"{directory}: {name} has the sizes {shape}, but {own[name]} by config.json: use the "
                "config that these weights were saved with"
            )


def find_adapter(path: str | Path, revision: str | None = None) -> Adapter | None:
    """What the adapter in a directory or hub id says; None for a whole model."""
    file: Any = Path(path) / ADAPTER
    if not Path(path).is_dir():
        _check_place(path)
        file = find_adapter_config_file(str(path), revision=revision)
    if file is None or not Path(file).is_file():
        return None
    with model_errors(f"cannot read {file}"):
        config = json.loads(Path(file).read_bytes())
        base = config.get("base_model_name_or_path")
        if not base or (Path(base) / ADAPTER).is_file():
            what = f"the base {base}, an adapter itself: merge that first" if base else "no base"
            raise ModelError(f"{file} names {what} (base_model_name_or_path)")
        return Adapter(base, config.get("revision"), config.get("task_type") == "SEQ_CLS")


def _merge_adapter(
    model: Any, path: str | Path, revision: str | None
) -> tuple[Any, set[str], set[str]]:
    """(the model with an adapter's weights merged in, their names, names that the model has no place for);
    ModelError if weights of the adapter are missing."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict  # noqa: PLC0415 - heavy
    from safetensors.torch import load_file  # noqa: PLC0415

    config = PeftConfig.from_pretrained(str(path), revision=revision)
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config.modules_to_save = [n for n in config.modules_to_save or () if n in modules] or None
    weights = load_file(str(cached_file(str(path), "adapter_model.safetensors", revision=revision)))
    tuned = PeftModel(model, config)
    loaded: Any = set_peft_model_state_dict(tuned, weights)
    if missing := [n for n in loaded.missing_keys if re.search(r"\.(lora_|modules_to_save\.)", n)]:
        raise ModelError(f"{path} lacks the adapter's weights for {sorted(missing)[:4]}")
    merged = tuned.merge_and_unload(safe_merge=True).requires_grad_(True)
    merged.config._commit_hash = None  # it is that of the base
    prefix = "base_model.model."
    own, surplus = ({n.removeprefix(prefix) for n in p} for p in (weights, loaded.unexpected_keys))
    return merged, own, surplus


def _is_head(name: str) -> bool:
    """Whether a weight belongs to a reward or value head."""
    return _HEAD.match(name) is not None


def stored_reward_head(
    path: str | Path, revision: str | None = None
) -> Float[Tensor, "1 hidden"] | None:
    """The linear reward head of a reward model, an adapter or a model with a value head, float32; None if
    there is none. Raises ModelError for a head that is not linear, has several labels or is in a pickle.

    For a hub id, the files in the cache are read, so its model must have been loaded before.
    """
    place = Path(path)
    if not place.is_dir():
        names = ("value_head.safetensors", ADAPTER, "config.json")
        quiet = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        files = (cached_file(str(path), name, **quiet) for name in names)
        place = Path(next(filter(None, files))).parent
    stored_heads = ((name, file) for name, file in stored_tensors(place) if _is_head(name))
    head: dict[str, Tensor] = {n: file.get_tensor(n).float() for n, file in stored_heads}
    for file in (*place.glob("pytorch_model*.bin"), *place.glob("value_head.bin")):
        with model_errors(f"{file} is damaged"):
            names = torch.load(file, map_location="meta", weights_only=True)
        if not head and any(map(_is_head, names)):
            raise ModelError(
                f"{file} holds a reward head in a pickle: save it as safetensors, or set "
                "model.reward_head: new"
            )
    shapes = {name: list(head[name].shape) for name in head if not name.endswith(".bias")}
    if not shapes:
        adapter = find_adapter(path, revision)
        return None if adapter is None else stored_reward_head(adapter.base, adapter.revision)
    # a bias shifts all rewards equally, and classifiers of consumers have none
    (name, shape), *others = shapes.items()
    if others or shape[:-1] != [1]:
        raise ModelError(
            f"{path} has the head {shapes}, which is not linear with one label as a reward model's is; "
            "to train a new one, set model.reward_head: new"
        )
    return head[name]


def load_any_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a directory or hub id, of any kind; raises ModelError when there is none."""
    files = ("tokenizer_config.json", "tokenizer.json")
    _check_place(path, *files)
    if (adapter := find_adapter(path, revision)) and not any(
        (Path(path) / f).is_file() for f in files
    ):
        return load_any_tokenizer(adapter.base, adapter.revision)
    with model_errors(f"cannot load a tokenizer from {path}"):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def load_config(path: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The config of a directory or hub id, for an adapter its base's; ModelError if there is no model."""
    _check_place(path)
    if adapter := find_adapter(path, revision):
        return load_config(adapter.base, adapter.revision)
    if Path(path).is_dir():
        _check_config_file(Path(path) / "config.json")
    with model_errors(f"{path} is neither a model directory nor a readable hub id"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=False
        )
    return config


def load_generation_config(path: str | Path) -> GenerationConfig:
    """The generation config of a directory or hub id, from its config if it has none."""
    try:
        return GenerationConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(load_config(path))


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
    """(stock model of the class `auto`, with an adapter merged into its base; names of weights that its
    files lack). Weights that the model has no place for are logged, except reward heads."""
    revision, own = options.get("revision"), set[str]()
    if adapter := find_adapter(path, revision):
        labels = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
        options |= {"revision": adapter.revision, **labels}
        model, missing = load_parts(auto, adapter.base, dtype, device, **options)
        with model_errors(f"cannot merge the adapter {path} into {adapter.base}"):
            model, own, surplus = _merge_adapter(model, path, revision)
    else:
        check_unquantised(path, load_config(path, revision))
        with model_errors(f"cannot load a model from {path}"):
            model, info = auto.from_pretrained(
                path,
                dtype=dtype,
                # each weight goes to the device as it is read: the host never holds the whole model
                device_map={"": device or default_device()},
                output_loading_info=True,
                trust_remote_code=False,
                **{"use_safetensors": True, **options},
            )
        missing, surplus = set(info["missing_keys"]), set(info["unexpected_keys"])
    if surplus := {name for name in surplus if not _is_head(name)}:
        kind = type(model).__name__
        log.warning("%s holds weights that a %s has no place for: %s", path, kind, sorted(surplus))
    return model, missing - own


def default_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a config is that of a `...ForSequenceClassification`."""
    return str((config.architectures or [""])[0]).endswith("ForSequenceClassification")
