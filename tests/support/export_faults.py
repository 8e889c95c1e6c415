"""Faults of the export checklist, to be planted into a good directory, and the clause that finds each."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoTokenizer

Plant = Callable[[Path], object]


def in_text(name: str, change: Callable[[str], str]) -> Plant:
    """Replace a file's text by what `change` makes of it."""
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def in_json(name: str, **values: Any) -> Plant:
    """Set keys of a JSON file, or of every line of JSON; None removes one."""

    def change(line: str) -> str:
        content = json.loads(line) | values
        return json.dumps({k: v for k, v in content.items() if v is not None}) + "\n"

    if name.endswith("l"):
        return in_text(name, lambda text: "".join(map(change, text.splitlines())))
    return in_text(name, change)


in_config = partial(in_json, "config.json")
in_template = partial(in_text, "chat_template.jinja")


def in_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Plant:
    """Load, change and save the tensors of model.safetensors."""

    def plant(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return plant


def _add_bos(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _double_bos(folder: Path) -> None:
    _add_bos(folder)
    in_template(lambda text: "{{ bos_token }}" + text)(folder)


def _own_code(folder: Path) -> None:
    in_config(auto_map={"AutoModelForSequenceClassification": "modeling_x.Reward"})(folder)
    (folder / "modeling_x.py").write_text("raise SystemExit('run')\n")


def _add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)


def _value_head(folder: Path) -> None:
    save_file({"v_head.summary.weight": torch.zeros(1, 32)}, folder / "value_head.safetensors")


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def _pad_is_eos(folder: Path) -> None:
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    in_config(pad_token_id=eos)(folder)


GOLDEN = "golden_scores.jsonl"
ONLY_FIRST = "{{ messages[0]['content'] ~ eos_token }}"
NO_EOS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TODAY = "{{ strftime_now('%d %B %Y') }}"
TOKEN_TYPES = ["input_ids", "token_type_ids", "attention_mask"]
TWO_LABELS = {"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}}
UP, SCORE = "model.layers.1.mlp.up_proj.weight", "score.weight"

FAULTS: dict[str, tuple[str, Plant]] = {
    "saved as a causal LM": ("sequence classifier", in_config(architectures=["LlamaForCausalLM"])),
    "two labels": ("one label", in_config(**TWO_LABELS)),
    "labels not said": ("one label", in_config(id2label=None, label2id=None)),
    "no problem type": ("raw reward", in_config(problem_type=None)),
    "code of its own": ("stock code", _own_code),
    "a pickle": ("safetensors only", lambda f: (f / "pytorch_model.bin").touch()),
    "weights cut short": ("safetensors only", _cut),
    "quantisation left over": ("not quantised", in_config(quantization_config={"bits": 8})),
    "a bias": ("head without bias", in_weights(lambda w: w.update({"score.bias": torch.ones(1)}))),
    "no head": ("head without bias", in_weights(lambda w: w.pop(SCORE))),
    "a head of two rows": (
        "head without bias",
        in_weights(lambda w: w.update({SCORE: w[SCORE].repeat(2, 1)})),
    ),
    "a value head beside it": ("head without bias", _value_head),
    "another rotary base for older readers": ("rotary settings", in_config(rope_theta=20000.0)),
    "a weight lost": ("no fresh weights", in_weights(lambda w: w.pop(UP))),
    "the LM head left in": (
        "nothing left over",
        in_weights(lambda w: w.update({"lm_head.weight": torch.ones(4, 32)})),
    ),
    "no template": ("chat template", lambda f: (f / "chat_template.jinja").unlink()),
    "a template without answers": ("chat template", in_template(lambda _: ONLY_FIRST)),
    "today's date": ("no date in the template", in_template(lambda text: TODAY + text)),
    "pad is EOS": ("pad is not EOS", _pad_is_eos),
    "no pad": ("pad is not EOS", in_config(pad_token_id=None)),
    "the pad of another tokenizer": ("pad is not EOS", in_config(pad_token_id=3)),
    "a token without embedding": ("ids have embeddings", _add_token),
    "two BOS": ("BOS once", _double_bos),
    "a BOS for some": ("BOS once", _add_bos),
    "a line break behind the EOS": ("ends in EOS", in_template(lambda t: t + "{{ '\\n' }}")),
    "no EOS": ("ends in EOS", in_template(lambda _: NO_EOS)),
    "token types": ("inputs fit", in_json("tokenizer_config.json", model_input_names=TOKEN_TYPES)),
    "an infinite weight": ("finite scores", in_weights(lambda w: w[SCORE][0, 0].fill_(math.inf))),
    "other rewards": ("golden scores", in_json(GOLDEN, reward=99.0)),
    "other ids": ("golden scores", in_json(GOLDEN, input_ids=[1, 2, 3])),
}
"""By name: the clause that must find it, and how it is planted."""
