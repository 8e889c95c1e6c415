"""What preference data costs by its number of rows: rows per second, memory, seconds to the first step.

    python benchmarks/data_scale.py --folder /tmp/scale 10_000 100_000 1_000_000

Rows are generated: a prompt and two responses, of lognormal lengths (medians of 30 and 60 words, as in
hh-rlhf). For each number a fresh process reads, checks and splits them, encodes them and takes one step of
a tiny model; with --again another one does it once more, from the cache. `peak` is the process's own
high-water mark, and `slope` its growth from the row before.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from unittest import mock

import numpy as np

COLUMNS = ("rows", "cached", "file MB", "read, split s", "encode s", "first step s", "rows/s")
WORDS, PIECES = 4000, 2048


def write_rows(file: Path, num_rows: int) -> None:
    """Preference pairs as JSON lines (or Parquet, by the name) of realistic lengths; no two are alike."""
    rng = np.random.default_rng(0)
    letters = np.array(list("aabcdeeefghiiklmnooprsttu"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, WORDS)]
    ranks = rng.zipf(1.2, (PIECES, 10)) % WORDS
    pieces = [" ".join(words[i] for i in row) + "." for row in ranks]
    aside = file.with_suffix(".part")
    with aside.open("w", encoding="utf-8") as out:
        for start in range(0, num_rows, 1000):
            sizes = np.exp(rng.normal(np.log([30, 60, 60]), 0.7, (1000, 3))) / 10
            for number, lengths in enumerate(sizes[: num_rows - start], start):
                texts = [
                    " ".join(pieces[i] for i in rng.integers(0, PIECES, 1 + int(length)))
                    for length in np.minimum(lengths, 100)
                ]
                names = ("prompt", "chosen", "rejected")
                row = {n: f"{number} {text}" for n, text in zip(names, texts, strict=True)}
                out.write(json.dumps(row) + "\n")
    if file.suffix == ".parquet":
        import pyarrow.json
        import pyarrow.parquet

        reader = pyarrow.json.open_json(aside)
        with pyarrow.parquet.ParquetWriter(file, reader.schema) as writer:
            for batch in reader:
                writer.write_batch(batch)
        aside.unlink()
    else:
        aside.replace(file)


def make_model(folder: Path, file: Path) -> None:
    """A byte-pair tokenizer of the rows' words, and a model of two thin layers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with file.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator(
            (line for line, _ in zip(lines, range(2000), strict=False)), trainer
        )
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=4096, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(file: Path, model: Path, num_rows: int) -> dict[str, float]:
    """Seconds of each stage and peak memory of this process, which has done nothing else."""
    start = time.perf_counter()
    import torch

    from hafrm.recipe import Recipe
    from hafrm.training import setup
    from hafrm.training.loop import Job
    from hafrm.training.methods import resolve_method
    from hafrm.training.step_batches import build_micro_batch, plan_step

    torch.set_num_threads(1)
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": str(file), "validation_fraction": 0.01},
            "method": {"name": "bt"},
            "training": {"precision": "fp32", "batch_size": 16, "steps": 1},
        }
    )
    at: dict[str, float] = {"start": time.perf_counter()}
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def read_splits(*args: object, **options: object) -> object:
        result = own(*args, **options)
        at["read"] = time.perf_counter()
        return result

    own = setup.read_splits
    with mock.patch.object(setup, "read_splits", read_splits):
        data = setup.prepare_data(recipe)
    at["encoded"] = time.perf_counter()
    method = resolve_method(recipe)
    network = setup.build_model(recipe, method, data.encoder, torch.device("cpu"))
    job = Job(recipe, method, None, data, network)
    refs = job.order.window(0, recipe.training.batch_size)
    for groups in plan_step(data.train, refs, 4096)[0]:
        batch = build_micro_batch(groups)
        rewards = network(batch.layout).rewards
        gaps = rewards[batch.chosen] - rewards[batch.rejected]
        (-torch.nn.functional.logsigmoid(gaps).sum()).backward()
    end = time.perf_counter()
    read = at.get("read", at["start"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "read": read - at["start"],
        "encode": at["encoded"] - read,
        "first": end - start,
        "rate": num_rows / (end - start),
        "imported": imported / 1024,
        "peak": peak / 1024,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kind", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--again", action="store_true", help="measure each number a second time")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HAFRM_CACHE", str(args.folder / "cache"))
    model, sample = args.folder / "model", args.folder / "sample.jsonl"
    if not model.is_dir():
        write_rows(sample, 2000)
        make_model(model, sample)
    print("| " + " | ".join([*COLUMNS, "peak MB", "slope B/row"]) + " |")
    last: tuple[int, float] | None = None
    for num_rows in args.rows:
        file = args.folder / f"rows-{num_rows}.{args.kind}"
        if not file.is_file():
            write_rows(file, num_rows)
        for cached in [False, True][: 1 + args.again]:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                m = pool.apply(measure, (file, model, num_rows))
            slope = (m["peak"] - last[1]) * 2**20 / (num_rows - last[0]) if last else float("nan")
            cells = [f"{num_rows:,}", "yes" if cached else "no", f"{file.stat().st_size / 1e6:.0f}"]
            cells += [f"{m[k]:.1f}" for k in ("read", "encode", "first")]
            cells += [f"{m['rate']:,.0f}", f"{m['peak']:,.0f}", f"{slope:,.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
            if not cached:
                latest = num_rows, m["peak"]
        last = latest


if __name__ == "__main__":
    main()
