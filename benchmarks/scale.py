"""What a run costs on many GPUs, on paper: bytes, traffic, comparisons per second, GPU hours and money.

    python benchmarks/scale.py --config llama-70b --lora --lengths long --gpus 8 64 512
    python benchmarks/scale.py --cost --lengths long

Weights are counted on the run's own model on the meta device, bytes and micro-batches are the memory plan's
(hafrm.training.memory_plan), FLOPs those of benchmarks/step_flops.py; peak, utilisation, bandwidths and the
price are assumptions and can be given. No GPU and no weights are needed.
"""

import argparse
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import transformers
from step_flops import count, reference_flops, step_flops, work_of

from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe
from hafrm.training import memory_plan
from hafrm.training.memory_plan import FLOAT32, GIB, HALF, MemoryNeed, Target
from hafrm.training.methods import get_method
from hafrm.training.setup import meta_model, with_training

HAF = get_method("haf")
NODE = 8  # GPUs that a node's own links connect
COMPARISONS = 10_000_000  # that a cost is of, each trained on once
TRL = (
    2.5,
    5.2,
)  # times our step: RewardTrainer tuned, and as shipped; docs/performance.md, on a CPU


def _llama(layers: int, width: int, mlp: int, heads: int, vocab: int, **more: Any) -> Any:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": vocab}
    return lambda: transformers.LlamaConfig(**sizes, **more)


CONFIGS = {
    "llama-1b": _llama(16, 2048, 8192, 32, 128256, tie_word_embeddings=True),
    "mistral-7b": _llama(32, 4096, 14336, 32, 32768),
    "llama-70b": _llama(80, 8192, 28672, 64, 128256),
}
# Tokens of prompt, chosen and rejected response: like HH-RLHF, and like long-form sets.
LENGTHS = {"hh": (160, 70, 70), "long": (300, 400, 400)}


@dataclass(frozen=True)
class Row:
    """One number of GPUs."""

    gpus: int
    batch: int
    micro_batches: int
    tokens: int  # of one GPU's micro-batch
    bytes: MemoryNeed
    fits: bool
    compute: float  # seconds of a step
    moving: float
    start: float  # seconds to read the weights
    reference: float  # seconds of computing for the comparisons of a step, once

    def speeds(self) -> tuple[float, float]:
        """Comparisons a second: traffic not hidden at all, and all of it hidden."""
        slow, fast = self.compute + self.moving, max(self.compute, self.moving)
        return self.batch / slow, self.batch / fast

    def gpu_hours(self) -> tuple[float, float]:
        """Of COMPARISONS, their reference log-probs included: least and most."""
        reference = self.reference / self.batch
        most, least = (COMPARISONS * self.gpus * (1 / s + reference) / 3600 for s in self.speeds())
        return least, most


class Scenario:
    """A model, a way to train it, and comparisons of one size."""

    def __init__(self, config: Any, recipe: Recipe, comparison: tuple[int, int, int]) -> None:
        prompt, chosen, rejected = comparison
        length = {"max_length": prompt + max(chosen, rejected)}
        self.recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=length)})
        self.comparison, self.size = comparison, sum(comparison)
        model = meta_model(config, recipe, HAF)
        counts, self.weights = count(model), memory_plan.count_weights(model)
        work = work_of([(prompt, (chosen, rejected))])
        self.flops = step_flops(counts, work, checkpointing=recipe.training.gradient_checkpointing)
        self.reference = reference_flops(counts, work).total

    def row(self, gpus: int, batch: int, machine: argparse.Namespace) -> Row:
        """In micro-batches as the plan's budget makes them."""
        target = Target("cuda", int(machine.memory * GIB), gpus)
        recipe, shards = with_training(self.recipe, batch_size=batch), target.shards(self.recipe)
        plan = memory_plan.plan_memory(recipe, self.weights, target)
        share = max(self.size, -(-batch * self.size // gpus))
        micro_batches = -(-share // plan.tokens)
        tokens = -(-share // micro_batches)
        scatters = memory_plan.scatters_gradients(self.weights.trainable, target)
        several, sizes = micro_batches > 1 and not scatters, (tokens, plan.max_tokens)
        need = memory_plan.memory_need(recipe, self.weights, target, *sizes, accumulates=several)
        near, far = self.traffic(gpus, micro_batches, micro_batches if scatters else 1)
        moving = near / (machine.node if shards <= NODE else machine.network)
        moving += far / machine.network + self.to_host(gpus, micro_batches, tokens) / machine.host
        files = HALF * self.weights.total / -(-shards // NODE)  # of a node that divides the weights
        speed = 1e12 * machine.peak * machine.mfu * gpus / batch
        return Row(
            *(gpus, batch, micro_batches, tokens, need),
            fits=max(need.step, need.passes) <= target.usable,
            compute=self.flops.total / speed,
            moving=moving / 1e9,
            start=files / machine.disk / 1e9,
            reference=self.reference / speed,
        )

    def traffic(self, gpus: int, micro_batches: int, num_scatters: int) -> tuple[float, float]:
        """Bytes a step into a GPU: from those that divide the weights, gathered for forward and backward of
        every micro-batch, with float32 gradients scattered; from nodes that copy (hsdp), their shards."""
        shards = Target("cuda", 0, gpus).shards(self.recipe)
        gathers = 2 * HALF * self.weights.total * micro_batches
        scatters = num_scatters * FLOAT32 * self.weights.trainable
        copies = gpus // shards
        far = 2 * scatters / shards * (copies - 1) / copies
        return (gathers + scatters) * (shards - 1) / shards, far

    def to_host(self, gpus: int, micro_batches: int, tokens: int) -> float:
        """Bytes a step between a GPU and its host, out and back: layers' inputs; shards, with gradients."""
        offload, weights = self.recipe.training.offload, self.weights
        moved = 0.0
        if offload in ("activations", "all"):
            moved += 2 * weights.layers * HALF * weights.width * tokens
        if offload in ("weights", "all"):
            shard = FLOAT32 * weights.trainable + weights.frozen_bytes
            shards = Target("cuda", 0, gpus).shards(self.recipe)
            moved += (2 * shard + FLOAT32 * weights.trainable) / shards
        return moved * micro_batches


def recipe_of(**sections: Any) -> Recipe:
    return build_recipe({"model": {"path": "-"}, "data": {"train": "-"}, **sections})


def config_of(name: str) -> Any:
    """A built-in shape, or the config.json of a model."""
    if name in CONFIGS:
        return CONFIGS[name]()
    if not Path(name).exists():
        raise SystemExit(f"--config {name}: no file, and none of {', '.join(CONFIGS)}")
    return transformers.AutoConfig.from_pretrained(name)


def show(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def heading(*names: str) -> None:
    show(*names)
    show(*["---"] * len(names))


def report(scenario: Scenario, rows: list[Row]) -> None:
    weights, flops = scenario.weights, scenario.flops
    shares = [100 * part / flops.total for part in (flops.head, flops.attention)]
    print(
        f"\n{weights.total / 1e9:.2f} G weights, {weights.trainable / 1e9:.3g} G trained; a comparison of "
        f"{scenario.comparison}: {flops.total / 1e12:.4g} TFLOP ({shares[0]:.1f} % head, {shares[1]:.1f} % "
        f"attention), and once {scenario.reference / flops.total:.2f} of that for the reference\n"
    )
    parts = ("weights", "gradients", "optimiser", "exchange", "activations", "working", "passes")
    heading("GPUs", *parts, "a step", "fits")
    for row in rows:
        sizes = [f"{getattr(row.bytes, name) / GIB:.1f}" for name in (*parts, "step")]
        show(row.gpus, *sizes, "yes" if row.fits else "no")
    print()
    speed = ("s moving", "s computing", "s to read", "comparisons/s")
    heading("GPUs", "comparisons a step", "micro-batches x tokens", *speed)
    for row in rows:
        slow, fast = row.speeds()
        times = (f"{row.moving:.2f}", f"{row.compute:.2f}", f"{row.start:.0f}")
        speeds = f"{slow:.3g} to {fast:.3g}" if row.fits else "-"
        show(row.gpus, row.batch, f"{row.micro_batches} x {row.tokens:,}", *times, speeds)


def report_cost(rows: list[tuple[str, str, Row]], price: float) -> None:
    heading("model", "GPUs", "parallel", "days", "GPU hours", "$", "$ at TRL's ratio")
    for (name, gpus), own in groupby(rows, lambda entry: (entry[0], entry[2].gpus)):
        fits = [(row.gpu_hours(), mode) for _, mode, row in own if row.fits]
        for hours, mode in sorted(fits, key=lambda entry: entry[0][1])[:1]:  # the cheaper one
            days = (f"{x / gpus / 24:.2g}" for x in hours)
            trl = (x * hours[0] * price for x in TRL)
            whole = ([f"{x:,.0f}" for x in xs] for xs in (hours, [x * price for x in hours], trl))
            show(name, gpus, mode, *map(" to ".join, (days, *whole)))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="llama-70b", help=f"a path, or {', '.join(CONFIGS)}")
    parser.add_argument("--cost", action="store_true", help="of 10 million comparisons instead")
    parser.add_argument("--lora", action="store_true", help="rank 64 on all linear layers")
    parser.add_argument("--parallel", choices=("fsdp", "hsdp"), default="fsdp")
    offload = ("none", "activations", "weights", "all")
    parser.add_argument("--offload", choices=offload, default="none", help="to the host")
    parser.add_argument("--lengths", choices=LENGTHS, default="hh")
    parser.add_argument("--tokens", type=int, nargs=3, help="prompt, chosen, rejected instead")
    parser.add_argument("--batch", type=int, help="of a step; by default 128, or 8 a GPU if more")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    for name, default, what in (
        ("memory", 78.0, "GiB of a GPU"),
        ("peak", 989.0, "dense bf16 TFLOP/s of a GPU"),
        ("mfu", 0.35, "share of the peak that is reached"),
        ("node", 400.0, "GB/s into a GPU from its node"),
        ("network", 50.0, "GB/s into a GPU from other nodes"),
        ("host", 50.0, "GB/s between a GPU and its host"),
        ("disk", 2.0, "GB/s that a node reads"),
        ("price", 2.5, "$ of a GPU hour"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{what} ({default})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    transformers.logging.set_verbosity_error()
    training = {"precision": "bf16", "parallel": args.parallel, "offload": args.offload}
    training |= {"gradient_checkpointing": True, "max_tokens": "auto"}
    comparison, costs = tuple(args.tokens or LENGTHS[args.lengths]), []
    for name in CONFIGS if args.cost else [args.config]:
        for lora in (False, True) if args.cost else (args.lora,):
            recipe = recipe_of(training=training, **({"lora": {}} if lora else {}))
            scenario = Scenario(config_of(name), recipe, comparison)
            sizes = [(n, args.batch or max(128, 8 * n)) for n in args.gpus]
            if not args.cost:
                report(scenario, [scenario.row(*size, args) for size in sizes])
                continue
            method = f"{name}, {'LoRA' if lora else 'all weights'}"
            for size, mode in product(sizes, ("fsdp", "hsdp")):
                scenario.recipe = with_training(scenario.recipe, parallel=mode)
                costs.append((method, mode, scenario.row(*size, args)))
    if args.cost:
        report_cost(costs, args.price)


if __name__ == "__main__":
    main()
