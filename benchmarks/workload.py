"""What all benchmarks share: the same comparisons, ids and model, the machine's peaks, and rows of results.

A workload is a fixed window of comparisons of a data set, encoded once, and a model: a shape with random
weights, or a directory. Results are rows, written as they come, so that what fails later loses nothing.
"""

import argparse
import copy
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from hafrm.data.encoding import Encoder
from hafrm.data.reader import read_preferences
from hafrm.preferences import Group, TokenizedGroup
from hafrm.training.step_batches import ComparisonOrder

BATCH = 16
"""Comparisons of an optimiser step."""

SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "small": (
        LlamaConfig,
        {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
        },
    ),
    "tiny": (
        LlamaConfig,
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
    "phi-2": (
        PhiConfig,
        {
            "vocab_size": 51200,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "partial_rotary_factor": 0.4,
        },
    ),
    "mistral-7b": (
        MistralConfig,
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": None,
        },
    ),
}
"""Model shapes by name; the last two are those of the paper's models, with random weights."""


@dataclass(frozen=True)
class Workload:
    """The comparisons that are trained on, and the model that is."""

    name: str
    encoder: Encoder
    groups: list[Group]
    encoded: list[TokenizedGroup]
    """Groups that hold the window's comparisons and no others."""
    config: PretrainedConfig
    steps: int
    max_tokens: int
    """Budget of one of our micro-batches."""
    device: torch.device
    lora_rank: int | None = None

    @property
    def num_comparisons(self) -> int:
        return self.steps * BATCH

    def causal_lm(self, dtype: torch.dtype = torch.float32) -> Any:
        """The same causal LM every time."""
        return build_model(AutoModelForCausalLM, self.config, dtype, self.device)

    def classifier(self, dtype: torch.dtype = torch.float32) -> Any:
        """A classifier with one label, of the same shape and with a random head."""
        config = copy.deepcopy(self.config)
        config.num_labels = 1
        return build_model(AutoModelForSequenceClassification, config, dtype, self.device)


def build_model(auto: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The weights of the directory that the config was read from, else the same random ones every time."""
    torch.manual_seed(0)
    if config.name_or_path and Path(config.name_or_path).is_dir():
        return auto.from_pretrained(config.name_or_path, config=config, dtype=dtype).to(device)
    with device:
        model = auto.from_config(copy.deepcopy(config), dtype=dtype)
    return model.to(device)


def add_model_options(parser: argparse.ArgumentParser, shape: str) -> None:
    """--model, or --tokenizer with --shape."""
    parser.add_argument(
        "--model", type=Path, help="a model directory; else --shape and --tokenizer"
    )
    parser.add_argument("--shape", choices=SHAPES, default=shape, help="of random weights")
    parser.add_argument("--tokenizer", type=Path, help="model directory or tokenizer.json")


def model_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with a model's directory as shape and tokenizer."""
    args = parser.parse_args()
    if args.model is not None:
        args.shape, args.tokenizer = str(args.model), args.model
    args.name = Path(args.shape).name
    if args.tokenizer is None:
        parser.error("give --model, or --tokenizer")
    return args


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A model directory's tokenizer, or a bare tokenizer.json with <s>, </s> and <unk>."""
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    vocabulary = tokenizer.get_vocab()
    for role, names in (
        ("eos_token", ("</s>", "<|endoftext|>")),
        ("bos_token", ("<s>",)),
        ("unk_token", ("<unk>",)),
    ):
        name = next((name for name in names if name in vocabulary), None)
        if name is not None:
            setattr(tokenizer, role, name)
    if tokenizer.unk_token is None:  # Phi-2's has one special token and room for a pad
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def load(  # noqa: PLR0913
    data: str,
    tokenizer: Path,
    *,
    shape: str,
    steps: int,
    max_tokens: int,
    max_length: int,
    device: torch.device,
    lora_rank: int | None = None,
) -> Workload:
    """The first `steps` * BATCH comparisons of a seeded order over `data`."""
    encoder = Encoder(load_tokenizer(tokenizer), max_length=max_length)
    everything = read_preferences([data]).groups
    order = ComparisonOrder(encoder.encode(everything)[0], per_prompt=4, seed=0)
    picked: dict[int, list[int]] = {}
    for pick in order.window(0, steps * BATCH):
        picked.setdefault(pick.group, []).append(pick.comparison)
    groups = [_only(everything[index], comparisons) for index, comparisons in picked.items()]
    encoded, _ = encoder.encode(groups)
    return Workload(
        name=Path(data).name.split(".")[0],
        encoder=encoder,
        groups=groups,
        encoded=encoded,
        config=config_of(shape, encoder),
        steps=steps,
        max_tokens=max_tokens,
        device=device,
        lora_rank=lora_rank,
    )


def config_of(shape: str, encoder: Encoder) -> PretrainedConfig:
    """The shape's config, with the vocabulary and special tokens of the encoder; a model's is its own."""
    if shape not in SHAPES:
        return AutoConfig.from_pretrained(shape)
    kind, sizes = SHAPES[shape]
    return kind(
        **{"vocab_size": len(encoder.tokenizer), "max_position_embeddings": 4096} | sizes,
        pad_token_id=encoder.pad_id,
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=encoder.eos_id,
    )


def _only(group: Group, comparisons: Sequence[int]) -> Group:
    chosen = tuple(group.comparisons[c] for c in comparisons)
    used = sorted({side for c in chosen for side in (c.chosen, c.rejected)})
    place = {old: new for new, old in enumerate(used)}
    return replace(
        group,
        responses=tuple(group.responses[i] for i in used),
        comparisons=tuple(
            replace(c, chosen=place[c.chosen], rejected=place[c.rejected]) for c in chosen
        ),
    )


NOMINAL = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by part of a GPU's name, from NVIDIA's data sheets: what MFU is counted against."""


@dataclass(frozen=True)
class Peaks:
    """What this machine can do, best of several tries."""

    flops: float
    """FLOP/s of a square matrix product in the dtype of the run."""
    bandwidth: float
    """Bytes/s of a copy, read and write counted."""
    nominal: float
    """FLOP/s by the data sheet; measured where there is none."""

    def floor(self, flops: float, moved: float) -> float:
        """Seconds below which no code can do this much work here."""
        return max(flops / self.flops, moved / self.bandwidth)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """In about a second."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * size**3 / best_time(lambda: a @ b, device)
    big = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    bandwidth = 2 * big.numel() / best_time(lambda: other.copy_(big), device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    nominal = next((peak for part, peak in NOMINAL.items() if part in name), flops)
    return Peaks(flops, bandwidth, nominal)


def best_time(run: Callable[[], object], device: torch.device, tries: int = 6) -> float:
    """Seconds of the fastest of several runs; the first one warms up."""
    seconds = []
    for _ in range(tries):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def synchronise(device: torch.device) -> None:
    """Wait for the device's work, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Rows:
    """Rows of a benchmark, a line of JSON each in a file of `folder` as they come."""

    def __init__(self, folder: Path | None, name: str, *, seconds: float = float("inf")) -> None:
        """After `seconds` nothing more is started."""
        self.rows: list[dict[str, Any]] = []
        self._file = None if folder is None else folder / f"{name}.jsonl"
        self._end = time.monotonic() + seconds
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, what: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`what` with the numbers that `measure` returns, or with the error that it raises."""
        free_memory()
        try:
            if time.monotonic() > self._end:
                raise TimeoutError("not started: the time is up")
            row = what | measure()
        except Exception as error:  # noqa: BLE001 - whatever one row raises, the others are run
            row = what | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            if not isinstance(error, TimeoutError):
                traceback.print_tb(error.__traceback__, limit=-4)
        self.rows.append(row)
        line = json.dumps(row)
        print(line, file=sys.stderr, flush=True)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(line + "\n")
        return row


def free_memory() -> None:
    """What an earlier row left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
