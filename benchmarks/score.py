"""Time scoring against plain transformers: same model, same conversations, same scores, one process.

    python benchmarks/score.py --data preferences.jsonl --tokenizer tokenizer.json

Best-of-16: each prompt of the file with 16 candidates, its own two responses and 14 drawn from other
prompts of the file, so that their lengths are those of the file. Single responses: each prompt with one
of its two responses. Pairs as rows: both responses of each prompt as rows of their own.
Plain transformers renders the chat template, tokenises, sorts by length and runs right-padded batches of
AutoModelForSequenceClassification; of several batch sizes the fastest on a fifth of the work runs all of
it. Both sides start from text and end with scores in the order given; the best of `--repeats` counts, and
they take turns, so that a noisy neighbour disturbs both.
The floor is the time that useful FLOPs would take at the peak measured in the same run: float32 on a CPU,
bfloat16 on a GPU, where vLLM is timed too if it is installed. With `--out` each row is in
FOLDER/score-SHAPE.jsonl as soon as it is measured.
"""

import argparse
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from step_flops import count, reference_flops, work_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from workload import (
    Rows,
    add_model_options,
    build_model,
    config_of,
    free_memory,
    load_tokenizer,
    measure_peaks,
    model_options,
    synchronise,
)

from hafrm.data.encoding import Encoder
from hafrm.data.reader import read_preferences
from hafrm.engine.model import HybridModel, new_reward_head
from hafrm.preferences import Group, TokenizedGroup
from hafrm.scoring.loading import load_encoder
from hafrm.scoring.reward_model import RewardModel

BATCHES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (8, 16, 32, 64, 128)}
TARGETS = {"best-of-16": 4.0, "single responses": 1.3}
"""Speed-up over plain transformers."""
POSITIONS = 2048
Scores = NDArray[np.float32]


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
    all_tasks = []
    for name, groups in named.items():
        encoded, report = encoder.encode(groups)
        assert not report.prompts_cut
        assert not report.responses_cut
        all_tasks.append(Task(name, groups, encoded))
    return all_tasks


def classifier(args: argparse.Namespace, encoder: Encoder, dtype: torch.dtype) -> Any:
    """The shape as a stock reward model with random weights, the same every time."""
    config = config_of(args.shape, encoder)
    config.num_labels, config.problem_type = 1, "regression"
    device = torch.device(args.device)
    model = build_model(AutoModelForSequenceClassification, config, dtype, device)
    fresh = new_reward_head(config.hidden_size, torch.Generator().manual_seed(0))
    model.score.weight.data.copy_(fresh.weight)
    return model.eval()


class Plain:
    """Plain transformers: one padded row for each response."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        self.model = model

    def texts(self, groups: Sequence[Group]) -> list[str]:
        """Each conversation, rendered."""
        return [
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

    def encode(self, groups: Sequence[Group]) -> list[list[int]]:
        """Token ids of each conversation, rendered and tokenised whole."""
        ids: list[list[int]] = self.tokenizer(self.texts(groups), add_special_tokens=False)[
            "input_ids"
        ]
        return ids

    @torch.inference_mode()
    def score(self, groups: Sequence[Group], batch_size: int) -> Scores:
        ids = self.encode(groups)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        scores = torch.empty(len(ids))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in part]}, return_tensors="pt")
            logits = self.model(**batch.to(self.model.device), use_cache=False).logits
            scores[part] = logits[:, 0].float().cpu()
        return scores.numpy()


def timed(run: Callable[[], Scores]) -> tuple[float, Scores]:
    start = time.perf_counter()
    scores = run()
    return time.perf_counter() - start, scores


def time_or_none(run: Callable[[], Scores]) -> float:
    """Seconds; without end where a batch is too large for the GPU."""
    try:
        return timed(run)[0]
    except torch.OutOfMemoryError:
        free_memory()
        return float("inf")


def measure(
    task: Task, plain: Plain, ours: RewardModel, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of both, the batch sizes tried, and how far scores differ."""
    device, dtype = ours.model.device, plain.model.dtype
    sample = task.groups[::5]
    plain.score(sample[:1], 1)
    tried = {b: time_or_none(lambda b=b: plain.score(sample, b)) for b in BATCHES[args.device[:4]]}
    batch = min(tried, key=tried.__getitem__)

    def run(groups: Sequence[Group]) -> Scores:
        return ours.score_encoded(ours.encoder.encode(groups)[0])

    run(sample)  # the sample has warmed the other side
    synchronise(device)
    peak, seconds, plain_seconds = 0.0, float("inf"), float("inf")
    for _ in range(args.repeats):
        took, scores = timed(lambda: run(task.groups))
        seconds = min(seconds, took)
        took, expected = timed(lambda: plain.score(task.groups, batch))
        plain_seconds = min(plain_seconds, took)
        peak = max(peak, measure_peaks(device, dtype).flops)
    same = same_ids(task, plain)
    return {
        "batch_size": batch,
        "tried": tried,
        "peak": peak,
        "plain_seconds": plain_seconds,
        "seconds": seconds,
        "plain_floor": forward_flops(ours.model, task.encoded, shared=False) / peak,
        "floor": forward_flops(ours.model, task.encoded, shared=True) / peak,
        "difference": float(np.abs(scores - expected)[same].max()),
        "merged": int((~same).sum()),
    }


def forward_flops(model: HybridModel, groups: Sequence[TokenizedGroup], *, shared: bool) -> float:
    """Useful FLOPs of a reward for every response; shared, a prompt counts once for all responses to it."""
    by_prompt: dict[bytes, tuple[int, list[int]]] = {}
    for group in groups:
        entry = by_prompt.setdefault(group.prompt_ids.tobytes(), (len(group.prompt_ids), []))
        entry[1].extend(map(len, group.response_ids))
    shape = list(by_prompt.values())
    if not shared:
        shape = [(prompt, [length]) for prompt, lengths in shape for length in lengths]
    return reference_flops(count(model), work_of(shape)).total


def time_vllm(tasks: list[Task], plain: Plain, folder: Path) -> dict[str, Any]:
    """Seconds of each task in vLLM's pooling of the same weights, loading left out."""
    from vllm import LLM

    plain.model.save_pretrained(folder)
    llm = LLM(str(folder), runner="pooling", gpu_memory_utilization=0.4)
    row = {}
    for task in tasks:
        prompts = [{"prompt_token_ids": ids} for ids in plain.encode(task.groups)]
        llm.classify(prompts[:8], use_tqdm=False)
        start = time.perf_counter()
        llm.classify(prompts, use_tqdm=False)
        row[task.name] = time.perf_counter() - start
    return row


def same_ids(task: Task, plain: Plain) -> NDArray[np.bool_]:
    """Which conversations have the same ids when the response is tokenised apart from the prompt.

    The others begin with a line break that merges with the template's: two inputs, not one scored twice.
    """
    apart = [[*g.prompt_ids, *ids] for g in task.encoded for ids in g.response_ids]
    whole = plain.encode(task.groups)
    return np.array([list(a) == b for a, b in zip(apart, whole, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="preference pairs, as hafrm reads them")
    add_model_options(parser, "small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=64, help="of best-of-16")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--singles", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-tokens", type=int, help="of one of our rows (default: hafrm's)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing later")
    parser.add_argument("--out", type=Path, help="folder for the rows")
    args = model_options(parser)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    on_gpu = args.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = Rows(args.out, f"score-{args.name}", seconds=args.seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = Encoder(load_tokenizer(args.tokenizer), max_length=POSITIONS)
        encoder.export_tokenizer(folder)
        plain = Plain(folder, classifier(args, encoder, dtype))
        same = classifier(args, encoder, dtype)
        model = HybridModel(same.base_model, reward_head=same.score)
        encoder = load_encoder(folder, config_of(args.shape, encoder), POSITIONS)
        ours = RewardModel(model, encoder, max_tokens=args.max_tokens)
        work = tasks(args.data, encoder, args)
        for task in work:
            print(task.describe(), file=sys.stderr, flush=True)
            what = {"task": task.name, "shape": args.name, "responses": task.num_responses}
            rows.add(what, lambda task=task: measure(task, plain, ours, args))
        if on_gpu:
            rows.add({"task": "vLLM"}, lambda: time_vllm(work, plain, folder))
    report(rows.rows, args)


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    where = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"\n{Path(args.data).name}, {args.name}, {where}, best of {args.repeats}")
    print("| work | contender | seconds | candidates/s | speed-up | x its floor | max difference |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        if "seconds" not in r:
            print(f"| {r['task']} | {r} | | | | | |")
            continue
        n, plain, ours = r["responses"], r["plain_seconds"], r["seconds"]
        name = f"plain transformers, batches of {r['batch_size']}"
        over = plain / r["plain_floor"], ours / r["floor"]
        target = f" (target {TARGETS[r['task']]})" if r["task"] in TARGETS else ""
        print(f"| {r['task']} | {name} | {plain:.2f} | {n / plain:.1f} | 1 | {over[0]:.2f} | |")
        print(
            f"| | hafrm | {ours:.2f} | {n / ours:.1f} | {plain / ours:.2f}{target} | {over[1]:.2f} "
            f"| {r['difference']:.1e} |"
        )
    measured = [r for r in rows if "seconds" in r]
    print(
        f"\n{sum(r['merged'] for r in measured)} responses merge with the template when tokenised with "
        "it, and are not compared"
    )
    if measured:
        print(f"peak of products: {max(r['peak'] for r in measured) / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
