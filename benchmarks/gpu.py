"""All that a GPU has to prove, in one command of under ten minutes; the tables go to a folder.

    python benchmarks/gpu.py --data preferences.jsonl --phi TOKENIZER --mistral TOKENIZER --out DIR

Checks varlen against masks, gradients included (tests/engine), then times full fine-tuning of a Phi-2 shape
and LoRA of a Mistral-7B shape with random weights in bfloat16 beside TRL, then shows how much of a step the
device is busy. A part that fails or runs out of time is reported, and the others still run.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from contenders import Marks, Ours
from workload import BATCH, load

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--phi", required=True, help="tokenizer for the Phi-2 shape")
    parser.add_argument("--mistral", required=True, help="tokenizer for the Mistral shape")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--busy-of", choices=("phi-2", "mistral-7b"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.busy_of:
        print(busy(args))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    step = ["train_step.py", "--data", args.data, "--device", "cuda", "--no-memory"]
    phi = [*step, "--shape", "phi-2", "--tokenizer", args.phi, "--steps", "6", "--ladder", "2"]
    mistral = [*step, "--shape", "mistral-7b", "--tokenizer", args.mistral, "--steps", "4"]
    budget = ["--max-tokens", "8192"]
    again = [__file__, "--data", args.data, "--phi", args.phi, "--mistral", args.mistral]
    tests = [
        "-m",
        "pytest",
        "-q",
        str(HERE.parent / "tests/engine/test_attention.py"),
        "-k",
        "cuda",
    ]
    parts = {
        "gradients": (tests, 90),
        "phi-2-full": ([*phi, *budget], 210),
        "mistral-7b-lora": ([*mistral, *budget, "--lora-rank", "16"], 180),
        "busy-phi-2": ([*again, "--busy-of", "phi-2"], 50),
        "busy-mistral": ([*again, "--busy-of", "mistral-7b"], 60),
    }
    for name, (command, seconds) in parts.items():
        run_part(name, command, seconds, args.out)


def run_part(name: str, command: list[str], seconds: float, out: Path) -> None:
    """One part in a process of its own, so that its memory is its own."""
    if command[0].endswith(".py"):
        command = [str(HERE / Path(command[0]).name), *command[1:]]
    start = time.perf_counter()
    try:
        run = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        verdict, text = f"exit code {run.returncode}", run.stdout + run.stderr[-4000:]
    except subprocess.TimeoutExpired as error:
        verdict = f"stopped after {seconds} s"
        text = (error.stdout or b"").decode() + (error.stderr or b"").decode()[-4000:]
    (out / f"{name}.txt").write_text(text)
    print(f"== {name}: {verdict}, {time.perf_counter() - start:.0f} s\n{text[-3500:]}", flush=True)


def busy(args: argparse.Namespace) -> str:
    """Share of the wall time of four steps in which the device ran a kernel, after two to warm up."""
    lora = args.busy_of == "mistral-7b"
    w = load(
        args.data,
        Path(args.mistral if lora else args.phi),
        shape=args.busy_of,
        steps=4,
        max_tokens=8192,
        max_length=1024,
        device=torch.device("cuda"),
        lora_rank=16 if lora else None,
    )
    contender = _Profiled()
    contender(w, Marks())  # kernels are loaded and memory is allocated in the first run
    contender(w, Marks())
    kernels, seconds = contender.seen[-1]
    return (
        f"{args.busy_of}: {w.num_comparisons / seconds:.1f} comparisons/s ({w.steps} steps of {BATCH}), "
        f"kernels {kernels:.2f} s of {seconds:.2f} s: busy {100 * kernels / seconds:.0f} %"
    )


class _Profiled(Ours):
    """Our joint steps under the profiler; kernels of one stream do not overlap, so their times add up."""

    seen: ClassVar[list[tuple[float, float]]] = []
    """(seconds of kernels, seconds in all) of each run."""

    def _run(self, *arguments: Any) -> None:
        kinds = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            start = time.perf_counter()
            super()._run(*arguments)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        kernels = sum(e.self_device_time_total for e in profile.key_averages()) / 1e6
        self.seen.append((kernels, seconds))


if __name__ == "__main__":
    main()
