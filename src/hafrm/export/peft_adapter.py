"""A LoRA run's weights as a PEFT adapter: small files that need the base checkpoint beside them.

Only for consumers that load adapters themselves; all others need the merged directory. The complete reward
head goes with the adapters, because PEFT omits it by default (peft#2502, TRL#1379).
"""

import json
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from hafrm.atomic import atomic_directory
from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel
from hafrm.errors import ModelError
from hafrm.export.older_transformers import write_for_older_readers

_ADAPTER = "default"


class Base(NamedTuple):
    """The checkpoint that an adapter belongs to."""

    path: str
    revision: str | None


def export_adapter(model: HybridModel, encoder: Encoder, directory: Path, base: Base) -> None:
    """Write the reward model's adapters and head in float32, as PEFT loads them, and the tokenizer.

    Raises ModelError for a model without adapters or without a reward head.
    """
    layers = {n: m for n, m in model.backbone.named_modules() if isinstance(m, LoraLayer)}
    if not layers or model.reward_head is None:
        what = "adapters" if not layers else "reward head"
        raise ModelError(f"this model has no {what} to export; export its whole weights")
    prefix = f"base_model.model.{model.backbone.base_model_prefix}"
    weights: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            value = getattr(layer, part)[_ADAPTER].weight
            weights[f"{prefix}.{name}.{part}.weight"] = value.detach().float().cpu().contiguous()
    head = model.reward_head.weight.detach().float().cpu().contiguous()
    weights["base_model.model.score.weight"] = head
    with atomic_directory(directory) as aside:
        _config(model.backbone, layers, base).save_pretrained(str(aside))
        _sort_targets(aside / "adapter_config.json")
        save_file(weights, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        encoder.export_tokenizer(aside)
        write_for_older_readers(aside)


def _config(backbone: nn.Module, layers: dict[str, LoraLayer], base: Base) -> LoraConfig:
    one = next(iter(layers.values()))
    return LoraConfig(
        r=one.r[_ADAPTER],
        lora_alpha=one.lora_alpha[_ADAPTER],
        target_modules=_targets(backbone, layers),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=bool(getattr(one, "fan_in_fan_out", False)),
        task_type="SEQ_CLS",
        modules_to_save=["score"],
        base_model_name_or_path=base.path,
        revision=base.revision,
        inference_mode=True,
    )


def _targets(backbone: nn.Module, layers: dict[str, LoraLayer]) -> list[str]:
    """Short names if they match exactly these layers, else the layers' full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    matched = {
        name
        for name, module in backbone.named_modules()
        if name.rsplit(".", 1)[-1] in short and isinstance(module, (nn.Linear, LoraLayer))
    }
    return short if matched == set(layers) else sorted(layers)


def _sort_targets(file: Path) -> None:
    """PEFT writes a set, in varying order; the same run must give the same file."""
    content = json.loads(file.read_bytes())
    content["target_modules"].sort()
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
