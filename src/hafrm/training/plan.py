"""What a run will need, told before it starts, and the token budget that fits.

A plan is arithmetic over the shadow of the run's model: nothing is loaded and no data is read, so
lengths are taken from `data.max_length`. It is an estimate: what a device's allocator wastes, and what
else lives on the machine, is left to the spare part.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PretrainedConfig

from hafrm.engine.model import HybridModel
from hafrm.export.plain_model import proof_bytes
from hafrm.recipe import Recipe
from hafrm.training.costs import (
    FLOAT32,
    HALF,
    Bytes,
    Counts,
    Flops,
    copies_bytes,
    host_bytes,
    logprob_bytes,
    reading_bytes,
    shards_bytes,
    step_flops,
    work_of,
)
from hafrm.training.methods import Method
from hafrm.training.reference import REFERENCE_TOKENS
from hafrm.training.shadow import Footprint, count, layout_of, makes_scores, shadow_model, trace

LARGEST = 2**15
"""Tokens beyond which a micro-batch gains nothing: its matrix products cannot become more efficient."""
GRAIN = 256
"""Token budgets are multiples of this, so that a few bytes more or less do not change one."""
SPARE = {"cuda": 0.1, "cpu": 0.6}
"""Fraction of the memory left alone: on a GPU for the allocator's gaps; on a CPU, where glibc's heap has
been measured to hold up to 2.4 times what is alive (docs/scale.md)."""
MOST_GROUPS = {False: 4, True: 16}
"""Groups of a traced micro-batch: memory follows its tokens, however many groups they are cut into. More
where attention scores are made, which grow with the square of a group; fewer than there are then plan
too much."""


@dataclass(frozen=True)
class Target:
    """Where a run is to fit: the device of one rank, and how many ranks there are."""

    device: Literal["cuda", "cpu"]
    memory: int
    """Bytes that a rank may count on before anything is loaded."""
    ranks: int = 1

    @property
    def usable(self) -> int:
        """Bytes without the spare part."""
        return int(self.memory * (1 - SPARE[self.device]))


@dataclass(frozen=True)
class Plan:
    """What one rank of a run needs, and whether it is there."""

    target: Target
    counts: Counts
    sharded: bool
    max_tokens: int
    """The budget, as given or, for auto, as found."""
    tokens: int
    """Of the largest micro-batch: the budget, or all of a step where that is less."""
    bytes: Bytes
    flops: Flops
    """Of the largest micro-batch."""
    host: int
    """Bytes of the host's memory that the main rank takes to write a checkpoint, or the export."""
    proof: int
    """Bytes that a GPU must have free, once training has let go of it, to replay the export's scores; a CPU
    does it otherwise."""

    @property
    def fits(self) -> bool:
        """Whether the need stays within the usable part."""
        return self.bytes.total <= self.target.usable

    def __str__(self) -> str:
        parts = self.bytes
        shown = {
            "weights": parts.weights,
            "gradients": parts.gradients,
            "optimiser": parts.optimiser,
            "exchange": parts.exchange,
            f"activations of {self.tokens} tokens": parts.activations,
            "working memory": max(parts.logprobs, parts.temporaries),
        }
        words = ", ".join(f"{name} {gib(size)}" for name, size in shown.items() if size)
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"a step takes about {gib(parts.step)} GiB ({words}), passes without gradients "
            f"{gib(parts.passes)}; {verdict} into the {gib(self.target.usable)} that may be used of "
            f"{gib(self.target.memory)}; training.max_tokens {self.max_tokens}"
        )


def gib(size: int) -> str:
    """Bytes in GiB, as people compare them."""
    return f"{size / 2**30:.0f}" if size >= 100 * 2**30 else f"{size / 2**30:.2f}"


class Planner:
    """Plans one recipe for any target; what a micro-batch keeps is traced once for each size."""

    def __init__(self, recipe: Recipe, method: Method, config: PretrainedConfig) -> None:
        """Raises ModelError for a config that is no causal LM's."""
        self.recipe, self._method, self._config = recipe, method, config
        self._half = recipe.training.precision == "bf16"
        self._shadows: dict[bool, HybridModel] = {}
        self._found: dict[tuple[int, bool, str, bool], Footprint] = {}
        self.counts = count(self._shadow(sharded=False))

    def plan(self, target: Target) -> Plan:
        """The need at the recipe's token budget, or at the largest that fits, for auto the least that
        there may be if none does. Raises ModelError where the model cannot be traced."""
        training, longest = self.recipe.training, 2 * self.recipe.data.max_length
        budget = (
            self._largest(target, longest, self._tokens(max(LARGEST, longest)))
            if training.max_tokens == "auto"
            else training.max_tokens
        )
        tokens = self._tokens(budget)
        return Plan(
            target=target,
            counts=self.counts,
            sharded=self._sharded(target),
            max_tokens=budget,
            tokens=tokens,
            bytes=self.bytes(target, budget),
            flops=step_flops(
                self.counts,
                work_of(self._shape(tokens)),
                checkpointing=training.gradient_checkpointing,
            ),
            host=host_bytes(self.counts, half=self._half),
            proof=proof_bytes(self.counts.total),
        )

    def bytes(self, target: Target, budget: int) -> Bytes:
        """The need with micro-batches of up to this many tokens."""
        sharded, tokens = self._sharded(target), self._tokens(budget)
        footprint = self._footprint(tokens, sharded, target.device)
        states = self.states(target, tokens)
        frozen_half = self._half and bool(self.counts.adapters)
        logprobs = logprob_bytes(
            self.counts,
            work_of(self._shape(tokens)),
            device=target.device,
            product=self._product(target),
            stored=HALF if frozen_half or (self._half and sharded) else FLOAT32,
        )
        weights, _, optimiser, _ = states
        whole, *_ = copies_bytes(self.counts)
        return Bytes(
            *states,
            activations=footprint.kept,
            logprobs=logprobs,
            temporaries=footprint.temporaries,
            passes=max(whole, weights + optimiser) + self._reading(target, budget),
        )

    def _reading(self, target: Target, budget: int) -> int:
        """Bytes of a pass without gradients over as many tokens as the reference's takes at once."""
        tokens = REFERENCE_TOKENS * budget
        held = self._footprint(tokens, False, target.device, train=False).temporaries
        logprobs = reading_bytes(
            self.counts,
            work_of(self._shape(tokens)),
            device=target.device,
            product=self._product(target),
            stored=HALF if self._half and self.counts.adapters else FLOAT32,
        )
        return max(held, logprobs)

    def least(self, target: Target) -> int:
        """Bytes that no token budget gets below."""
        weights, *_ = copies_bytes(self.counts)
        return max(weights, sum(self.states(target, LARGEST)))

    def states(self, target: Target, tokens: int) -> tuple[int, int, int, int]:
        """(weights, gradients, optimiser, exchange) in bytes, which no trace is needed for."""
        if not self._sharded(target):
            return copies_bytes(self.counts)
        return shards_bytes(
            self.counts,
            target.ranks,
            gathered=HALF if self._half else FLOAT32,
            accumulates=tokens < self._one_micro_batch(target),
        )

    def _largest(self, target: Target, least: int, most: int) -> int:
        """The largest budget that fits; `least` where none does."""
        one = self._one_micro_batch(target)
        ends = [(least, most)]
        if self._sharded(target) and least < one <= most:
            ends = [(one, most), (least, one - 1)]  # below, the need jumps by whole gradients
        for low, high in ends:
            if self.bytes(target, high).total <= target.usable:
                return high
            if self.bytes(target, low).total <= target.usable:
                return self._between(target, low, high)
        return least

    def _between(self, target: Target, low: int, high: int) -> int:
        """The largest budget that fits, of which `low` does and `high` does not. The need grows with the
        tokens, and ever faster, so that what fits by the straight line between two sizes does fit."""
        need = self.bytes(target, high).total
        while True:
            start = self.bytes(target, low).total
            more = int((high - low) * (target.usable - start) / (need - start))
            found = (low + more) // GRAIN * GRAIN
            if found <= low:
                return low
            enough = found - low <= low // 8
            low = found
            if enough:
                return low

    def _footprint(
        self, tokens: int, sharded: bool, device: str, *, train: bool = True
    ) -> Footprint:
        key = (tokens, sharded, device, train)
        if key not in self._found:
            self._found[key] = trace(
                self._shadow(sharded),
                layout_of(self._shape(tokens)),
                half=self._half,
                cuda=device == "cuda",
                train=train,
            )
        return self._found[key]

    def _shadow(self, sharded: bool) -> HybridModel:
        if sharded not in self._shadows:
            model = shadow_model(self._config, self.recipe, self._method)
            if sharded and self._half:
                # FSDP2 gathers in bfloat16, so that autocast copies no weights.
                nn.Module.to(model.backbone, torch.bfloat16)
            self._shadows[sharded] = model
        return self._shadows[sharded]

    def _tokens(self, budget: int) -> int:
        """Of the largest micro-batch that a step can fill."""
        return min(budget, self.recipe.training.batch_size * 2 * self.recipe.data.max_length)

    def _product(self, target: Target) -> int:
        """Bytes of a number in the log-probs' products, which a CPU always takes in float32."""
        return HALF if self._half and target.device == "cuda" else FLOAT32

    def _shape(self, tokens: int) -> list[tuple[int, tuple[int, int]]]:
        """Comparisons whose prompt is half of the limit, with a response that fills it and one half as
        long: they make up `tokens`, as even as they go."""
        group = 5 * max(4, self.recipe.data.max_length) // 4  # at least one token to each part
        most = MOST_GROUPS[makes_scores(self._config)]
        groups = max(1, min(most, tokens // group))
        shares = [tokens * (i + 1) // groups - tokens * i // groups for i in range(groups)]
        return [(2 * n // 5, (n - 2 * n // 5 - n // 5, n // 5)) for n in shares]

    def _one_micro_batch(self, target: Target) -> int:
        """Tokens that hold a rank's part of a step at once, were all its comparisons as in `_shape`."""
        training, length = self.recipe.training, self.recipe.data.max_length
        return -(-training.batch_size * 5 * length // (4 * target.ranks))

    def _sharded(self, target: Target) -> bool:
        mode = self.recipe.training.parallel
        return target.ranks > 1 and (mode == "fsdp" or (mode == "auto" and target.device == "cuda"))
