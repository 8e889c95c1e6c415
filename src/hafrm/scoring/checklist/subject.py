"""A directory under examination, and what plain transformers makes of it.

Every part is read once, when a clause asks for it. Nothing of hafrm's engine takes part: what is
scored here is what any consumer gets. No code of the directory is run and no pickle is read.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hafrm.errors import ModelError
from hafrm.scoring.golden_file import GOLDEN, GoldenLine, read_golden

TOLERANCE = 1e-4
"""Relative to max(1, |reward|), float32: padded against single sums of a deep model."""
_MOST_PROBES = 16


def _probe(*turns: str) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[k % 2], "content": turn} for k, turn in enumerate(turns))


PROBES = (
    _probe("What is the capital of France?", "The capital of France is Paris."),
    _probe("Say yes.", "No."),
    _probe("Name three trees.", "Oak, lime and beech.\n\nShall I name more?", "Yes.", "Elm, ash."),
    _probe("Was heißt « déjà vu » auf Deutsch?", "„Schon gesehen“ – ein Gefühl, als …"),
    _probe("Write a function that adds.", "```python\ndef add(a, b):\n    return a + b\n```\n"),
    _probe("Tell me about the sea. " * 8, "The sea is wide and deep, and its water is salt. " * 6),
)
"""Conversations of unequal lengths, for directories that bring none of their own."""


class Stored(NamedTuple):
    """A tensor in a weights file."""

    dtype: str
    """As safetensors writes it, such as BF16."""
    shape: tuple[int, ...]


class Subject:
    """The directory and its parts; ModelError where a part cannot be read."""

    def __init__(
        self, path: Path, golden: Path | None = None, tolerance: float = TOLERANCE
    ) -> None:
        """Raises ModelError when there is no config.json, DataError for a damaged golden file."""
        self.path, self.tolerance = path, tolerance
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            what = (
                "a LoRA adapter, which is verified where it is exported; merge it (hafrm export RUN "
                "--merge-lora) to verify what servers load"
                if adapter
                else "no model directory: it has no config.json"
            )
            raise ModelError(f"{path} is {what}")
        self.config = self._json("config.json")
        own = path / GOLDEN
        file = golden or (own if own.is_file() else None)
        self.golden: list[GoldenLine] = [] if file is None else read_golden(file)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Where pad, EOS and vocabulary stand: the language model's part of the config."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json, or nothing."""
        file = "tokenizer_config.json"
        return self._json(file) if (self.path / file).is_file() else {}

    @cached_property
    def weights(self) -> dict[str, Stored]:
        """Every tensor in the directory's safetensors files, by name, without its values."""
        found: dict[str, Stored] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - no mapping
                        part = opened.get_slice(name)
                        found[name] = Stored(part.get_dtype(), tuple(part.get_shape()))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} is damaged: {error}") from error
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as AutoTokenizer loads it."""
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"AutoTokenizer cannot load it: {error}") from error

    @cached_property
    def loaded(self) -> tuple[Any, Mapping[str, Any]]:
        """The classifier in float32, and transformers' account of missing and surplus weights."""
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.path,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(
                f"AutoModelForSequenceClassification cannot load it: {error}"
            ) from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.eval().to(device), info

    @cached_property
    def texts(self) -> list[str]:
        """The conversations that are scored, rendered: the golden ones, or else PROBES."""
        told = [
            self.render(line.messages) if line.messages else str(line.text)
            for line in self.golden[:_MOST_PROBES]
        ]
        return told or [self.render(probe) for probe in PROBES]

    def render(self, messages: Sequence[Mapping[str, str]], template: str | None = None) -> str:
        """One conversation as the chat template (or another one) writes it."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(m) for m in messages], chat_template=template, tokenize=False
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ModelError(f"the chat template cannot render a conversation: {error}") from error

    @torch.no_grad()
    def score(
        self,
        texts: Sequence[str],
        side: Literal["left", "right"] = "right",
        *,
        positions: bool = True,
    ) -> Float[Tensor, " texts"]:
        """The rewards of one padded batch; `positions` counts from each text's first real token."""
        model = self.loaded[0]
        kept = self._batch(texts, side)
        if side == "left" and positions and self._takes_positions:
            kept["position_ids"] = (kept["attention_mask"].cumsum(1) - 1).clamp(min=0)
        rewards: Tensor = model(**kept).logits[:, 0].float().cpu()
        return rewards

    @torch.no_grad()
    def score_by_hand(self, text: str) -> float:
        """The head's product with the hidden state of the literal last token, as servers read it."""
        model = self.loaded[0]
        hidden = model.base_model(**self._batch([text], "right")).last_hidden_state[:, -1]
        return float(model.score(hidden)[0, 0])

    @cached_property
    def alone(self) -> Float[Tensor, " texts"]:
        """The rewards of `texts`, one at a time."""
        return torch.cat([self.score([text]) for text in self.texts])

    def furthest(self, found: Float[Tensor, " texts"], expected: Float[Tensor, " texts"]) -> float:
        """The largest difference, relative to max(1, |expected|)."""
        return float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max())

    @property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.loaded[0].forward).parameters

    def _batch(self, texts: Sequence[str], side: str) -> dict[str, Tensor]:
        batch = self.tokenizer(
            list(texts),
            return_tensors="pt",
            padding=len(texts) > 1,
            padding_side=side,
            add_special_tokens=False,
        )
        device = self.loaded[0].device
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_bytes())
        except ValueError as error:
            raise ModelError(f"{self.path / name} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ModelError(f"{self.path / name} holds no JSON object")
        return content
