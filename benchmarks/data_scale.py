"""What preference data costs by its number of rows: rows per second, memory, seconds to the first step.

    python benchmarks/data_scale.py --folder /tmp/scale 10_000 100_000 1_000_000

Rows are generated: a prompt and two responses, of lognormal lengths (medians of 30 and 60 words, as in
hh-rlhf, times --lengths). For each number a fresh process reads, checks and splits them, encodes them
(unless --read-only) and takes one step of a tiny model. Times are processor seconds, of one core under
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false; `first step` is all of them, imports included, and rows/s
counts by it. `peak` is the process's own high-water mark, `slope` its growth from the line before.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hafrm.recipe import Recipe
from hafrm.training import parallel, setup
from hafrm.training.loop import Job
from hafrm.training.methods import resolve_method
from hafrm.training.step_batches import build_micro_batch, plan_step

COLUMNS = (
    "rows",
    "file MB",
    "read, split",
    "encode",
    "first step",
    "rows/s",
    "peak MB",
    "slope B/row",
)
WORDS, PIECES = 4000, 2048


def write_rows(file: Path, num_rows: int, scale: float = 1.0) -> None:
    """Preference pairs as JSON lines (or Parquet, by the name) of realistic lengths; no two are alike."""
    rng = np.random.default_rng(0)
    letters = np.array(list("aabcdeeefghiiklmnooprsttu"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, WORDS)]
    ranks = rng.zipf(1.2, (PIECES, 10)) % WORDS
    pieces = [" ".join(words[i] for i in row) + "." for row in ranks]
    aside = file.with_suffix(".part")
    with aside.open("w", encoding="utf-8") as out:
        for start in range(0, num_rows, 1000):
            sizes = np.exp(rng.normal(np.log([30, 60, 60]), 0.7, (1000, 3))) * scale / 10
            for number, lengths in enumerate(sizes[: num_rows - start], start):
                texts = [
                    " ".join(pieces[i] for i in rng.integers(0, PIECES, 1 + int(length)))
                    for length in np.minimum(lengths, 100)
                ]
                names = ("prompt", "chosen", "rejected")
                row = {n: f"{number} {text}" for n, text in zip(names, texts, strict=True)}
                out.write(json.dumps(row) + "\n")
    if file.suffix == ".parquet":
        load_dataset("json", data_files=str(aside), split="train").to_parquet(file)
        aside.unlink()
    else:
        aside.replace(file)


def make_model(folder: Path, file: Path) -> None:
    """A byte-pair tokenizer of the rows' words, and a model of two thin layers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    names, alphabet = [*special.values()], pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": names, "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=4096, **options)
    with file.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator(
            (line for line, _ in zip(lines, range(2000), strict=False)), trainer
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=4096, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(file: Path, model: Path, num_rows: int, read_only: bool) -> dict[str, float]:
    """Seconds of each stage and peak memory of this process, which has done nothing else."""
    torch.set_num_threads(1)
    sections = {
        "model": {"path": str(model)},
        "data": {"train": str(file), "validation_fraction": 0.01},
        "method": {"name": "bt"},
        "training": {"precision": "fp32", "batch_size": 16, "steps": 1},
    }
    recipe = Recipe.model_validate(sections)
    imported = time.process_time()
    if read_only:
        splits = setup.read_splits(recipe)
        read = encoded = time.process_time()
        assert len(splits[1]) + len(splits[2]) <= num_rows
    else:
        at: list[float] = []
        own = setup.read_splits
        timed = mock.Mock(side_effect=lambda *a: (own(*a), at.append(time.process_time()))[0])
        with mock.patch.object(setup, "read_splits", timed):
            data = setup.prepare_data(recipe)
        (read,), encoded = at, time.process_time()
        method = resolve_method(recipe)
        network = setup.build_model(recipe, method, data.encoder, torch.device("cpu"))
        refs = Job(recipe, method, None, data, network, parallel.start()).order.window(0, 16)
        for groups in plan_step(data.train, refs, 4096)[0]:
            batch = build_micro_batch(groups)
            rewards = network(batch.layout).rewards
            gaps = rewards[batch.chosen] - rewards[batch.rejected]
            (-torch.nn.functional.logsigmoid(gaps).sum()).backward()
    end = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = {"read": read - imported, "encode": encoded - read, "first": end}
    return {**seconds, "rate": num_rows / end, "peak": peak}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kind", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--lengths", type=float, default=1.0, help="factor on all lengths")
    parser.add_argument("--read-only", action="store_true", help="neither encode nor train")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, sample = args.folder / "model", args.folder / "sample.jsonl"
    if not model.is_dir():
        write_rows(sample, 2000)
        make_model(model, sample)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    last: tuple[int, float] | None = None
    for num_rows in args.rows:
        file = args.folder / f"rows-{num_rows}-{args.lengths:g}.{args.kind}"
        if not file.is_file():
            write_rows(file, num_rows, args.lengths)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            m = pool.apply(measure, (file, model, num_rows, args.read_only))
        slope = (
            "" if last is None else f"{(m['peak'] - last[1]) * 2**20 / (num_rows - last[0]):,.0f}"
        )
        cells = [f"{num_rows:,}", f"{file.stat().st_size / 1e6:.0f}"]
        cells += [f"{m[name]:.1f}" for name in ("read", "encode", "first")]
        cells += [f"{m['rate']:,.0f}", f"{m['peak']:,.0f}", slope]
        print(f"| {' | '.join(cells)} |", flush=True)
        last = num_rows, m["peak"]


if __name__ == "__main__":
    main()
