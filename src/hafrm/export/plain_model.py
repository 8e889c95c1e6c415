"""A reward directory as plain transformers sees it: files, golden scores, tokenizer, model and scores.

hafrm's engine is not involved, so any consumer gets these scores. No code in the directory is run and no
pickle is read.
"""

import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from jinja2.exceptions import TemplateError
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hafrm.errors import DataError, ModelError

log = logging.getLogger("hafrm")

GOLDEN = "golden_scores.jsonl"
"""The golden file of a directory: conversations with the reward that every consumer must get."""
TOLERANCE = 1e-4
"""Relative to max(1, |reward|), float32: a padded batch of a deep model against one text at a time."""
BATCH_SIZE = 16
"""Number of texts that are scored in one padded batch, and by the checklist."""
Side = Literal["left", "right"]
_TURNS = (
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


class GoldenLine(BaseModel):
    """One conversation and its reward: a JSON object on one line of the golden file."""

    model_config = ConfigDict(frozen=True)

    reward: FiniteFloat
    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None  # the conversation, rendered with the exported template
    input_ids: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _has_conversation(self) -> "GoldenLine":
        has_turns = all({"role", "content"} <= message.keys() for message in self.messages)
        if not has_turns or (not self.messages and self.text is None):
            raise ValueError("needs `messages` (role and content each) or `text`")
        return self


def read_golden(path: Path) -> list[GoldenLine]:
    """The lines of a golden file, or of the one in a directory; DataError if it is damaged."""
    file = path / GOLDEN if path.is_dir() else path
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read golden scores from {file}: {error}") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines += [GoldenLine.model_validate_json(text)] if text.strip() else []
        except ValidationError as error:
            what = error.errors()[0]
            raise DataError(f"{file}, line {number}: {what['loc']} {what['msg']}") from error
    if not lines:
        raise DataError(f"{file} holds no golden scores; `hafrm export` writes some")
    return lines


def proof_bytes(num_weights: int) -> int:
    """GPU memory that a model needs in float32, with its activations for one batch."""
    return int(1.3 * 4 * num_weights) + 2**31


def device_for(num_weights: int) -> torch.device:
    """The GPU if the model fits into its free memory in float32, else the CPU."""
    if torch.cuda.is_available():
        needed, free = proof_bytes(num_weights), torch.cuda.mem_get_info()[0]
        if needed <= free:
            return torch.device("cuda")
        sizes = f"float32 takes {needed / 2**30:.1f} GiB, the GPU has {free / 2**30:.1f} GiB free"
        log.info("the golden scores are computed on the CPU: %s", sizes)
    return torch.device("cpu")


def num_threads() -> int:
    """Number of CPU threads for a proof."""
    # torchrun sets OMP_NUM_THREADS=1 for each rank, but the other ranks have ended when the proof runs
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return torch.get_num_threads()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def old_rotary_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` under the names that transformers 4 reads; empty if there are none."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)  # Gemma 3 has another base for local layers
    keys = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    scaling = {key: value for key, value in rope.items() if key not in keys}
    if scaling.get("rope_type") != "default":
        keys["rope_scaling"] = scaling
    if local:
        keys["rope_local_base_freq"] = local["rope_theta"]
    if config.get("model_type") == "gpt_neox":  # has names of its own
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        return {names.get(key, key): value for key, value in keys.items()}
    return keys


def write_for_older_readers(directory: Path) -> None:
    """Add transformers 4's keys to the JSON files of an export; version 5 reads both."""
    for name, convert in (("config.json", old_config), ("tokenizer_config.json", old_tokenizer)):
        file = directory / name
        if file.is_file():
            content = convert(json.loads(file.read_bytes()))
            text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
            file.write_text(text + "\n", encoding="utf-8")


def old_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with version 4's names for rotary settings and dtype beside 5's, in nested configs too."""
    result = {
        key: old_config(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    dtype = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    # without them version 4 silently uses its class's default base (vllm-project/vllm#42624)
    return old_rotary_keys(config) | dtype | result


def old_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's config with a class that both versions have, and extra tokens under the old key."""
    result = dict(config)
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
        # else version 4's class adds token_type_ids, which decoders refuse
        result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(result.get("extra_special_tokens"), list):
        # not under both keys: version 5 would then drop them (huggingface/transformers#47838)
        result["additional_special_tokens"] = result.pop("extra_special_tokens")
    return result


def largest_difference(values: Float[Tensor, " texts"], expected: Float[Tensor, " texts"]) -> float:
    """The largest difference, relative to max(1, |expected|)."""
    return float(((values - expected).abs() / expected.abs().clamp(min=1.0)).max())


class GoldenReplay(NamedTuple):
    """The result of replaying golden scores."""

    differences: dict[str, float]  # the largest by way of scoring: alone, padded right or left
    faults: list[str]  # why the scores cannot be compared


class PlainModel:
    """The parts of a directory; ModelError for a part that cannot be read."""

    def __init__(
        self, path: Path, golden: Sequence[GoldenLine] = (), tolerance: float = TOLERANCE
    ) -> None:
        self.path, self.golden, self.tolerance = path, golden, tolerance
        self.is_adapter = (path / "adapter_config.json").is_file()

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a file of the directory; empty if there is no such file."""
        file = self.path / name
        try:
            return dict(json.loads(file.read_bytes())) if file.is_file() else {}
        except (ValueError, TypeError) as error:
            raise ModelError(f"{file} holds no JSON object: {error}") from error

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.read_json("config.json")

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config, which holds pad, EOS and vocabulary size."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @cached_property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the safetensors files, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - no mapping
                        shapes[name] = tuple(opened.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} is damaged: {error}") from error
        return shapes

    @cached_property
    def tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # libraries raise anything for a damaged file
            raise ModelError(f"AutoTokenizer cannot load it: {error}") from error

    @property
    def ends(self) -> set[int]:
        """Every id that the directory's files name as EOS."""
        ends = {self.tokenizer.eos_token_id}
        for config in (self.config, self.text_config):
            eos = config.get("eos_token_id")
            ends |= set(eos) if isinstance(eos, list) else {eos}
        return {int(end) for end in ends if end is not None}

    @cached_property
    def loaded(self) -> tuple[Any, Mapping[str, Any]]:
        """The classifier in float32, and transformers' report on missing and unexpected weights."""
        load: Any = AutoModelForSequenceClassification.from_pretrained
        load = partial(load, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
        try:
            if self.is_adapter:
                model, info = self._with_adapter(load), {}
            else:
                model, info = load(self.path, output_loading_info=True)
        except Exception as error:
            raise ModelError(f"transformers cannot load the classifier: {error}") from error
        return model.eval().to(device_for(sum(p.numel() for p in model.parameters()))), info

    def _with_adapter(self, load: Callable[..., Any]) -> Any:
        from peft import PeftConfig, PeftModel  # noqa: PLC0415 - heavy, and only for adapters

        adapter = PeftConfig.from_pretrained(str(self.path))
        base = load(adapter.base_model_name_or_path, revision=adapter.revision, num_labels=1)
        # An adapter cannot carry the pad id, which the classifier needs to find the last token.
        base.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return PeftModel.from_pretrained(base, str(self.path))

    def render(self, messages: Sequence[Mapping[str, str]], template: str | None = None) -> str:
        """A conversation as text, by the directory's chat template or another one."""
        render, turns = self.tokenizer.apply_chat_template, [*map(dict, messages)]
        try:
            return str(render(turns, chat_template=template, tokenize=False))
        except (TemplateError, ValueError, TypeError) as error:
            raise ModelError(f"the chat template cannot render a conversation: {error}") from error

    @cached_property
    def golden_texts(self) -> list[str]:
        return [self.render(g.messages) if g.messages else str(g.text) for g in self.golden]

    @property
    def texts(self) -> list[str]:
        """The conversations to score, rendered: some golden ones, or PROBES."""
        return self.golden_texts[:BATCH_SIZE] or [self.render(probe) for probe in PROBES]

    @cached_property
    def alone(self) -> Float[Tensor, " texts"]:
        # the rewards of `texts`, one at a time
        return torch.cat([self.score([text]) for text in self.texts])

    def ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered text."""
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    @torch.no_grad()
    def score(
        self, texts: Sequence[str], side: Side = "right", *, positions: bool = True
    ) -> Float[Tensor, " texts"]:
        """The rewards of one padded batch; `positions`: count them from each text's first real token."""
        model = self.loaded[0]
        batch = self._batch(texts, side)
        stock = model.get_base_model() if self.is_adapter else model
        has_positions = "position_ids" in inspect.signature(stock.forward).parameters
        if side == "left" and positions and has_positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        rewards: Tensor = model(**batch).logits[:, 0].float().cpu()
        return rewards

    @torch.no_grad()
    def scores_by_hand(self) -> Float[Tensor, " texts"]:
        """The head applied to the hidden state of each literal last token, as servers compute rewards."""
        model, batches = self.loaded[0], (self._batch([text], "right") for text in self.texts)
        hidden = [model.base_model(**batch).last_hidden_state[:, -1] for batch in batches]
        return torch.cat([model.score(state)[:, 0].float().cpu() for state in hidden])

    def _batch(self, texts: Sequence[str], side: Side) -> dict[str, Tensor]:
        options = {"return_tensors": "pt", "padding": len(texts) > 1, "padding_side": side}
        batch = self.tokenizer(list(texts), add_special_tokens=False, **options)
        device = self.loaded[0].device
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}

    def replay(self, sides: Sequence[Side] = ()) -> GoldenReplay:
        """Score the golden conversations one at a time, and in batches padded on each of `sides`."""
        texts = self.golden_texts
        for text, line in zip(texts, self.golden, strict=True):
            if line.input_ids and tuple(self.ids(text)) != line.input_ids:
                return GoldenReplay({}, [f"the template gives other ids for ...{text[-40:]!r}"])
        scores = {"alone": torch.cat([self.score([text]) for text in texts])}
        for side in sides:
            batches = (texts[i : i + BATCH_SIZE] for i in range(0, len(texts), BATCH_SIZE))
            scores[side] = torch.cat([self.score(batch, side) for batch in batches])
        expected = torch.tensor([line.reward for line in self.golden])
        return GoldenReplay({k: largest_difference(v, expected) for k, v in scores.items()}, [])
