"""The README of an exported model: what it is, how to get its scores, and how good it is.

It is made from the run folder's files alone, so it can be written again: by the export, and by
`hafrm train` after the test sets have been evaluated.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from hafrm.atomic import atomic_write
from hafrm.export.golden import read_golden
from hafrm.results import Real, read_result
from hafrm.run_folder import RunFolder
from hafrm.statistics import Estimate
from hafrm.table import Table, columns, to_markdown

CARD = "README.md"
MAX_EXAMPLE = 400
"""Characters of the conversation that the card scores."""

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


@dataclass(frozen=True)
class _Calibration:
    log_loss: Real
    ece: Real


@dataclass(frozen=True)
class _Length:
    pick_longer: Estimate


@dataclass(frozen=True)
class _Metrics:
    """The metrics that a card shows, of those in test.json."""

    accuracy: Estimate
    calibration: _Calibration
    length: _Length


@dataclass(frozen=True)
class _TestSet(_Metrics):
    name: str
    implicit: _Metrics | None = None


@dataclass(frozen=True)
class _TestResult:
    scored_with: str = ""
    sets: tuple[_TestSet, ...] = ()


def write_cards(run: Path, exports: Mapping[str, Path] | None = None) -> None:
    """Write the cards of a run's exported models; `exports`: where each head's is, if not in `model/`."""
    exports = exports or {head: run / "model" / head for head in ("reward", "policy")}
    folder = RunFolder.open(run)
    recipe: dict[str, Any] = YAML(typ="safe").load(folder.recipe_path.read_text("utf-8"))
    sessions: list[dict[str, Any]] = [{}]
    if folder.provenance_path.is_file():
        sessions = json.loads(folder.provenance_path.read_bytes()).get("sessions") or sessions
    test_file = run / "test.json"
    test = read_result(test_file, _TestResult) if test_file.is_file() else _TestResult()
    name, training = folder.path.resolve().name, _training(recipe, sessions[-1])
    if (directory := exports.get("reward")) and directory.is_dir():
        messages, reward = _example(directory)
        text = _REWARD_CARD.format(
            name=name,
            messages=messages,
            reward=reward,
            training=training,
            results=_results({s.name: s for s in test.sets}),
            max_length=recipe["data"]["max_length"],
        )
        _write(directory, recipe, ("text-classification", "reward-model"), text)
    if (directory := exports.get("policy")) and directory.is_dir():
        is_policy_only = test.scored_with == "implicit reward"
        implicit = {s.name: s if is_policy_only else s.implicit for s in test.sets}
        text = _POLICY_CARD.format(name=name, training=training, results=_results(implicit))
        _write(directory, recipe, ("text-generation",), text)


def _write(directory: Path, recipe: Mapping[str, Any], tags: tuple[str, ...], text: str) -> None:
    """The text below the front matter that the hub reads; its task is the first tag."""
    base = str(recipe["model"]["path"])
    # a hub id is a name, or two with a slash; anything else is a path on this machine
    is_hub = not Path(base).exists() and base.count("/") == 1 and not base.startswith(("/", "."))
    head = {
        "library_name": "transformers",
        "pipeline_tag": tags[0],
        "tags": [*tags[1:], "hafrm", str(recipe["method"]["name"])],
        **({"base_model": base} if is_hub else {}),
    }
    front = StringIO()
    YAML().dump(head, front)
    atomic_write(directory / CARD, f"---\n{front.getvalue()}---\n\n{text}")


def _training(recipe: Mapping[str, Any], session: Mapping[str, Any]) -> str:
    """What was trained, on what and how, as a list."""
    method = {k: v for k, v in recipe["method"].items() if v is not None}
    data = ", ".join(f"`{_short(source)}`" for source in recipe["data"]["train"])
    num_comparisons = (session.get("counts") or {}).get("train_comparisons", "unknown")
    versions = session.get("versions") or {}
    used = [f"{n} {versions[n]}" for n in ("hafrm", "torch", "transformers") if n in versions]
    training, lora = recipe["training"], recipe.get("lora")
    lines = {
        "method": ", ".join(str(v) if k == "name" else f"{k} {v}" for k, v in method.items()),
        "base model": f"`{_short(str(recipe['model']['path']))}`",
        "data": f"{data} ({num_comparisons} comparisons)",
        "optimizer": f"AdamW, peak learning rate {training['learning_rate']}, "
        f"{training['batch_size']} comparisons per step, seed {training['seed']}",
        "LoRA": f"merged, rank {lora['rank']}" if lora else "no",
        "chat template": f"SHA-256 `{session.get('template_sha256', 'unknown')}`",
        "versions": ", ".join(used),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def _results(metrics: Mapping[str, _Metrics | None]) -> str:
    """A table of the test sets by name, or a sentence if there is none."""
    rows = tuple(
        (name, m.accuracy.num, m.accuracy, m.length.pick_longer, *vars(m.calibration).values())
        for name, m in metrics.items()
        if m is not None
    )
    heads = "test set | comparisons: count | accuracy [95 %] | pick the longer [95 %] | "
    heads += "log-loss: decimal | ECE: decimal"
    return (
        to_markdown(Table("", columns(heads), rows)) if rows else "Not evaluated on a test set yet."
    )


def _example(directory: Path) -> tuple[str, float]:
    """A golden conversation as Python code, and its reward: the first response to the last short prompt."""
    lines = [(list(g.messages), g.reward) for g in read_golden(directory) if g.messages]
    short = [line for line in lines if len(str(line[0])) <= MAX_EXAMPLE]
    last, _ = short[-1] if short else min(lines, key=lambda line: len(str(line[0])))
    messages, reward = next(line for line in lines if line[0][:-1] == last[:-1])
    code = ",\n".join(f"    {json.dumps(message, ensure_ascii=False)}" for message in messages)
    # three backticks inside the text would end the code block
    return f"[\n{code},\n]".replace("```", "` ` `"), reward


def _short(source: str) -> str:
    """A source or path without this machine's folders."""
    if source.startswith(("hub:", "set:")) and "=" not in source.partition("#")[0]:
        return source
    place, mark, options = source.partition("#")
    return place.rstrip("/").rpartition("/")[2] + mark + options
