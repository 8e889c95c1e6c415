"""What a joint step spends on a GPU besides products: idle time, log-probs, attention, GELU.

    python benchmarks/gpu.py --data preferences.jsonl --tokenizer TOKENIZER --shape phi-2 --out FOLDER

Every part has rows of its own in FOLDER/parts-SHAPE.jsonl. `busy` runs joint steps between events of the
device; `head` takes the log-probs of response tokens in chunks of several sizes; `attention` runs one
layer's attention over a micro-batch in each way that there is; `gelu` compares the GELU of GPT-2 and Phi,
nine kernels, with torch's single one. Times are forward and backward.
"""

import argparse
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import Marks, Ours
from torch import Tensor
from transformers.activations import NewGELUActivation
from workload import (
    Rows,
    Workload,
    add_model_options,
    best_time,
    load,
    model_options,
    synchronise,
)

from hafrm.engine import attention
from hafrm.engine.attention import Rule, attend_by_group, attend_by_segment
from hafrm.engine.layout import Layout, lay_out
from hafrm.engine.logprobs import token_logprobs

WARM_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    add_model_options(parser, "phi-2")
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing later")
    parser.add_argument("--out", type=Path)
    args = model_options(parser)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    w = load(
        args.data,
        args.tokenizer,
        shape=args.shape,
        steps=args.steps,
        max_tokens=args.max_tokens,
        max_length=1024,
        device=torch.device(args.device),
        lora_rank=args.lora_rank,
    )
    rows = Rows(args.out, f"parts-{args.name}", seconds=args.seconds)
    rows.add({"part": "busy"}, lambda: busy(w))
    for exponent in (24, 26, 27):
        rows.add({"part": "head", "logits": f"2^{exponent}"}, lambda e=exponent: head(w, 2**e))
    ways = {
        "varlen": attention._varlen,
        "padded groups": attend_by_group,
        "segments": attend_by_segment,
    }
    for name, attend in ways.items():
        rows.add({"part": "attention", "way": name}, lambda a=attend: attention_of(w, a))
    gelus = {"nine kernels": NewGELUActivation(), "fused": torch.nn.GELU(approximate="tanh")}
    for name, gelu in gelus.items():
        rows.add({"part": "gelu", "way": name}, lambda g=gelu: gelu_of(w, g))


def busy(w: Workload) -> dict[str, Any]:
    """Seconds of the steps by the clock, and on the device between each step's first and last kernel.

    Where the host has handed a step out long before the device is through with it, the device never waits
    within a step; `between` is the time in which it waits from one step to the next.
    """
    step, batches = Ours().prepared(w, Marks())
    for step_batches in batches[:WARM_STEPS]:
        step(step_batches)
    timed = batches[WARM_STEPS:]
    on_gpu = w.device.type == "cuda"
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in (timed if on_gpu else ())
    ]
    synchronise(w.device)
    start, host = time.perf_counter(), 0.0
    for number, step_batches in enumerate(timed):
        if on_gpu:
            events[number][0].record()
        began = time.perf_counter()
        step(step_batches)
        host += time.perf_counter() - began
        if on_gpu:
            events[number][1].record()
    synchronise(w.device)
    seconds = time.perf_counter() - start
    row = {"steps": len(timed), "seconds": seconds, "host_seconds": host}
    if on_gpu:
        within = sum(first.elapsed_time(last) for first, last in events) / 1000
        pairs = itertools.pairwise(events)
        between = sum(before[1].elapsed_time(after[0]) for before, after in pairs) / 1000
        row |= {"device_seconds": within, "between": between, "busy": within / seconds}
    return row


def head(w: Workload, logits: int) -> dict[str, Any]:
    """Log-probs of a micro-batch's response tokens; the head is trained, or frozen beside adapters."""
    layout, dtype = micro_batch(w), half(w)
    vocab, width = w.config.vocab_size, w.config.hidden_size
    hidden = torch.randn(len(layout.targets), width, device=w.device, dtype=dtype)
    weight = torch.randn(vocab, width, device=w.device, dtype=dtype if w.lora_rank else None)
    weight.requires_grad_(not w.lora_rank)
    hidden.requires_grad_()

    def run() -> None:
        with torch.autocast(w.device.type, torch.bfloat16, enabled=w.device.type == "cuda"):
            logps = token_logprobs(hidden, weight, layout.targets, chunk=max(1, logits // vocab))
        logps.sum().backward()

    return {"tokens": len(layout.targets), "vocab": vocab, "seconds": best_time(run, w.device)}


def attention_of(
    w: Workload, attend: Callable[[Tensor, Tensor, Tensor, Layout, Rule], Tensor]
) -> dict[str, Any]:
    """One layer over one micro-batch."""
    layout, heads = micro_batch(w), w.config.num_attention_heads
    grouped = getattr(w.config, "num_key_value_heads", None) or heads
    size = w.config.hidden_size // heads
    inputs = [
        torch.randn(1, n, layout.num_tokens, size, device=w.device, dtype=half(w)).requires_grad_()
        for n in (heads, grouped, grouped)
    ]

    def run() -> None:
        attend(*inputs, layout, Rule()).sum().backward()

    return {"tokens": layout.num_tokens, "seconds": best_time(run, w.device)}


def gelu_of(w: Workload, gelu: torch.nn.Module) -> dict[str, Any]:
    """One layer's activation over one micro-batch, under autocast as in a step."""
    tokens = micro_batch(w).num_tokens
    inner = torch.randn(tokens, w.config.intermediate_size, device=w.device, dtype=half(w))
    inner.requires_grad_()

    def run() -> None:
        with torch.autocast(w.device.type, torch.bfloat16, enabled=w.device.type == "cuda"):
            output = gelu(inner)
        output.sum().backward()

    return {"tokens": tokens, "seconds": best_time(run, w.device)}


def micro_batch(w: Workload) -> Layout:
    """As many groups as fit into the token budget."""
    groups, tokens = [], 0
    for group in w.encoded:
        tokens += len(group.prompt_ids) + sum(map(len, group.response_ids))
        if tokens > w.max_tokens:
            break
        groups.append(group)
    return lay_out(groups).to(w.device)


def half(w: Workload) -> torch.dtype:
    return torch.bfloat16 if w.device.type == "cuda" else torch.float32


if __name__ == "__main__":
    main()
