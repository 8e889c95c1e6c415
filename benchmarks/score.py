"""Time scoring against plain transformers: same model, same conversations, same scores, one process.

    python benchmarks/score.py --data preferences.jsonl --tokenizer tokenizer.json

Best-of-16: each prompt of the file with 16 candidates, its own two responses and 14 drawn from other
prompts of the file, so that their lengths are those of the file. Single responses: each prompt with one
of its two responses. Pairs as rows: both responses of each prompt as rows of their own.
Plain transformers renders the chat template, tokenises, sorts by length and runs right-padded batches of
AutoModelForSequenceClassification; of several batch sizes the fastest on a fifth of the work runs all of
it. Both sides start from text and end with scores in the order given; the best of `--repeats` counts, and
they take turns, so that a noisy neighbour disturbs both.
The floor is the time that useful FLOPs would take at the float32 peak measured in the same run.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peaks
import torch
import transformers
from numpy.typing import NDArray
from setting import POSITIONS, forward_flops, write_reward_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from workload import load_tokenizer

from hafrm.data.encoding import Encoder
from hafrm.data.reader import read_preferences
from hafrm.preferences import Group, TokenizedGroup
from hafrm.scoring.scorer import RewardModel

BATCHES = (1, 2, 4, 8, 16, 32)
Scores = NDArray[np.float32]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """Groups to score, and what they come to."""

    name: str
    groups: list[Group]
    encoded: list[TokenizedGroup]

    @property
    def num_responses(self) -> int:
        return sum(len(group.responses) for group in self.groups)

    def describe(self) -> str:
        prompt = sum(len(g.prompt_ids) for g in self.encoded)
        response = sum(len(ids) for g in self.encoded for ids in g.response_ids)
        repeated = sum(len(g.prompt_ids) * len(g.response_ids) for g in self.encoded)
        return (
            f"{self.name}: {self.num_responses} responses to {len(self.groups)} rows' prompts; "
            f"{prompt / len(self.encoded):.0f} prompt and {response / self.num_responses:.0f} response "
            f"tokens on average; {(repeated + response) / (prompt + response):.2f} x as many tokens when "
            "prompts are repeated"
        )


def tasks(data: str, encoder: Encoder, args: argparse.Namespace) -> list[Task]:
    """The three kinds of work, from groups of two responses that fit the model's positions."""
    draw = random.Random(0)
    encoded, _ = encoder.encode(read_preferences([data]).groups)
    fits = {g.id for g in encoded if g.num_tokens < POSITIONS}
    pairs = [g for g in read_preferences([data]).groups if len(g.responses) == 2 and g.id in fits]
    draw.shuffle(pairs)
    pool = sorted({text for group in pairs for text in group.responses})
    best = []
    for group in pairs[: args.prompts]:
        others = [
            text for text in draw.sample(pool, args.candidates) if text not in group.responses
        ]
        texts = (*group.responses, *others[: args.candidates - 2])
        best.append(Group(group.id, group.prompt, texts))
    singles = [Group(g.id, g.prompt, (draw.choice(g.responses),)) for g in pairs[: args.singles]]
    rows = [
        Group(f"{g.id}-{k}", g.prompt, (text,))
        for g in pairs[: args.singles // 2]
        for k, text in enumerate(g.responses)
    ]
    named = {f"best-of-{args.candidates}": best, "single responses": singles, "pairs as rows": rows}
    found = []
    for name, groups in named.items():
        encoded, report = encoder.encode(groups)
        assert not report.prompts_cut
        assert not report.responses_cut
        found.append(Task(name, groups, encoded))
    return found


class Plain:
    """Plain transformers: one padded row for each response."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32
        ).eval()

    def encode(self, groups: Sequence[Group]) -> list[list[int]]:
        """Token ids of each conversation, rendered and tokenised whole."""
        texts = [
            self.tokenizer.apply_chat_template(
                [
                    *({"role": m.role, "content": m.content} for m in group.prompt),
                    {"role": "assistant", "content": response},
                ],
                tokenize=False,
            )
            for group in groups
            for response in group.responses
        ]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def score(self, groups: Sequence[Group], batch_size: int) -> Scores:
        ids = self.encode(groups)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        scores = np.empty(len(ids), np.float32)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in part]}, return_tensors="pt")
            scores[part] = self.model(**batch, use_cache=False).logits[:, 0].numpy()
        return scores


def timed(run: Callable[[], Scores]) -> tuple[float, Scores]:
    start = time.perf_counter()
    scores = run()
    return time.perf_counter() - start, scores


def measure(
    task: Task, plain: Plain, ours: RewardModel, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of both, the batch sizes tried, and how far scores differ."""
    sample = task.groups[::5]
    plain.score(sample[:1], 1)
    tried = {b: timed(lambda b=b: plain.score(sample, b))[0] for b in BATCHES}
    batch = min(tried, key=tried.__getitem__)

    def run(groups: Sequence[Group]) -> Scores:
        return ours.score_encoded(ours.encoder.encode(groups)[0])

    run(sample)  # the sample has warmed the other side
    peak, seconds, plain_seconds = (
        peaks.measure(CPU, torch.float32).flops,
        float("inf"),
        float("inf"),
    )
    for _ in range(args.repeats):
        took, scores = timed(lambda: run(task.groups))
        seconds = min(seconds, took)
        took, expected = timed(lambda: plain.score(task.groups, batch))
        plain_seconds = min(plain_seconds, took)
        peak = max(peak, peaks.measure(CPU, torch.float32).flops)
    same = same_ids(task, plain)
    return {
        "task": task.name,
        "responses": task.num_responses,
        "batch_size": batch,
        "tried": tried,
        "peak": peak,
        "plain_seconds": plain_seconds,
        "seconds": seconds,
        "plain_floor": forward_flops(task.encoded, shared=False) / peak,
        "floor": forward_flops(task.encoded, shared=True) / peak,
        "difference": float(np.abs(scores - expected)[same].max()),
        "merged": int((~same).sum()),
    }


def same_ids(task: Task, plain: Plain) -> NDArray[np.bool_]:
    """Which conversations have the same ids when the response is tokenised apart from the prompt.

    The others begin with a line break that merges with the template's: two inputs, not one scored twice.
    """
    apart = [[*g.prompt_ids, *ids] for g in task.encoded for ids in g.response_ids]
    whole = plain.encode(task.groups)
    return np.array([list(a) == b for a, b in zip(apart, whole, strict=True)])


def time_command(task: Task, directory: Path, processes: int) -> float:
    """Seconds of the whole command over a file of the task's rows: imports, loading, reading, writing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        with source.open("w") as file:
            for group in task.groups:
                prompt = [message._asdict() for message in group.prompt]
                file.write(json.dumps({"prompt": prompt, "responses": group.responses}) + "\n")
        per_shard = -(-len(task.groups) // (2 * processes))
        command = [sys.executable, "-m", "hafrm", "score", str(directory), str(source)]
        command += [str(Path(folder) / "out.jsonl"), "--processes", str(processes)]
        command += ["--rows-per-shard", str(per_shard)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="preference pairs, as hafrm reads them")
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        help="a model directory, or a tokenizer.json with <s>, </s>, <unk>",
    )
    parser.add_argument("--prompts", type=int, default=64, help="of best-of-16")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--singles", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-tokens", type=int, help="of one of our rows (default: hafrm's)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[], help="also time the command with so many"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        encoder = Encoder(load_tokenizer(args.tokenizer), max_length=POSITIONS)
        directory = write_reward_model(encoder, Path(folder) / "reward")
        plain = Plain(directory)
        ours = RewardModel.from_pretrained(directory, max_tokens=args.max_tokens)
        results = []
        for task in tasks(args.data, ours.encoder, args):
            print(task.describe(), file=sys.stderr, flush=True)
            result = measure(task, plain, ours, args)
            result["command"] = {n: time_command(task, directory, n) for n in args.processes}
            results.append(result)
    report(results, args)


def report(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"\n{Path(args.data).name}, float32, {args.threads} threads, best of {args.repeats}")
    print("| work | contender | seconds | candidates/s | speed-up | x its floor | max difference |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        n, plain, ours = r["responses"], r["plain_seconds"], r["seconds"]
        name = f"plain transformers, batches of {r['batch_size']}"
        over = plain / r["plain_floor"], ours / r["floor"]
        print(f"| {r['task']} | {name} | {plain:.2f} | {n / plain:.1f} | 1 | {over[0]:.2f} | |")
        print(
            f"| | hafrm | {ours:.2f} | {n / ours:.1f} | {plain / ours:.2f} | {over[1]:.2f} "
            f"| {r['difference']:.1e} |"
        )
        for processes, seconds in r["command"].items():
            name = f"`hafrm score --processes {processes}`, start-up included"
            print(f"| | {name} | {seconds:.2f} | {n / seconds:.1f} | {plain / seconds:.2f} | | |")
    merged = sum(r["merged"] for r in results)
    print(
        f"\n{merged} responses merge with the template when tokenised with it, and are not compared"
    )
    print(f"float32 peak: {max(r['peak'] for r in results) / 1e9:.0f} GFLOP/s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
