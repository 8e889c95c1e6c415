"""Faults of the export checklist, to be planted into a good directory, and the clause that finds each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoTokenizer

Plant = Callable[[Path], None]


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Load, change and save the tensors of model.safetensors."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def change_template(folder: Path, change: Callable[[str], str]) -> None:
    """Replace the chat template by what `change` makes of it."""
    file = folder / "chat_template.jinja"
    file.write_text(change(file.read_text()))


def _add_bos(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    bos = tokenizer.bos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
    backend.save(str(folder / "tokenizer.json"))


def _double_bos(folder: Path) -> None:
    _add_bos(folder)
    change_template(folder, lambda text: "{{ bos_token }}" + text)


def _own_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForSequenceClassification": "modeling_x.Reward"})
    (folder / "modeling_x.py").write_text("raise SystemExit('run')\n")


def _add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)


def _value_head(folder: Path) -> None:
    save_file({"v_head.summary.weight": torch.zeros(1, 32)}, folder / "value_head.safetensors")


def _infinite(weights: dict[str, torch.Tensor]) -> None:
    weights["score.weight"][0, 0] = float("inf")


def _change_golden(folder: Path, **values: Any) -> None:
    file = folder / "golden_scores.jsonl"
    rows = [json.loads(line) | values for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _shift_ids(folder: Path) -> None:
    file = folder / "golden_scores.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["input_ids"] = [row["input_ids"][0] + 1, *row["input_ids"][1:]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


FAULTS: dict[str, tuple[str, Plant]] = {
    "saved as a causal LM": (
        "sequence classifier",
        lambda f: change_config(f, architectures=["LlamaForCausalLM"]),
    ),
    "called a reward model": (
        "sequence classifier",
        lambda f: change_config(f, architectures=["LlamaForRewardModel"]),
    ),
    "two labels": (
        "one label",
        lambda f: change_config(f, id2label={"0": "A", "1": "B"}, label2id={"A": 0, "B": 1}),
    ),
    "labels not said": ("one label", lambda f: change_config(f, id2label=None, label2id=None)),
    "no problem type": ("raw reward", lambda f: change_config(f, problem_type=None)),
    "code of its own": ("stock code", _own_code),
    "a pickle": ("safetensors only", lambda f: _touch(f / "pytorch_model.bin")),
    "weights cut short": ("safetensors only", lambda f: _cut(f / "model.safetensors")),
    "quantisation left over": (
        "not quantised",
        lambda f: change_config(f, quantization_config={"quant_method": "fp8"}),
    ),
    "a bias": (
        "head without bias",
        lambda f: change_weights(f, lambda w: w.update({"score.bias": torch.ones(1)})),
    ),
    "no head": (
        "head without bias",
        lambda f: change_weights(f, lambda w: _drop(w, "score.weight")),
    ),
    "a head of two rows": (
        "head without bias",
        lambda f: change_weights(
            f, lambda w: w.update({"score.weight": w["score.weight"].repeat(2, 1)})
        ),
    ),
    "a value head beside it": ("head without bias", _value_head),
    "no dtype": ("dtype stated", lambda f: change_config(f, dtype=None, torch_dtype=None)),
    "another dtype": ("dtype stated", lambda f: change_config(f, dtype="bfloat16")),
    "another rotary base for older readers": (
        "rotary settings",
        lambda f: change_config(f, rope_theta=20000.0),
    ),
    "a weight lost": (
        "no fresh weights",
        lambda f: change_weights(f, lambda w: _drop(w, "model.layers.1.mlp.up_proj.weight")),
    ),
    "the LM head left in": (
        "nothing left over",
        lambda f: change_weights(f, lambda w: w.update({"lm_head.weight": torch.ones(4, 32)})),
    ),
    "no template": ("chat template", lambda f: (f / "chat_template.jinja").unlink()),
    "a template without answers": (
        "chat template",
        lambda f: change_template(f, lambda _: "{{ messages[0]['content'] ~ eos_token }}"),
    ),
    "today's date": (
        "no date in the template",
        lambda f: change_template(f, lambda t: "{{ strftime_now('%d %B %Y') }}" + t),
    ),
    "pad is EOS": (
        "pad is not EOS",
        lambda f: change_config(
            f, pad_token_id=json.loads((f / "config.json").read_text())["eos_token_id"]
        ),
    ),
    "the pad of another tokenizer": ("pad is not EOS", lambda f: change_config(f, pad_token_id=3)),
    "no pad": ("pad is not EOS", lambda f: change_config(f, pad_token_id=None)),
    "a token without embedding": ("ids have embeddings", _add_token),
    "two BOS": ("BOS once", _double_bos),
    "a BOS for some": ("BOS once", _add_bos),
    "a line break behind the EOS": (
        "ends in EOS",
        lambda f: change_template(f, lambda t: t + "{{ '\\n' }}"),
    ),
    "no EOS": (
        "ends in EOS",
        lambda f: change_template(
            f, lambda _: "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        ),
    ),
    "token types": (
        "inputs fit",
        lambda f: _change_tokenizer(
            f, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        ),
    ),
    "an infinite weight": ("finite scores", lambda f: change_weights(f, _infinite)),
    "other rewards": ("golden scores", lambda f: _change_golden(f, reward=99.0)),
    "other ids": ("golden scores", _shift_ids),
}
"""By name: the clause that must find it, and how it is planted."""


def _change_tokenizer(folder: Path, **values: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _touch(file: Path) -> None:
    file.write_bytes(b"")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:2000])


def _drop(weights: dict[str, torch.Tensor], name: str) -> None:
    del weights[name]
