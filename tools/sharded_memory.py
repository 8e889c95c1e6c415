"""Shows on two processes that a sharded start needs half the memory and an export next to none, and that
they train what one cannot.

    python tools/sharded_memory.py

A random Llama is written to disk. First each of two ranks builds it in shards and exports it, while a
thread samples the process's private memory. Then full training runs under RLIMIT_DATA: in one process,
where it must fail, and in two.
"""

import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["MALLOC_MMAP_THRESHOLD_"] = (
    "131072"  # or glibc keeps what is freed, in one process as in two
)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hafrm.export.stock_export import export_reward
from hafrm.training import parallel
from hafrm.training.loop import run_training
from hafrm.training.methods import resolve_method
from hafrm.training.setup import build_encoder, build_model
from hafrm.training.sharded_start import build_sharded
from support.chat_tokenizers import chat_tokenizer
from support.tiny_runs import tiny_recipe

MIB = 2**20
LIMIT = 3000 * MIB  # private memory of one process
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 32}


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak(threading.Thread):
    """The most private memory that the process takes, sampled every millisecond."""

    def __enter__(self) -> "Peak":
        self.before = self.most = private_bytes()
        self.running = True
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.join()

    def run(self) -> None:
        while self.running:
            self.most = max(self.most, private_bytes())
            time.sleep(0.001)


def build(folder: Path) -> None:
    """The most that a rank takes to build the model, and then to export it, above what it had."""
    ranks = parallel.start()
    recipe = tiny_recipe(folder, training={"parallel": "fsdp"})
    method, encoder = resolve_method(recipe), build_encoder(recipe)
    with Peak(daemon=True) as peak:
        if ranks.size == 1:
            model = build_model(recipe, method, encoder, ranks.device)
        else:
            model = build_sharded(recipe, method, encoder, ranks)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.backbone.layers]
    whole = sum(p.numel() for p in model.parameters())
    allowed = 4 * (whole // ranks.size + (layers[0] if ranks.size > 1 else 0))
    print(
        f"{ranks.size} process(es), rank {ranks.rank}: {(peak.most - peak.before) / MIB:.0f} MiB to build "
        f"{4 * whole / MIB:.0f} MiB of weights; {allowed / MIB:.0f} are allowed"
    )
    directory = folder / f"export-{ranks.size}"
    with Peak(daemon=True) as peak:
        export_reward(model, encoder, directory, dtype=torch.bfloat16)
    taken = (peak.most - peak.before) / MIB
    if parallel.is_main():
        size = (directory / "model.safetensors").stat().st_size
        print(f"{taken:.0f} MiB to export them as {size / MIB:.0f} MiB of bfloat16")


def train(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    training = {"parallel": "fsdp", "steps": 2, "max_tokens": 1024}
    recipe = tiny_recipe(folder, training=training, checkpoint={"every": 0})
    out = folder / f"run-{os.environ.get('WORLD_SIZE', '1')}"
    result = run_training(recipe, out, finish=lambda _: parallel.stop())
    print(f"trained {result.num_steps} steps under {LIMIT // MIB} MiB")


def launch(what: str, folder: Path, size: int) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, what, str(folder)]
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(size)
    ]
    return [rank.wait() for rank in ranks]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = chat_tokenizer()
        config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=8, **SIZES)
        causal = LlamaForCausalLM(config).to(torch.bfloat16)
        causal.save_pretrained(folder / "base", max_shard_size="50MB")
        tokenizer.save_pretrained(folder / "base")
        for what, size in (("build", 1), ("build", 2), ("train", 1), ("train", 2)):
            print(
                f"== {what} in {size} process(es): exit codes {launch(what, folder, size)}",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"build": build, "train": train}[sys.argv[1]](Path(sys.argv[2]))
