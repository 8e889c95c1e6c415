"""The README of an exported model: what it is, how to get the score that it promises, how good it is.

Made from the run folder's files alone, so that it can be made again when there is more to say: the export
writes it, and `hafrm train` writes it anew when the test sets have been evaluated.
"""

import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from hafrm.atomic import atomic_write
from hafrm.run_folder import RunFolder

CARD = "README.md"
MOST_EXAMPLE = 400
"""Characters of the conversation that is scored in the card."""

USE_REWARD = """\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
messages = {messages}
text = tokenizer.apply_chat_template(messages, tokenize=False)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    print(model(**ids).logits[0, 0].item())  # {reward}
```
"""
LIMITS = """\
- Only differences of rewards mean something, and only between responses to one prompt: a reward has no zero
  and no unit. sigmoid(r1 - r2) is the model's probability that the first response is preferred.
- It has seen at most {max_length} tokens of prompt and response together.
- It knows the preferences of its training data, with their errors, and may do worse on other prompts.
"""


def write_cards(run: Path, models: Path | None = None) -> None:
    """Write the cards of a run's exported models, which lie in `models` where they are not in place yet."""
    folder = models or run / "model"
    known = _Known(RunFolder.open(run))
    for name, text in (("reward", known.reward_card), ("policy", known.policy_card)):
        if (folder / name).is_dir():
            atomic_write(folder / name / CARD, text(folder / name))


class _Known:
    """What a run folder says about its models."""

    def __init__(self, run: RunFolder) -> None:
        self.name = run.path.resolve().name
        self.recipe: dict[str, Any] = YAML(typ="safe").load(run.recipe_text())
        sessions = _json(run.provenance_path).get("sessions") or [{}]
        self.session: dict[str, Any] = sessions[-1]
        self.test = _json(run.path / "test.json")

    def reward_card(self, directory: Path) -> str:
        """The card of the reward model."""
        tags = ["reward-model", "hafrm", str(self.recipe["method"]["name"])]
        head = {**self._head("text-classification", tags), **self._index()}
        messages, reward = _example(directory / "golden_scores.jsonl")
        use = USE_REWARD.format(messages=messages, reward=reward)
        limits = LIMITS.format(max_length=self.recipe["data"]["max_length"])
        return _page(
            head,
            f"# {self.name}, reward model",
            "Scores how good a response to a prompt is; the higher, the better. It is a stock "
            "sequence classifier with one label, and its score is the logit as it is: no sigmoid.",
            f"## Use\n\n{use}",
            f"## Training\n\n{self._training()}",
            f"## Results\n\n{self._results('metrics')}",
            f"## Limits\n\n{limits}",
        )

    def policy_card(self, _: Path) -> str:
        """The card of the retained language model."""
        tags = ["hafrm", str(self.recipe["method"]["name"])]
        results = self._results("implicit")
        return _page(
            self._head("text-generation", tags),
            f"# {self.name}, policy",
            "The language model whose log-probs were trained on preferences: a stock causal language "
            "model. `implicit_reward.json` says how its log-probs judge a response.",
            f"## Training\n\n{self._training()}",
            f"## Results of its implicit reward\n\n{results}",
        )

    def _head(self, task: str, tags: Sequence[str]) -> dict[str, Any]:
        base = str(self.recipe["model"]["path"])
        # a hub id is one name, or two with a slash; anything else is a place on this machine
        is_hub = (
            not Path(base).exists() and base.count("/") == 1 and not base.startswith(("/", "."))
        )
        return {
            "library_name": "transformers",
            "pipeline_tag": task,
            "tags": list(tags),
            **({"base_model": base} if is_hub else {}),
        }

    def _index(self) -> dict[str, Any]:
        """The results in the form that the hub reads."""
        results = [
            {
                "task": {"type": "text-classification", "name": "preference"},
                "dataset": {"type": "preferences", "name": each["name"]},
                "metrics": [
                    {
                        "type": "accuracy",
                        "name": "pairwise accuracy",
                        "value": each["accuracy"]["value"],
                    }
                ],
            }
            for each in self.test.get("sets", ())
        ]
        return {"model-index": [{"name": self.name, "results": results}]} if results else {}

    def _training(self) -> str:
        recipe, counts = self.recipe, self.session.get("counts") or {}
        method = {k: v for k, v in recipe["method"].items() if v is not None}
        data = ", ".join(f"`{_short(source)}`" for source in recipe["data"]["train"])
        versions = self.session.get("versions") or {}
        lines = {
            "method": ", ".join(f"{k} {v}" if k != "name" else str(v) for k, v in method.items()),
            "base model": f"`{_short(str(recipe['model']['path']))}`",
            "data": f"{data} ({counts.get('train_comparisons', 'unknown')} comparisons)",
            "optimiser": f"AdamW, peak learning rate {recipe['training']['learning_rate']}, "
            f"{recipe['training']['batch_size']} comparisons a step, seed {recipe['training']['seed']}",
            "LoRA": "merged, rank {}".format(recipe["lora"]["rank"])
            if recipe.get("lora")
            else "no",
            "chat template": f"SHA-256 `{self.session.get('template_sha256', 'unknown')}`",
            "versions": ", ".join(
                f"{name} {versions[name]}"
                for name in ("hafrm", "torch", "transformers")
                if name in versions
            ),
        }
        return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text) + "\n"

    def _results(self, of: str) -> str:
        """A table of the test sets, or that there is none."""
        rows = [
            (each, each if of == "metrics" or self._is_policy_only else each["implicit"])
            for each in self.test.get("sets", ())
            if of == "metrics" or self._is_policy_only or each.get("implicit")
        ]
        if not rows:
            return "Not evaluated on a test set yet.\n"
        lines = [
            "| test set | comparisons | accuracy [95 %] | pick the longer [95 %] | log-loss | ECE |",
            "|---|---|---|---|---|---|",
        ]
        for each, found in rows:
            longer = each["length"]["pick_longer"]
            numbers = [found["calibration"][key] for key in ("log_loss", "ece")]
            cells = [each["name"], str(found["accuracy"]["num"])]
            cells += [_share(found["accuracy"]), _share(longer)]
            cells += ["n/a" if n is None else f"{n:.3f}" for n in numbers]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    @property
    def _is_policy_only(self) -> bool:
        return bool(self.test.get("scored_with") == "implicit reward")


def _page(head: Mapping[str, Any], *parts: str) -> str:
    front = StringIO()
    YAML().dump(dict(head), front)
    return f"---\n{front.getvalue()}---\n\n" + "\n\n".join(part.strip() for part in parts) + "\n"


def _share(estimate: Mapping[str, Any]) -> str:
    """As `hafrm evaluate` prints it."""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if value is None:
        return "n/a"
    text = f"{100 * value:.1f} %"
    return text if low is None else f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def _example(golden: Path) -> tuple[str, str]:
    """A golden conversation as Python code, and its reward: of the last short prompt the first response."""
    lines = [json.loads(line) for line in golden.read_text(encoding="utf-8").splitlines()]
    short = [line for line in lines if len(str(line["messages"])) <= MOST_EXAMPLE]
    last = short[-1] if short else min(lines, key=lambda each: len(str(each["messages"])))
    line = next(each for each in lines if each["messages"][:-1] == last["messages"][:-1])
    messages = ",\n".join(
        f"    {json.dumps(message, ensure_ascii=False)}" for message in line["messages"]
    )
    # a fence inside the text would end the code block
    return f"[\n{messages},\n]".replace("```", "` ` `"), f"{line['reward']:.3f}"


def _short(source: str) -> str:
    """A source or path without the folders of the machine that it lay on."""
    if source.startswith(("hub:", "set:")) and "=" not in source.partition("#")[0]:
        return source
    place, mark, options = source.partition("#")
    return place.rstrip("/").rpartition("/")[2] + mark + options


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}
