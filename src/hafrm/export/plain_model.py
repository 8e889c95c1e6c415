"""A reward directory as plain transformers sees it: files, tokenizer, model and scores.

Each part is read when it is first used. hafrm's engine takes no part, so these scores are what any
consumer gets. No code of the directory is run and no pickle is read.
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
from hafrm.export.golden import GoldenLine

TOLERANCE = 1e-4
"""Relative to max(1, |reward|), float32: a padded batch of a deep model against one text at a time."""
BATCH_SIZE = 16
"""Texts that are scored in one padded batch; the checklist scores as many."""
Side = Literal["left", "right"]


_TURNS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Say yes.", "No."),
    ("Name three trees.", "Oak, lime and beech.\n\nShall I name more?", "Yes.", "Elm, ash."),
    ("Was heißt « déjà vu » auf Deutsch?", "„Schon gesehen“ – ein Gefühl, als …"),
    ("Write a function that adds.", "```python\ndef add(a, b):\n    return a + b\n```\n"),
    ("Tell me about the sea. " * 8, "The sea is wide and deep, and its water is salt. " * 6),
)
PROBES = tuple(
    tuple({"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns))
    for turns in _TURNS
)
"""Conversations of different lengths, for directories without golden scores."""


def proof_bytes(num_weights: int) -> int:
    """Free GPU memory that a model needs in float32, with its activations for one batch."""
    return int(1.3 * 4 * num_weights) + 2**31


def largest_difference(values: Float[Tensor, " texts"], expected: Float[Tensor, " texts"]) -> float:
    """The largest difference, relative to max(1, |expected|)."""
    return float(((values - expected).abs() / expected.abs().clamp(min=1.0)).max())


class StoredTensor(NamedTuple):
    """A tensor in a weights file; its dtype in safetensors' notation, such as BF16."""

    dtype: str
    shape: tuple[int, ...]


class Finding(NamedTuple):
    """Whether a clause of the checklist holds (None: it does not apply), and what was observed."""

    holds: bool | None
    observed: str


class GoldenReplay(NamedTuple):
    """What replaying golden scores gave."""

    differences: dict[str, float]
    """The largest, by the way of scoring: alone, right, left (padding)."""
    faults: list[str]
    """Why the scores cannot be compared."""


class PlainModel:
    """A directory's parts; ModelError for a part that cannot be read."""

    def __init__(
        self, path: Path, golden: Sequence[GoldenLine] = (), tolerance: float = TOLERANCE
    ) -> None:
        self.path, self.golden, self.tolerance = path, golden, tolerance
        self.is_adapter = (path / "adapter_config.json").is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self._json("config.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        return self._json("tokenizer_config.json")

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config, which holds pad, EOS and vocabulary size."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @cached_property
    def weights(self) -> dict[str, StoredTensor]:
        """Every tensor in the safetensors files, by name, without its values."""
        tensors: dict[str, StoredTensor] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - no mapping
                        part = opened.get_slice(name)
                        tensors[name] = StoredTensor(part.get_dtype(), tuple(part.get_shape()))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} is damaged: {error}") from error
        return tensors

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as AutoTokenizer loads it."""
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"AutoTokenizer cannot load it: {error}") from error

    @cached_property
    def loaded(self) -> tuple[Any, Mapping[str, Any]]:
        """The classifier in float32, and transformers' report on missing and unexpected weights."""
        options = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
        try:
            if self.is_adapter:
                model, info = self._with_adapter(), {}
            else:
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    self.path, dtype=torch.float32, **options
                )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(
                f"AutoModelForSequenceClassification cannot load it: {error}"
            ) from error
        return model.eval().to(device_for(model)), info

    def _with_adapter(self) -> Any:
        from peft import PeftConfig, PeftModel  # noqa: PLC0415 - heavy, and only for adapters

        adapter = PeftConfig.from_pretrained(str(self.path))
        base = AutoModelForSequenceClassification.from_pretrained(
            adapter.base_model_name_or_path,
            revision=adapter.revision,
            num_labels=1,
            dtype=torch.float32,
        )
        # An adapter cannot carry the pad id, which the classifier needs to find the last token.
        base.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return PeftModel.from_pretrained(base, str(self.path))

    def render(self, messages: Sequence[Mapping[str, str]], template: str | None = None) -> str:
        """A conversation as text, by the directory's chat template or another one."""
        options = {"chat_template": template, "tokenize": False}
        try:
            return str(self.tokenizer.apply_chat_template([*map(dict, messages)], **options))
        except (TemplateError, ValueError, TypeError) as error:
            raise ModelError(f"the chat template cannot render a conversation: {error}") from error

    @cached_property
    def texts(self) -> list[str]:
        """The conversations that are scored, rendered: golden ones, or PROBES."""
        golden = [self._render_golden(line) for line in self.golden[:BATCH_SIZE]]
        return golden or [self.render(probe) for probe in PROBES]

    @cached_property
    def alone(self) -> Float[Tensor, " texts"]:
        """The rewards of `texts`, one at a time."""
        return torch.cat([self.score([text]) for text in self.texts])

    def ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered text."""
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    @torch.no_grad()
    def score(
        self, texts: Sequence[str], side: Side = "right", *, positions: bool = True
    ) -> Float[Tensor, " texts"]:
        """The rewards of one padded batch; `positions`: counted from each text's first real token."""
        model = self.loaded[0]
        batch = self._batch(texts, side)
        stock = model.get_base_model() if self.is_adapter else model
        has_positions = "position_ids" in inspect.signature(stock.forward).parameters
        if side == "left" and positions and has_positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        rewards: Tensor = model(**batch).logits[:, 0].float().cpu()
        return rewards

    @torch.no_grad()
    def score_by_hand(self, text: str) -> float:
        """The head's product with the hidden state of the literal last token, as servers compute it."""
        model = self.loaded[0]
        hidden = model.base_model(**self._batch([text], "right")).last_hidden_state[:, -1]
        return float(model.score(hidden)[0, 0])

    def replay(self, sides: Sequence[Side] = ()) -> GoldenReplay:
        """Score the golden conversations one at a time, and in batches padded on each of `sides`."""
        texts = [self._render_golden(line) for line in self.golden]
        for text, line in zip(texts, self.golden, strict=True):
            if line.input_ids and tuple(self.ids(text)) != line.input_ids:
                return GoldenReplay({}, [f"the template gives other ids for ...{text[-40:]!r}"])
        scores = {"alone": torch.cat([self.score([text]) for text in texts])}
        for side in sides:
            batches = (texts[i : i + BATCH_SIZE] for i in range(0, len(texts), BATCH_SIZE))
            scores[side] = torch.cat([self.score(batch, side) for batch in batches])
        expected = torch.tensor([line.reward for line in self.golden])
        return GoldenReplay(
            {name: largest_difference(values, expected) for name, values in scores.items()}, []
        )

    def _render_golden(self, line: GoldenLine) -> str:
        return self.render(line.messages) if line.messages else str(line.text)

    def _batch(self, texts: Sequence[str], side: Side) -> dict[str, Tensor]:
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
        """The object in a file of the directory; empty without such a file."""
        file = self.path / name
        try:
            content = json.loads(file.read_bytes()) if file.is_file() else {}
        except ValueError as error:
            raise ModelError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ModelError(f"{file} holds no JSON object")
        return content


def device_for(model: Any) -> torch.device:
    """The GPU if the model fits into its free memory, else the CPU."""
    needed = proof_bytes(sum(p.numel() for p in model.parameters()))
    fits = torch.cuda.is_available() and needed <= torch.cuda.mem_get_info()[0]
    return torch.device("cuda" if fits else "cpu")
