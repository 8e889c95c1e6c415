"""Small whole runs: a tiny base model on disk, learnable preferences, recipes, and a second process.

`tiny_recipe(folder)` writes what a recipe needs under `folder` and returns it; `train(recipe, out)`
then takes a second or two, most of it the loading of the exported directories.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import hafrm
from hafrm.config import build_recipe
from hafrm.data.encoding import EncodedGroup
from hafrm.data.groups import Comparison
from hafrm.recipe import Recipe
from models_for_tests import FAMILIES, token_groups
from tokenizers_for_tests import chat_tokenizer

ROOT = Path(hafrm.__file__).parents[2]
KIND = ("thank you", "a good idea", "nice day", "helpful answer", "mix flour and water")
CURT = ("def print", "a little boat", "the sea", "wait", "return a + b")
THROUGHPUT = ("comparisons_per_second", "tokens_per_second")
"""What two runs of one recipe may differ in."""


def base_model(directory: Path, family: str = "llama", seed: int = 0, **sizes: Any) -> Path:
    """A directory with a random causal LM and a chat tokenizer, as a hub model's."""
    name, given = FAMILIES[family]
    tokenizer = chat_tokenizer()
    ids = {
        f"{token}_token_id": getattr(tokenizer, f"{token}_token_id")
        for token in ("pad", "bos", "eos")
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        **{**given, **ids, "vocab_size": len(tokenizer), **sizes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(2.0)  # sharper than the usual start, so that differences show
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def preference_rows(num_prompts: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose chosen responses are kind and rejected ones curt, of very unequal lengths.

    Every third prompt comes with three ranked responses, hence three comparisons; one row is a tie.
    """
    draw = random.Random(seed)

    def text(words: Sequence[str]) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.choice((1, 2, 4, 7))))

    rows: list[dict[str, Any]] = []
    for number in range(num_prompts):
        prompt = f"Question {seed}-{number}: {text(KIND + CURT)}?"
        good, bad = f"{text(KIND)} {number}", f"{text(CURT)} {number}"
        if number % 3 == 2:
            middle = f"{text(KIND)} {text(CURT)}"
            rows.append({"prompt": prompt, "responses": [bad, good, middle], "ranks": [3, 1, 2]})
        else:
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad, "margin": 0.25})
    rows[0] |= {"tie": True}
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, *, model: Path | None = None, **sections: Any) -> Recipe:
    """A recipe of 6 steps with 6 comparisons each; `sections` replace its keys, section by section."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(model or base_model(folder / "base"))},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", preference_rows())),
            "validation": str(write_rows(folder / "valid.jsonl", preference_rows(9, seed=1))),
            "max_length": 96,
        },
        "method": {"name": "haf"},
        "training": {
            "steps": 6,
            "batch_size": 6,
            "learning_rate": 3e-3,
            "max_tokens": 256,
            "warmup_fraction": 0.2,
        },
        "evaluation": {"every": 0},
        "checkpoint": {"every": 0},
        "tracking": {"log_every": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build_recipe(values)


def encoded(
    shapes: Sequence[tuple[int, tuple[int, ...]]],
    comparisons: Sequence[Sequence[Comparison]] | None = None,
    seed: int = 0,
) -> list[EncodedGroup]:
    """Encoded groups of random ids, by default with every response preferred over its next one."""
    chains = comparisons or [
        [Comparison(k, k + 1) for k in range(len(responses) - 1)] for _, responses in shapes
    ]
    return [
        EncodedGroup(f"g{i}", tokens.prompt_ids, tokens.response_ids, tuple(chain), "test", {})
        for i, (tokens, chain) in enumerate(zip(token_groups(shapes, seed), chains, strict=True))
    ]


def without_clocks(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what depends on the machine's speed."""
    return [{k: v for k, v in record.items() if k not in THROUGHPUT} for record in metrics]


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    """All weights of an exported directory."""
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    first, second = weights_in(one), weights_in(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def environment(cache: Path, **more: str) -> dict[str, str]:
    """For a process of its own: our sources, one thread, no hub."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    fixed = {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HAFRM_CACHE": str(cache),
    }
    return {**os.environ, **fixed, **more}


def start_hafrm(arguments: Sequence[str], cache: Path) -> "subprocess.Popen[str]":
    """`python -m hafrm ...`, running."""
    return subprocess.Popen(
        [sys.executable, "-m", "hafrm", *arguments],
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
