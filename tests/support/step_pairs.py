"""Sixteen pairs of unequal lengths, their micro-batches, and single steps on them."""

from typing import Any

import torch
from torch import nn

from hafrm.preferences import Comparison, TokenizedGroup
from hafrm.training.methods import Method
from hafrm.training.step import NonFiniteCheck, StepResult, build_optimizer, take_step
from hafrm.training.step_batches import ComparisonRef, MicroBatch, build_micro_batch, plan_step
from support.models import token_groups

SHAPES = [(3 + i % 7, (2 + i % 5, 3 + i % 4)) for i in range(16)]


def pairs(margin: float = 0.0) -> list[TokenizedGroup]:
    """Sixteen pairs of unequal lengths."""
    return [
        TokenizedGroup(t.prompt_ids, t.response_ids, (Comparison(0, 1, margin=margin),), f"g{i}")
        for i, t in enumerate(token_groups(SHAPES))
    ]


def micro_batches(
    groups: list[TokenizedGroup], max_tokens: int, references=None
) -> list[MicroBatch]:
    """All groups' first comparisons as the micro-batches of one step."""
    picks = [ComparisonRef(i, 0) for i in range(len(groups))]
    ((*parts,),) = plan_step(groups, picks, max_tokens)
    return [build_micro_batch(part, references) for part in parts]


def adamw(model: nn.Module, rate: float = 1e-2, eps: float = 1e-3) -> torch.optim.AdamW:
    """The optimizer of a run, without weight decay, at a rate."""
    optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=eps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def one_step(
    model: nn.Module,
    batches: list[MicroBatch],
    method: Method,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> StepResult:
    """A step of sixteen comparisons."""
    nonfinite = NonFiniteCheck(torch.device("cpu"))
    options = {"num_comparisons": 16, "max_grad_norm": 1.0, "nonfinite": nonfinite, **options}
    return take_step(model, optimizer or adamw(model), batches, method, **options)
