"""Sixteen pairs of unequal lengths and their micro-batches, for tests of single steps."""

from hafrm.preferences import Comparison, TokenizedGroup
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
