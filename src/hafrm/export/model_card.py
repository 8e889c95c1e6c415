"""The README of an exported model: what it is, how to get its scores, and how good it is.

It is made from the run folder's files alone, so it can be written again once test sets have been evaluated.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from hafrm.atomic import atomic_write
from hafrm.export.golden import read_golden
from hafrm.results import Table, columns, from_plain, to_markdown
from hafrm.run_folder import RunFolder
from hafrm.statistics import Estimate

_REWARD_CARD = """\
# {name}, reward model

Scores how good a response to a prompt is; higher is better. It is a stock sequence classifier with one
label, and its score is the logit itself, without a sigmoid.

## Use

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "."  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
messages = {messages}
text = tokenizer.apply_chat_template(messages, tokenize=False)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    print(model(**ids).logits[0, 0].item())  # {reward:.3f}
```

## Training

{training}

## Results

{results}

## Limits

- Only differences of rewards have a meaning, and only between responses to the same prompt: a reward has no
  zero and no unit. sigmoid(r1 - r2) is the model's probability that the first response is preferred.
- It has seen at most {max_length} tokens of prompt and response together.
- It has learned the preferences of its training data, with their errors, and may do worse on other prompts.
"""
_POLICY_CARD = """\
# {name}, policy

The language model whose log-probs were trained on preferences: a stock causal language model.
`implicit_reward.json` says how its log-probs score a response.

## Training

{training}

## Results of its implicit reward

{results}
"""


def write_cards(run: Path, exports: Mapping[str, Path] | None = None) -> None:
    """Write the cards of a run's exported models; `exports`: where each head's is, if not in `model/`."""
    exports = exports or {head: run / "model" / head for head in ("reward", "policy")}
    folder = RunFolder.open(run)
    recipe: dict[str, Any] = YAML(typ="safe").load(folder.recipe_path.read_text("utf-8"))
    sessions = _read(folder.provenance_path).get("sessions") or [{}]
    tested = _read(run / "test.json")
    is_policy_only = tested.get("scored_with") == "implicit reward"
    texts = {"name": run.resolve().name, "training": _training(recipe, sessions[-1])}
    if (directory := exports.get("reward")) and directory.is_dir():
        texts["messages"], reward = _example(directory)
        texts["results"] = _results((s["name"], s) for s in tested.get("sets", ()))
        length = recipe["data"]["max_length"]
        text = _REWARD_CARD.format(**texts, reward=reward, max_length=length)
        _write(directory, recipe, text, "text-classification", "reward-model")
    if (directory := exports.get("policy")) and directory.is_dir():
        sets = [(s["name"], s if is_policy_only else s["implicit"]) for s in tested.get("sets", ())]
        texts["results"] = _results((name, metrics) for name, metrics in sets if metrics)
        _write(directory, recipe, _POLICY_CARD.format(**texts), "text-generation")


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def _write(directory: Path, recipe: Mapping[str, Any], text: str, task: str, *tags: str) -> None:
    # above the text the front matter that the hub reads
    base = str(recipe["model"]["path"])
    # a hub id is a name, or two with a slash; anything else is a path on this machine
    is_hub = not Path(base).exists() and base.count("/") == 1 and not base.startswith(("/", "."))
    words = ", ".join([*tags, "hafrm", str(recipe["method"]["name"])])
    front = f"library_name: transformers\npipeline_tag: {task}\ntags: [{words}]\n"
    front += f"base_model: {base}\n" if is_hub else ""
    atomic_write(directory / "README.md", f"---\n{front}---\n\n{text}")


def _training(recipe: Mapping[str, Any], session: Mapping[str, Any]) -> str:
    method = {k: v for k, v in recipe["method"].items() if v is not None}
    data = ", ".join(f"`{_short(source)}`" for source in recipe["data"]["train"])
    num_comparisons = (session.get("counts") or {}).get("train_comparisons", "unknown")
    versions = session.get("versions") or {}
    used = [f"{n} {versions[n]}" for n in ("hafrm", "torch", "transformers") if n in versions]
    training, lora = recipe["training"], recipe.get("lora")
    lines = (
        "method: " + ", ".join(str(v) if k == "name" else f"{k} {v}" for k, v in method.items()),
        f"base model: `{_short(str(recipe['model']['path']))}`",
        f"data: {data} ({num_comparisons} comparisons)",
        f"optimizer: AdamW, peak learning rate {training['learning_rate']}, "
        f"{training['batch_size']} comparisons per step, seed {training['seed']}",
        f"LoRA: {'merged, rank ' + str(lora['rank']) if lora else 'no'}",
        f"chat template: SHA-256 `{session.get('template_sha256', 'unknown')}`",
        f"versions: {', '.join(used) or 'unknown'}",
    )
    return "\n".join(f"- {line}" for line in lines)


def _results(sets: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """A table of the test sets, or a sentence if there is none; metrics as `hafrm evaluate` writes them."""
    rows = []
    for name, metrics in sets:
        longer = from_plain(Estimate, metrics["length"]["pick_longer"])
        accuracy = from_plain(Estimate, metrics["accuracy"])
        rows.append((name, accuracy.num, accuracy, longer, metrics["calibration"]["log_loss"]))
    heads = "test set | comparisons: count | accuracy [95 %] | pick the longer [95 %] | log-loss: decimal"
    table = Table("", columns(heads), tuple(rows))
    return to_markdown(table) if rows else "Not evaluated on a test set yet."


def _example(directory: Path) -> tuple[str, float]:
    """A golden conversation as Python code, and its reward."""
    # the last two are the built-in ones, unless a template gives their text other ids than ours
    line = [line for line in read_golden(directory) if line.messages][-2:][0]
    code = ",\n".join(f"    {json.dumps(turn, ensure_ascii=False)}" for turn in line.messages)
    # three backticks inside the text would end the code block
    return f"[\n{code},\n]".replace("```", "` ` `"), line.reward


def _short(source: str) -> str:
    """A source or path without this machine's folders."""
    if source.startswith(("hub:", "set:")) and "=" not in source.partition("#")[0]:
        return source
    place, mark, options = source.partition("#")
    return place.rstrip("/").rpartition("/")[2] + mark + options
