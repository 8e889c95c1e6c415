"""The README of an exported model, from its run folder's files; rewritten once test sets are scored."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from hafrm.atomic import atomic_write
from hafrm.export.plain_model import read_golden
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

{rest}
## Limits

- Only differences of rewards have a meaning, and only between responses to the same prompt: a reward has no
  zero and no unit. sigmoid(r1 - r2) is the model's probability that the first response is preferred.
- It has seen at most {max_length} tokens of prompt and response together.
- It has learned the preferences of its training data, with their errors, and may do worse on other prompts.
"""
_POLICY_CARD = """\
# {name}, policy

The language model whose log-probs were trained on preferences: a stock causal language model.
`implicit_reward.json` says how it scores a response; the results are those of that reward.

{rest}"""


def write_cards(run: Path, exports: Mapping[str, Path] | None = None) -> None:
    """Write the cards of a run's exported models; `exports`: where each head's is, if not in `model/`."""
    exports = exports or {head: run / "model" / head for head in ("reward", "policy")}
    folder = RunFolder.open(run)
    recipe: dict[str, Any] = YAML(typ="safe").load(folder.recipe_path.read_text("utf-8"))
    session = (_read(folder.provenance_path).get("sessions") or [{}])[-1]
    measured = [_read(run / f"{name}.json") for name in ("evaluation", "test")]  # as the report
    tested = next((m for m in measured if m and not m.get("trained_on")), {})
    for head, directory in exports.items():
        if not directory.is_dir():
            continue
        # results scored only with the policy have its implicit reward as the main score
        is_main = (head == "reward") == (tested.get("scored_with") != "implicit reward")
        sets = [(s["name"], s if is_main else s["implicit"]) for s in tested.get("sets", ())]
        results = _results([(name, metrics) for name, metrics in sets if metrics])
        rest = f"## Training\n\n{_training(recipe, session)}\n\n## Results\n\n{results}\n"
        values: dict[str, Any] = {"name": run.resolve().name, "rest": rest}
        if head == "reward":
            values["messages"], values["reward"] = _example(directory)
            values["max_length"] = recipe["data"]["max_length"]
        text = (_REWARD_CARD if head == "reward" else _POLICY_CARD).format(**values)
        atomic_write(directory / "README.md", f"---\n{_front_matter(recipe, head)}---\n\n{text}")


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def _front_matter(recipe: Mapping[str, Any], head: str) -> str:
    """The metadata that the hub reads."""
    tasks = {"reward": "text-classification", "policy": "text-generation"}
    words = ["reward-model"] * (head == "reward") + ["hafrm", str(recipe["method"]["name"])]
    front = f"library_name: transformers\npipeline_tag: {tasks[head]}\ntags: [{', '.join(words)}]\n"
    base = str(recipe["model"]["path"])
    # a hub id is a name, or two with a slash; anything else is a path on this machine
    is_hub = not Path(base).exists() and base.count("/") == 1 and not base.startswith(("/", "."))
    return front + (f"base_model: {base}\n" if is_hub else "")


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


def _results(sets: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A table of the test sets, or a sentence if there is none; metrics as `hafrm evaluate` writes them."""
    if not sets:
        return "Not evaluated on a test set yet."
    rows = []
    for name, metrics in sets:
        longer = from_plain(Estimate, metrics["length"]["pick_longer"])
        accuracy = from_plain(Estimate, metrics["accuracy"])
        rows.append((name, accuracy.num, accuracy, longer, metrics["calibration"]["log_loss"]))
    heads = "test set | comparisons: count | accuracy [95 %] | pick the longer [95 %] | log-loss: decimal"
    return to_markdown(Table("", columns(heads), tuple(rows)))


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
