"""What preference data costs by its number of rows: rows per second, memory, seconds to the first step.

    python benchmarks/data_scale.py --base HuggingFaceTB/SmolLM2-135M-Instruct --folder /tmp/scale \
        10_000 100_000 --repeat 10 100

Rows are generated: a prompt and two responses of lognormal lengths (medians of 24 and 48 words, a token
each, times --lengths) from the vocabulary of the base's tokenizer. For each number a fresh process reads,
checks, splits and encodes them and takes one step of a tiny model with that tokenizer; a second one starts
from the cache, with all files dropped from the page cache before. `--repeat 100` starts again, from a file
and a cache that are the last ones a hundred times over: ten million rows without the hours before.

Seconds are of the processor, imports included in `first step`; the cached start also has wall-clock seconds
from the end of the imports.
`peak` is the largest private memory (RssAnon, sampled each 0.1 s: RSS also counts libraries and pages of
mapped files), `slope` its growth from the line before.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hafrm.atomic import write_manifest
from hafrm.data.reader import file_digests
from hafrm.recipe import Recipe
from hafrm.training import parallel, prepared_data, setup
from hafrm.training.loop import Job
from hafrm.training.methods import resolve_method
from hafrm.training.step_batches import build_micro_batch, plan_step

COLUMNS = (
    *("rows", "file MB", "read, split", "encode", "first step", "rows/s", "peak MB", "slope B/row"),
    *("cached: first step", "wall, no imports", "peak MB", "slope B/row"),
)
PIECES = 2048


def write_rows(file: Path, num_rows: int, words: list[str], scale: float) -> None:
    """Preference pairs as JSON lines of realistic lengths; no two are alike."""
    rng = np.random.default_rng(0)
    ranks = rng.zipf(1.2, (PIECES, 10)) % len(words)
    pieces = [" ".join(words[i] for i in row) + "." for row in ranks]
    aside = file.with_suffix(".part")
    with aside.open("w", encoding="utf-8") as out:
        for start in range(0, num_rows, 1000):
            sizes = np.exp(rng.normal(np.log([24, 48, 48]), 0.7, (1000, 3))) * scale / 10
            for number, lengths in enumerate(sizes[: num_rows - start], start):
                texts = [
                    " ".join(pieces[i] for i in rng.integers(0, PIECES, 1 + int(length)))
                    for length in np.minimum(lengths, 100)
                ]
                names = ("prompt", "chosen", "rejected")
                row = {n: f"{number} {text}" for n, text in zip(names, texts, strict=True)}
                out.write(json.dumps(row) + "\n")
    aside.replace(file)


def make_model(folder: Path, base: str) -> list[str]:
    """A model of two thin layers with the base's tokenizer; returns words that are a token each."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = (tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab())
    return sorted(w[1:] for w in words if re.fullmatch(" [a-z]+", w))


def watch_memory(peaks: list[int]) -> None:
    """Keep the largest private memory of this process, in MiB, as the only item."""
    while True:
        status = Path("/proc/self/status").read_text()
        peaks[:] = [max(peaks[0], int(status.split("RssAnon:")[1].split()[0]) // 1024)]
        time.sleep(0.1)


def recipe_of(file: Path, model: Path) -> Recipe:
    sections: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": str(file), "validation_fraction": 0.01},
        "method": {"name": "bt"},
        "training": {"precision": "fp32", "batch_size": 16, "steps": 1},
    }
    return Recipe.model_validate(sections)


def measure(file: Path, model: Path) -> dict[str, float]:
    """Seconds of each stage and peak memory of this process, which has done nothing else."""
    began, peaks = time.time(), [0]
    threading.Thread(target=watch_memory, args=(peaks,), daemon=True).start()
    torch.set_num_threads(1)
    recipe = recipe_of(file, model)
    at = [time.process_time()]
    own = setup.read_splits
    timed = mock.Mock(side_effect=lambda *a: (own(*a), at.append(time.process_time()))[0])
    with mock.patch.object(setup, "read_splits", timed):
        data = prepared_data.prepare_data(recipe, file.with_suffix(".bad"))
    encoded = time.process_time()
    method = resolve_method(recipe)
    network = setup.build_model(recipe, method, data.encoder, torch.device("cpu"))
    refs = Job(recipe, method, None, data, network, parallel.start()).order.window(0, 16)
    for groups in plan_step(data.train, refs, 4096)[0]:
        batch = build_micro_batch(groups)
        rewards = network(batch.layout).rewards
        gaps = rewards[batch.chosen] - rewards[batch.rejected]
        (-torch.nn.functional.logsigmoid(gaps).sum()).backward()
    first, wall = time.process_time(), time.time() - began
    read = {"read": at[1] - at[0], "encode": encoded - at[1]} if len(at) > 1 else {}
    return {**read, "first": first, "wall": wall, "peak": peaks[0], "groups": len(data.train)}


def measure_apart(file: Path, model: Path) -> dict[str, float]:
    """`measure` in a process of its own, its files not in the page cache."""
    os.sync()
    for path in [file, *Path(os.environ["HAFRM_CACHE"]).rglob("*")]:
        if path.is_file():
            with path.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (file, model))


def repeat(file: Path, model: Path, times: int) -> Path:
    """A file of the rows of `file` so many times, and the cache that stands for it."""
    long = file.with_name(f"{file.stem}-times-{times}.jsonl")
    with long.open("wb") as out:
        for _ in range(times):
            with file.open("rb") as rows:
                shutil.copyfileobj(rows, out, 2**20)
    recipes = [recipe_of(name, model) for name in (file, long)]
    short, folder = (
        prepared_data._cache_of(
            recipe, setup.build_encoder(recipe), file_digests([*recipe.data.train])
        )
        for recipe in recipes
    )
    assert short is not None, "a cached file"
    assert folder is not None
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(short, folder)
    columns = load_file(short / "train.safetensors")
    ends = columns.pop("ends")
    longer = {name: np.tile(values, times) for name, values in columns.items()}
    steps = np.concatenate([[0], np.tile(np.diff(ends), times)])
    save_file({**longer, "ends": np.cumsum(steps)}, folder / "train.safetensors")
    with (folder / "train").open("wb") as out:
        for _ in range(times):
            with (short / "train").open("rb") as records:
                shutil.copyfileobj(records, out, 2**20)
    write_manifest(folder)
    return long


def slope(now: dict[str, float], last: dict[str, float] | None) -> str:
    """Bytes of memory for each further row."""
    if last is None:
        return ""
    return f"{(now['peak'] - last['peak']) * 2**20 / (now['rows'] - last['rows']):,.0f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--base", required=True, help="directory or hub id with the tokenizer")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--lengths", type=float, default=1.0, help="factor on all lengths")
    parser.add_argument(
        "--repeat",
        type=int,
        nargs="+",
        default=[],
        help="cached starts of the last rows so many times",
    )
    args = parser.parse_args(arguments)
    os.environ["HAFRM_CACHE"] = str(args.folder / "cache")
    model = args.folder / "model"
    words = make_model(model, args.base)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    last: list[dict[str, float] | None] = [None, None]
    for num_rows in args.rows:
        file = args.folder / f"rows-{num_rows}-{args.lengths:g}.jsonl"
        if not file.is_file():
            write_rows(file, num_rows, words, args.lengths)
        shutil.rmtree(args.folder / "cache", ignore_errors=True)
        starts = [measure_apart(file, model) | {"rows": num_rows} for _ in range(2)]
        print(row_of(num_rows, file, starts, last), flush=True)
        last = list(starts)
    for times in args.repeat:
        long = repeat(file, model, times)
        cached = measure_apart(long, model) | {"rows": num_rows * times}
        print(row_of(num_rows * times, long, [{}, cached], last), flush=True)
        last = [None, cached]
        long.unlink()


def row_of(
    num_rows: int, file: Path, starts: list[dict[str, float]], last: list[dict[str, float] | None]
) -> str:
    """A line of the table."""
    first, again = starts
    cells = [f"{num_rows:,}", f"{file.stat().st_size / 1e6:,.0f}"]
    if first:
        cells += [f"{first[name]:,.1f}" for name in ("read", "encode", "first")]
        cells += [f"{num_rows / first['first']:,.0f}", f"{first['peak']:,}", slope(first, last[0])]
    else:
        cells += [""] * 6
    # what fits in memory is not cached: the second start reads and encodes too
    cells += ["read again"] if "read" in again else [f"{again['first']:.1f}"]
    cells += [f"{again['wall']:.1f}", f"{again['peak']:,}", slope(again, last[1])]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
