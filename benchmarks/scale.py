"""What a run costs on many GPUs, on paper: FLOPs, bytes, traffic and comparisons per second under FSDP2.

    python benchmarks/scale.py --config llama-70b --lora --lengths long --gpus 8 16 32 64

Weights are counted on the run's own model on the meta device, bytes are the memory plan's
(hafrm.training.memory_plan), FLOPs those of benchmarks/step_flops.py; peak, utilisation and bandwidths
are assumptions and can be given. No GPU and no weights are needed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from step_flops import count, reference_flops, step_flops, work_of

from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe
from hafrm.training.memory_plan import (
    FLOAT32,
    HALF,
    MemoryNeed,
    Target,
    count_weights,
    memory_need,
    scatters_gradients,
)
from hafrm.training.methods import get_method
from hafrm.training.setup import meta_model

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
    """Steps do, and the passes without gradients before them."""
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
        model = meta_model(config, recipe, HAF)
        self.counts, self.weights = count(model), count_weights(model)
        prompt, chosen, rejected = comparison
        self.work = work_of([(prompt, (chosen, rejected))] * self.batch)
        self.flops = step_flops(self.counts, self.work, checkpointing=self.checkpointing)

    def row(self, gpus: int, machine: Machine) -> Row:
        """The fewest micro-batches that fit, or the most that are tried."""
        target = Target("cuda", int(machine.memory * GIB), gpus)
        scatters = scatters_gradients(self.weights.trainable, target)
        for micro_batches in range(1, MOST_MICRO_BATCHES + 1):
            tokens = -(-self.work.tokens // (gpus * micro_batches))
            need = self.bytes(gpus, tokens, accumulates=micro_batches > 1 and not scatters)
            fits = max(need.step, need.passes) <= target.usable
            if (
                fits
                or need.step - need.activations - need.working > target.usable
                or tokens <= sum(self.comparison)
            ):
                break
        traffic = self.traffic(gpus, micro_batches, micro_batches if scatters else 1)
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
        """The need of one GPU of those that share the weights by FSDP2."""
        target = Target("cuda", 0, gpus)
        return memory_need(
            self.recipe, self.weights, target, tokens, tokens, accumulates=accumulates
        )

    def traffic(self, gpus: int, micro_batches: int, num_scatters: int) -> float:
        """Bytes a step: layers gathered for forward and backward of every micro-batch, what is outside
        of layers once for both; gradients scattered in float32, once or in every micro-batch."""
        outside = self.weights.outside
        gathers = 2 * HALF * (self.weights.total - outside) + HALF * outside
        scatters = num_scatters * FLOAT32 * self.weights.trainable
        return (micro_batches * gathers + scatters) * (gpus - 1) / gpus

    def hiding_tokens(self, machine: Machine, bandwidth: float) -> float:
        """Tokens of a micro-batch from which a layer computes longer than the next one is gathered, in
        forward and in backward (with the gradients' way out)."""
        forward = HALF / 2
        trained = not self.counts.adapters
        backward = (HALF + FLOAT32 * trained) / (2 + 2 * trained + 2 * self.checkpointing)
        return max(forward, backward) * machine.speed / bandwidth


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
    passes = ", ".join(f"{row.bytes.passes / GIB:.1f}" for row in rows)
    print(f"Passes without gradients, before the first step and in validation: {passes} GiB.\n")
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    transformers.logging.set_verbosity_error()
    training = {
        "precision": "bf16",
        "gradient_checkpointing": not args.no_checkpointing,
        "batch_size": args.batch,
        "parallel": "fsdp",
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
