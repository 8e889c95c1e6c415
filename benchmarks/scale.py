"""What a run costs on many GPUs, on paper: FLOPs, bytes, traffic and comparisons per second under FSDP2.

    python benchmarks/scale.py --config llama-70b --lora --lengths long --gpus 8 16 32 64
    python benchmarks/scale.py --check

Weights and bytes are counted on the run's own model on the meta device (hafrm.training.memory_trace), FLOPs
by benchmarks/step_flops.py; peak, utilisation and bandwidths are assumptions and can be given. No GPU
and no weights are needed. `--check` compares predictions with measured numbers on this machine's CPU:
FLOPs with torch's counter, saved bytes with autograd's hook, memory with the growth of a process that
takes real steps, with freed blocks given back and as glibc's heap keeps them (Linux).
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from step_flops import count, reference_flops, step_flops, work_of
from torch.utils.flop_counter import FlopCounterMode

from hafrm.engine.layout import Layout, lay_out
from hafrm.engine.model import HybridModel, split_causal_lm
from hafrm.preferences import TokenizedGroup
from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe
from hafrm.training.memory_plan import Target
from hafrm.training.memory_trace import (
    FLOAT32,
    HALF,
    MemoryNeed,
    count_weights,
    logprob_bytes,
    meta_model,
    state_bytes,
    trace,
)
from hafrm.training.methods import get_method
from hafrm.training.model_setup import assemble
from hafrm.training.step import build_optimizer, take_step
from hafrm.training.step_batches import MicroBatch

HAF = get_method("haf")
GIB, NODE = 2**30, 8
"""GPUs that a node's own links connect."""

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama-70b": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "mistral-7b": lambda: transformers.MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=None,
    ),
    "phi-2": lambda: transformers.PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
    ),
    "small-llama": lambda: transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
    ),
    "small-gpt2": lambda: transformers.GPT2Config(
        vocab_size=8000, n_embd=256, n_layer=6, n_head=4, n_positions=512
    ),
}
LENGTHS = {"hh": (160, 70, 70), "long": (300, 400, 400)}
"""Tokens of prompt, chosen and rejected response: like HH-RLHF, and like long-form sets."""
MOST_MICRO_BATCHES = 16

Comparison = tuple[int, int, int]


@dataclass(frozen=True)
class Machine:
    """What a GPU and its links are taken to do."""

    peak: float
    """Dense bfloat16 FLOP/s."""
    mfu: float
    """Share of the peak that a step's useful FLOPs reach."""
    node: float
    """Bytes per second into a GPU from its node."""
    network: float
    """The same from other nodes."""
    memory: float
    """GiB of a GPU."""

    @property
    def speed(self) -> float:
        return self.peak * self.mfu

    def bandwidth(self, gpus: int) -> float:
        return self.node if gpus <= NODE else self.network


@dataclass(frozen=True)
class Row:
    """One number of GPUs."""

    gpus: int
    micro_batches: int
    tokens: int
    """Of one GPU's micro-batch."""
    bytes: MemoryNeed
    fits: bool
    """Its steps do; what comes before them is another matter (docs/scale.md)."""
    traffic: float
    """Bytes into or out of a GPU, a step."""
    compute_seconds: float
    traffic_seconds: float


class Scenario:
    """A model, a way to train it, and the comparisons of a step."""

    def __init__(self, config: Any, recipe: Recipe, comparison: Comparison) -> None:
        self.recipe, self.comparison = recipe, comparison
        self.batch = recipe.training.batch_size
        self.checkpointing = recipe.training.gradient_checkpointing
        self.model = meta_model(config, recipe, HAF)
        self.counts, self.weights = count(self.model), count_weights(self.model)
        self.model.backbone.to(torch.bfloat16)  # as FSDP2 gathers it
        prompt, chosen, rejected = comparison
        self.work = work_of([(prompt, (chosen, rejected))] * self.batch)
        self.flops = step_flops(self.counts, self.work, checkpointing=self.checkpointing)

    def row(self, gpus: int, machine: Machine) -> Row:
        """The fewest micro-batches that fit, or the most that are tried."""
        target = Target("cuda", int(machine.memory * GIB), gpus)
        for micro_batches in range(1, MOST_MICRO_BATCHES + 1):
            tokens = -(-self.work.tokens // (gpus * micro_batches))
            need = self.bytes(gpus, tokens, accumulates=micro_batches > 1)
            fits = need.step <= target.usable
            if fits or need.states > target.usable or tokens <= sum(self.comparison):
                break
        traffic = self.traffic(gpus, micro_batches)
        return Row(
            gpus=gpus,
            micro_batches=micro_batches,
            tokens=tokens,
            bytes=need,
            fits=fits,
            traffic=traffic,
            compute_seconds=self.flops.total / gpus / machine.speed,
            traffic_seconds=traffic / machine.bandwidth(gpus),
        )

    def bytes(self, gpus: int, tokens: int, *, accumulates: bool) -> MemoryNeed:
        """The need of one GPU: layers gathered in bfloat16, the micro-batch traced."""
        states = state_bytes(self.weights, shards=gpus, gathered=HALF, accumulates=accumulates)
        shape = shape_of(self.comparison, tokens, groups=4)  # memory follows tokens, not groups
        footprint = trace(self.model, shape, half=True)
        logprobs = logprob_bytes(self.weights, shape, device="cuda", product=HALF, stored=HALF)
        return MemoryNeed(
            *states,
            activations=footprint.kept,
            working=max(logprobs, footprint.working),
            passes=state_bytes(self.weights)[0],
        )

    def traffic(self, gpus: int, micro_batches: int) -> float:
        """Bytes a step: layers gathered for forward and backward of every micro-batch, what is outside
        of layers once for both; gradients scattered in float32, once."""
        outside = self.weights.outside
        gathers = 2 * HALF * (self.weights.total - outside) + HALF * outside
        scatters = FLOAT32 * self.weights.trainable
        return (micro_batches * gathers + scatters) * (gpus - 1) / gpus

    def hiding_tokens(self, machine: Machine, bandwidth: float) -> float:
        """Tokens of a micro-batch from which a layer computes longer than the next one is gathered, in
        forward and in backward (with the gradients' way out)."""
        forward = HALF / 2
        trained = not self.counts.adapters
        backward = (HALF + FLOAT32 * trained) / (2 + 2 * trained + 2 * self.checkpointing)
        return max(forward, backward) * machine.speed / bandwidth


def shape_of(comparison: Comparison, tokens: int, groups: int) -> list[tuple[int, tuple[int, int]]]:
    """`groups` comparisons of these proportions that make up `tokens`."""
    prompt, chosen, rejected = (
        max(1, round(part * tokens / groups / sum(comparison))) for part in comparison
    )
    return [(prompt, (chosen, rejected))] * groups


def recipe_of(**sections: Any) -> Recipe:
    return build_recipe({"model": {"path": "-"}, "data": {"train": "-"}, **sections})


def config_of(name: str) -> transformers.PretrainedConfig:
    """A built-in shape, or the config.json of a model."""
    if name in CONFIGS:
        return CONFIGS[name]()
    if not Path(name).exists():
        raise SystemExit(f"--config {name}: no file, and none of {', '.join(CONFIGS)}")
    config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(name)
    return config


def report(scenario: Scenario, machine: Machine, gpus: list[int]) -> None:
    counts, flops, work, weights = (
        scenario.counts,
        scenario.flops,
        scenario.work,
        scenario.weights,
    )
    print(
        f"{weights.total / 1e9:.2f} G weights, {weights.trainable / 1e9:.3g} G trained; a step of "
        f"{scenario.batch} comparisons of {scenario.comparison}: {work.tokens:,} tokens, "
        f"{flops.total / 1e15:.3g} PFLOP ({100 * flops.head / flops.total:.1f} % head, "
        f"{100 * flops.attention / flops.total:.1f} % attention); the reference's pass, once: "
        f"{reference_flops(counts, work).total / flops.total:.2f} of a step\n"
    )
    rows = [scenario.row(number, machine) for number in gpus]
    print(
        f"Before it is sharded every GPU holds {rows[0].bytes.passes / GIB:.0f} GiB of weights.\n"
    )
    print(
        "| GPUs | weights | gradients | optimiser | exchange | activations | working | all | fits |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        need = row.bytes
        parts = (need.weights, need.gradients, need.optimiser, need.exchange, need.activations)
        sizes = (*parts, need.working, need.step)
        shown = " | ".join(f"{size / GIB:.1f}" for size in sizes)
        print(f"| {row.gpus} | {shown} | {'yes' if row.fits else 'no'} |")
    print(
        "\n| GPUs | micro-batches x tokens | GB moved | s moving | s computing | hidden from tokens "
        "| comparisons/s |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        hiding = scenario.hiding_tokens(machine, machine.bandwidth(row.gpus))
        slow = scenario.batch / (row.compute_seconds + row.traffic_seconds)
        fast = scenario.batch / max(row.compute_seconds, row.traffic_seconds)
        speed = f"{slow:.1f} to {fast:.1f}" if row.fits else "-"
        print(
            f"| {row.gpus} | {row.micro_batches} x {row.tokens:,} | {row.traffic / 1e9:.0f} | "
            f"{row.traffic_seconds:.2f} | {row.compute_seconds:.2f} | {hiding:,.0f} | {speed} |"
        )


@dataclass(frozen=True)
class Check:
    """A small run whose prediction is measured."""

    config: str
    training: dict[str, Any]
    lora: dict[str, Any] | None = None


CHECKS = {
    "Llama, 23 M": Check("small-llama", {}),
    "Llama, 23 M, checkpointed": Check("small-llama", {"gradient_checkpointing": True}),
    "Llama, 23 M, LoRA 16": Check("small-llama", {}, {"rank": 16}),
    "GPT-2, 7 M": Check("small-gpt2", {}),
}
CHECK_GROUPS = 4
"""Comparisons like HH-RLHF's, 1,200 tokens."""


def recipe_for(check: Check) -> Recipe:
    return recipe_of(training=check.training, **({"lora": check.lora} if check.lora else {}))


def predict(check: Check) -> dict[str, float]:
    """FLOPs of a micro-batch, bytes that autograd saves, and the growth of memory in a step."""
    model = meta_model(config_of(check.config), recipe_for(check), HAF)
    weights, work = count_weights(model), work_of(check_shape())
    flops = step_flops(
        count(model), work, checkpointing=bool(check.training.get("gradient_checkpointing"))
    )
    footprint = trace(model, check_shape(), half=False)
    logprobs = logprob_bytes(weights, check_shape(), device="cpu", product=FLOAT32, stored=FLOAT32)
    _, gradients, _, _ = state_bytes(weights)
    kept_by_head = FLOAT32 * weights.width * work.scored  # the rows that predict, or their gradient
    return {
        "flops": flops.total,
        "saved": footprint.kept + kept_by_head,
        "grown": gradients + footprint.kept + max(logprobs, footprint.working),
    }


def layout_of(shape: list[tuple[int, tuple[int, int]]]) -> Layout:
    """A layout of groups of these lengths whose token ids mean nothing."""

    def ids(number: int) -> NDArray[np.int32]:
        return np.zeros(number, np.int32)

    return lay_out([TokenizedGroup(ids(p), tuple(map(ids, r))) for p, r in shape])


def check_shape() -> list[tuple[int, tuple[int, int]]]:
    prompt, chosen, rejected = LENGTHS["hh"]
    return [(prompt, (chosen, rejected))] * CHECK_GROUPS


def measure(check: Check, *, growth_only: bool) -> dict[str, float]:
    """The same of real steps in this process, after a small one has warmed it up."""
    torch.manual_seed(0)
    causal = transformers.AutoModelForCausalLM.from_config(config_of(check.config))
    model = assemble(*split_causal_lm(causal), recipe_for(check), HAF)
    optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    layout = layout_of(check_shape())

    def step(layout: Layout) -> None:
        parts = [micro_batch(layout)] * 2  # the second finds the gradients in place
        number = 2 * len(parts[0].ids)
        take_step(model, optimizer, parts, HAF, num_comparisons=number, max_grad_norm=1.0)

    step(layout_of([(4, (3, 2))]))
    with peak_growth() as grown:
        step(layout)
    if growth_only:
        return {"grown": grown[0]}
    with FlopCounterMode(display=False, custom_mapping=counted()) as counter:
        outputs = model(layout)
        (outputs.rewards.sum() + outputs.logps.sum()).backward()
    return {
        "flops": counter.get_total_flops(),
        "saved": saved_bytes(model, layout),
        "grown": grown[0],
    }


def micro_batch(layout: Layout) -> MicroBatch:
    number = layout.num_responses // 2
    chosen = torch.arange(number) * 2
    return MicroBatch(
        layout=layout,
        chosen=chosen,
        rejected=chosen + 1,
        margins=torch.zeros(number),
        weights=torch.ones(number),
        reference_logps=torch.zeros(2 * number),
        ids=("",) * number,
    )


@contextlib.contextmanager
def peak_growth() -> Iterator[list[int]]:
    """Bytes that the process grew at its fullest over its size before (Linux)."""

    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    grown: list[int] = []
    before = status("VmRSS")
    yield grown
    grown.append(status("VmHWM") - before)


def saved_bytes(model: HybridModel, layout: Layout) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(layout)
        assert outputs.rewards.requires_grad
    return sum(found.values())


def counted() -> dict[Any, Callable[..., int]]:
    """What torch's counter leaves out on a CPU: attention, by its causal part, and `addmm_`."""

    def attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
        batch, heads, q, dim = query
        return int(4 * batch * heads * dim * (q * (key[2] - q) + q * q / 2))

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda _, query, key, *__, **___: 2 * attention(query, key)
        ),
        aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1],
    }


GIVEN_BACK = {"MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc take every tensor from the system and give it back at once."""


def check() -> None:
    print("| run | quantity | predicted | measured | predicted / measured |\n|---|---|---|---|---|")
    units = {"flops": ("GFLOP of a micro-batch", 1e9), "saved": ("MiB saved", 2**20)}
    units |= {"grown": ("MiB grown", 2**20), "heap": ("MiB grown, glibc's heap", 2**20)}
    for name, small in CHECKS.items():
        measured, predicted = measure_apart(name, GIVEN_BACK), predict(small)
        measured["heap"] = measure_apart(name, {}, "--growth-only")["grown"]
        predicted["heap"] = predicted["grown"]
        for key, (words, unit) in units.items():
            if key == "saved" and small.training.get("gradient_checkpointing"):
                continue  # a checkpoint holds its inputs itself: no hook sees them
            ours, real = predicted[key] / unit, measured[key] / unit
            print(f"| {name} | {words} | {ours:.1f} | {real:.1f} | {ours / real:.3f} |", flush=True)


def measure_apart(name: str, environment: dict[str, str], *options: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    run = subprocess.run(
        [sys.executable, __file__, "--measure", name, *options],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    measured: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return measured


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="llama-70b", help=f"a path, or {', '.join(CONFIGS)}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--lora", action="store_true", help="rank 64 on all linear layers")
    how.add_argument("--full", action="store_true", help="all weights (the default)")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--lengths", choices=LENGTHS, default="hh")
    parser.add_argument("--tokens", type=int, nargs=3, help="prompt, chosen, rejected instead")
    parser.add_argument("--batch", type=int, default=128, help="comparisons of a step")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--memory", type=float, default=78.0, help="GiB of a GPU")
    parser.add_argument("--peak", type=float, default=989.0, help="dense bf16 TFLOP/s of a GPU")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak that is reached")
    parser.add_argument("--node-bandwidth", type=float, default=400.0, help="GB/s within a node")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s a GPU between nodes")
    parser.add_argument("--check", action="store_true", help="compare with measurements on a CPU")
    parser.add_argument("--measure", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--growth-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    transformers.logging.set_verbosity_error()
    if args.measure:
        print(json.dumps(measure(CHECKS[args.measure], growth_only=args.growth_only)))
    elif args.check:
        check()
    else:
        training = {
            "precision": "bf16",
            "gradient_checkpointing": not args.no_checkpointing,
            "batch_size": args.batch,
        }
        recipe = recipe_of(training=training, **({"lora": {}} if args.lora else {}))
        comparison = tuple(args.tokens or LENGTHS[args.lengths])
        machine = Machine(
            peak=args.peak * 1e12,
            mfu=args.mfu,
            node=args.node_bandwidth * 1e9,
            network=args.network * 1e9,
            memory=args.memory,
        )
        report(Scenario(config_of(args.config), recipe, comparison), machine, args.gpus)


if __name__ == "__main__":
    main()
