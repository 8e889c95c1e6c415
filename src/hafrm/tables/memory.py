"""Tables of the memory that a run will need."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from hafrm.training.plan import Plan, gib


def plan_tables(plan: Plan, remedies: list[tuple[str, Plan]]) -> Iterator[RenderableType]:
    """What a run needs, where it does not fit what would, and the work of a micro-batch."""
    target, need, counts = plan.target, plan.bytes, plan.counts
    place = "a GPU" if target.device == "cuda" else "a CPU"
    share = f"each of {target.ranks} ranks" if target.ranks > 1 else "one process"
    table = Table(title=f"memory of {share} on {place}", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    table.add_column("made of")
    trained, frozen = f"{counts.trainable:,} weights trained", f"{counts.frozen:,} frozen"
    shards = "in shards" if plan.sharded else "whole"
    on_gpu = target.device == "cuda" and plan.proof <= target.memory
    held = max(need.logprobs, need.temporaries)
    what = "logits, the head's gradient" if held == need.logprobs else "of the backward pass"
    rows = (
        ("weights", need.weights, f"{trained}, {frozen}, {shards}"),
        ("gradients", need.gradients, "float32"),
        ("optimiser", need.optimiser, "AdamW's two moments, float32"),
        (
            "exchange between ranks",
            need.exchange,
            "gathered layers" if plan.sharded else "DDP's buckets",
        ),
        ("activations", need.activations, f"a micro-batch of {plan.tokens:,} tokens"),
        ("working memory", held, what),
        ("a step in all", need.step, f"{gib(target.usable)} of {gib(target.memory)} may be used"),
        (
            "passes without gradients",
            need.passes,
            "the reference's over whole weights, validation's",
        ),
        (
            "host memory of the first rank",
            plan.host,
            "a checkpoint's or the export's whole weights",
        ),
        ("proof of the export", plan.proof if on_gpu else 0, "in float32, after training is freed"),
    )
    for name, size, note in rows:
        if size:
            table.add_row(name, gib(size), note)
    yield table
    budget = f"training.max_tokens {plan.max_tokens}"
    yield f"{'fits' if plan.fits else 'does NOT fit'} with {budget}; {plan.flops.total:.3g} FLOP each"
    if target.device == "cuda" and not on_gpu:
        yield f"the export is proved on the CPU: on the GPU it takes {gib(plan.proof)} GiB in float32"
    if remedies:
        yield _remedies(remedies)


def _remedies(remedies: list[tuple[str, Plan]]) -> Table:
    table = Table(title="what would fit", title_justify="left")
    for name in ("with", "fits", "GiB", "tokens"):
        table.add_column(name, justify="left" if name == "with" else "right")
    for words, plan in remedies:
        fits = "yes" if plan.fits else "no"
        table.add_row(words, fits, gib(plan.bytes.total), str(plan.max_tokens))
    return table
