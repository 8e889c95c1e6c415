"""Prove that a bulk job that is killed ends in the same bytes, and say what each kill cost.

    python benchmarks/score_resume.py --data preferences.jsonl ... --base MODEL_DIRECTORY

Rows are the prompts of the files with up to 16 of their responses, repeated to `--rows` and spread over
JSON lines, packed JSON lines and Parquet. The model is the first `--layers` layers of a causal LM with a
random reward head; texts are cut to some words so that the whole takes minutes on one thread. The job
runs once undisturbed; then anew, killed with SIGKILL at random moments of its scoring and started again.
Every output file and list of bad rows must be the same, and no finished shard written again.
"""

import argparse
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from workload import load_tokenizer

from hafrm.bulk.bulk_job import RECORDS
from hafrm.data.encoding import Encoder
from hafrm.data.reader import read_preferences
from hafrm.engine.model import HybridModel, hidden_size, new_reward_head, split_causal_lm
from hafrm.export.stock_export import export_reward
from hafrm.preferences import Group

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".jsonl")


def write_model(base: Path, layers: int, folder: Path) -> Path:
    """The first layers of a causal LM with a random reward head, as a reward directory."""
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    causal.config.num_hidden_layers = layers
    backbone, _ = split_causal_lm(causal)
    backbone.layers = backbone.layers[:layers]
    head = new_reward_head(hidden_size(backbone.config), torch.Generator().manual_seed(0))
    encoder = Encoder(load_tokenizer(base), max_length=1024)
    export_reward(HybridModel(backbone, reward_head=head), encoder, folder)
    return folder


def rows_of(groups: list[Group], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows without end, every hundredth of them one that cannot be scored."""
    number = 0
    while True:
        for group in groups:
            texts = dict.fromkeys(cut(text, args.words) for text in group.responses)
            responses = [""] if number % 100 == 99 else list(texts)[:16]
            prompt = cut(group.prompt[-1].content, 2 * args.words)
            yield {"id": number, "prompt": prompt, "responses": responses}
            number += 1


def cut(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def write_inputs(groups: list[Group], folder: Path, args: argparse.Namespace) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rows, files = rows_of(groups, args), []
    for k, suffix in enumerate(SUFFIXES):
        part = [next(rows) for _ in range(args.rows // len(SUFFIXES))]
        file = folder / f"part-{k}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(part), file)
        else:
            data = "".join(json.dumps(row) + "\n" for row in part).encode()
            file.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        files.append(str(file))
    return files


@dataclass(frozen=True)
class Job:
    """The command, and where it writes."""

    command: list[str]
    out: Path

    def start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([*self.command, "--out", str(self.out)], start_new_session=True)

    def finished(self) -> dict[str, tuple[int, float]]:
        """Inode and time of the finished shards' files; a file that is written again has another."""
        shards = [self.out / record["id"] for record in self._records()]
        return {s.name: (s.stat().st_ino, s.stat().st_mtime) for s in shards if s.exists()}

    def results(self) -> dict[str, bytes]:
        """Every output file and list of bad rows."""
        files = [*self.out.glob("part-*"), *(self.out / RECORDS).glob("part-*/bad_rows.jsonl")]
        return {file.name: file.read_bytes() for file in files}

    def of_shards(self, name: str) -> list[float]:
        """One number of every finished shard's record."""
        return [record[name] for record in self._records()]

    def _records(self) -> list[dict[str, Any]]:
        files = (self.out / RECORDS).glob("part-*/shards.jsonl")
        return [json.loads(line) for file in files for line in file.open()]


def wait_for_scoring(job: Job, process: "subprocess.Popen[bytes]", before: int) -> float:
    """The moment at which the first new shard is finished: imports and loading are behind it."""
    while len(job.finished()) <= before:
        if process.poll() is not None:
            raise SystemExit("the job ended before it could be killed; give it more --rows")
        time.sleep(0.01)
    return time.time()


def kill_at_random(job: Job, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Run the job, kill it at a random moment of the next `seconds` of scoring, and say what was lost."""
    before = job.finished()
    process = job.start()
    wait_for_scoring(job, process, len(before))
    time.sleep(draw.uniform(0, seconds))
    if process.poll() is not None:
        raise SystemExit("the job ended before it could be killed; give it more --rows")
    os.killpg(process.pid, signal.SIGKILL)
    killed = time.time()
    process.wait()
    after = job.finished()
    assert all(after.get(name) == mark for name, mark in before.items()), (
        "a shard was written again"
    )
    lost = killed - max(mark[1] for mark in after.values())
    return {"shards": len(after), "lost": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", required=True, nargs="+", help="preference files, as hafrm reads them"
    )
    parser.add_argument("--base", required=True, type=Path, help="a causal LM's directory")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument(
        "--words", type=int, default=8, help="of a response; twice as many of a prompt"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows-per-shard", type=int, default=4096)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prove(folder, args)


def prove(folder: Path, args: argparse.Namespace) -> None:
    model = write_model(args.base, args.layers, folder / "model")
    groups = list(read_preferences(args.data, max_bad_fraction=1.0).groups)
    inputs = write_inputs(groups, folder / "in", args)
    command = [sys.executable, "-m", "hafrm", "score", str(model), *inputs]
    command += ["--rows-per-shard", str(args.rows_per_shard)]
    plain, job = Job(command, folder / "plain"), Job(command, folder / "killed")
    start = time.perf_counter()
    if plain.start().wait():
        raise SystemExit("the job failed")
    undisturbed = time.perf_counter() - start
    responses = plain.of_shards("num_responses")
    print(f"{args.rows:,} rows, {sum(responses):,} responses, {len(responses)} shards")
    print(f"undisturbed: {undisturbed:.1f} s, of which loading the model and counting the rows")
    draw = random.Random(args.seed)
    window = undisturbed / (args.kills + 2)
    start = time.perf_counter()
    for kill in range(1, args.kills + 1):
        found = kill_at_random(job, window, draw)
        print(f"kill -9 number {kill}: {found['shards']} shards kept, {found['lost']:.1f} s lost")
    kept = job.finished()
    if job.start().wait():
        raise SystemExit("the resumed job failed")
    total = time.perf_counter() - start
    again = sum(job.finished()[name] != mark for name, mark in kept.items())
    print(f"killed and resumed: {total:.1f} s in all, {again} finished shards written again")
    expected, results = plain.results(), job.results()
    different = sorted(n for n in expected | results if expected.get(n) != results.get(n))
    bad = sum(data.count(b"\n") for name, data in results.items() if name.endswith(".bad.jsonl"))
    print(f"{len(results)} files compared ({bad:,} bad rows listed): {len(different)} differ")
    if different or again:
        raise SystemExit(f"not the same: {different[:8]}")
    print("identical")


if __name__ == "__main__":
    main()
