"""The start of a run under FSDP2, in which no rank ever holds the whole model.

The model is built without storage and sharded, then each rank reads its own rows of the checkpoint's files.
If files need conversion, the main rank reads them all on its host and hands out one tensor at a time.
"""

import contextlib
import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel, split_causal_lm
from hafrm.errors import ModelError
from hafrm.recipe import ModelSection, Recipe
from hafrm.scoring.loading import base_directory, load_base
from hafrm.scoring.model_files import load_config
from hafrm.tensor_files import TensorFiles
from hafrm.training import parallel
from hafrm.training.methods import Method
from hafrm.training.setup import (
    assemble,
    build_model,
    check_vocabulary,
    start_reward_head,
    starting_dtype,
)

log = logging.getLogger("hafrm")


def start_model(
    recipe: Recipe, method: Method, encoder: Encoder, ranks: parallel.Ranks
) -> HybridModel:
    """The model that a run starts with, whole or sharded."""
    if parallel.shards(recipe.training.parallel, ranks.size, ranks.device.type):
        return build_sharded(recipe, method, encoder, ranks)
    return build_model(recipe, method, encoder, ranks.device)


def build_sharded(
    recipe: Recipe, method: Method, encoder: Encoder, ranks: parallel.Ranks
) -> HybridModel:
    """The model of `build_model`, sharded over the ranks; all ranks call this, and raise what it raises."""
    section, training = recipe.model, recipe.training
    config = load_config(base_directory(section.path), section.revision)
    check_vocabulary(config, encoder)
    with init_empty_weights(include_buffers=False):
        causal = AutoModelForCausalLM.from_config(
            config, dtype=starting_dtype(recipe), trust_remote_code=False
        )
    causal.tie_weights()
    names = {id(p): name for name, p in causal.named_parameters()}  # before adapters rename them
    with _drawn_adapters():
        model = assemble(causal.base_model, causal.get_output_embeddings(), recipe, method)
    stored = {name: names[id(p)] for name, p in model.named_parameters() if p.is_meta}
    start_reward_head(model, recipe, method)
    if training.compile:
        model.compile_layers()
    precision = torch.bfloat16 if training.precision == "bf16" else None
    offload = training.offload in ("weights", "all")
    parallel.shard(model, ranks, training.parallel, precision, offload=offload)
    _make_storage(model, torch.device("cpu") if offload else ranks.device)
    model.compute_device = ranks.device
    if parallel.from_main(lambda: _can_read_rows(section, causal, stored.values())):
        _read_rows(model, stored, section)
    else:
        _hand_out(model, stored, recipe, method)
    return model


@contextlib.contextmanager
def _drawn_adapters() -> Iterator[None]:
    """Keep the values that PEFT draws for adapters before it moves them to the base's meta device."""
    drawn: list[tuple[nn.Linear, Tensor]] = []
    reset: Any = LoraLayer.reset_lora_parameters

    def remember(layer: Any, name: str, *args: Any) -> None:
        reset(layer, name, *args)
        dtype = layer.get_base_layer().weight.dtype  # PEFT rounds them to this
        linear = [layer.lora_A[name], layer.lora_B[name]]
        drawn.extend((part, part.weight.detach().to(dtype, copy=True)) for part in linear)

    with mock.patch.object(LoraLayer, "reset_lora_parameters", remember):
        yield
    for part, weight in drawn:
        part.weight = nn.Parameter(weight.float(), part.weight.requires_grad)


def _make_storage(model: HybridModel, device: torch.device) -> None:
    """Replace shards on the meta device by empty ones; `to_empty` would lose buffers and ties."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
                module._parameters[name] = made[id(p)]


def _can_read_rows(section: ModelSection, causal: Any, names: Iterable[str]) -> bool:
    """Whether the files hold the model's own tensors, and its head is of a known kind."""
    files = _weight_files(section)
    if get_model_conversion_mapping(causal, add_legacy=False) or not all(map(Path.is_file, files)):
        return False
    if not TensorFiles(files).names >= set(names):
        return False
    config = copy.deepcopy(causal.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = 1, 16
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    try:  # a model with one layer shows what the head does
        small = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    except Exception:  # noqa: BLE001 - configs check themselves in many ways: the whole model is tried then
        return False
    split_causal_lm(small)
    return True


def _read_rows(model: HybridModel, stored: Mapping[str, str], section: ModelSection) -> None:
    """Fill the model's parameters from the stored tensors, each rank its rows."""
    files = TensorFiles(_weight_files(section))
    parameters = dict(model.named_parameters())
    for name, own in stored.items():
        if files.shape(own) != list(parameters[name].shape):
            raise ModelError(
                f"{section.path} holds {own} {files.shape(own)}, but its config says "
                f"{list(parameters[name].shape)}"
            )
        files.fill(parameters[name], own)


def _hand_out(
    model: HybridModel, stored: Mapping[str, str], recipe: Recipe, method: Method
) -> None:
    """Fill the model's parameters with the base's, which the main rank loads as a whole on its host."""
    whole: dict[str, nn.Parameter] = {}

    def load() -> None:
        why = "because its files need conversion"
        log.info("%s is read whole by the main rank, %s", recipe.model.path, why)
        host = torch.device("cpu")
        causal = load_base(recipe.model, starting_dtype(recipe), host, policy=method.trains_policy)
        split_causal_lm(causal)
        whole.update(causal.named_parameters())

    parallel.from_main(load)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, own in stored.items():
            value = whole[own].detach() if parallel.is_main() else None
            parameters[name].copy_(parallel.hand_out(value, parameters[name].detach()))


def _weight_files(section: ModelSection) -> list[Path]:
    """The files that hold a checkpoint's weights; other files may lie beside them."""
    folder = Path(base_directory(section.path))
    if not folder.is_dir():
        wanted = ["*.safetensors", "*.safetensors.index.json"]
        options: Any = {"revision": section.revision, "allow_patterns": wanted}
        folder = Path(snapshot_download(str(folder), **options))
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = json.loads(index.read_bytes())["weight_map"].values()
    return [folder / name for name in sorted(set(names))]
