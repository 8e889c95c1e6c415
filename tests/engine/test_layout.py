"""The index tensors of a packed row, against a row written out by hand and slow loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hafrm.engine.layout import lay_out, unshare
from support.models import SHAPES, TokenGroup, token_groups


def group(prompt: list[int], *responses: list[int]) -> TokenGroup:
    return TokenGroup(
        np.array(prompt, np.int32), tuple(np.array(ids, np.int32) for ids in responses)
    )


DRAWING = (group([10, 11, 12], [20, 21, 22], [30, 31]), group([40, 41], [50], [60, 61]))


def test_the_row_of_the_docstring_has_these_index_tensors():
    """
    row index:  0  1  2  | 3  4  5  | 6  7  | 8  9  | 10 | 11 12
    token:      P0 P1 P2 | a0 a1 a2 | b0 b1 | Q0 Q1 | c0 | d0 d1

    a0 and b0 are both predicted from P2 (row 2), c0 and d0 from Q1 (row 9). Segments: P+a (6 queries,
    6 keys), b (2, 5), Q+c (3, 3), d (2, 4); the bounds are their running sums.
    """
    layout = lay_out(DRAWING)
    expected = {
        "input_ids": [10, 11, 12, 20, 21, 22, 30, 31, 40, 41, 50, 60, 61],
        "position_ids": [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 2, 3],
        "predictor": [2, 3, 4, 2, 6, 9, 9, 11],
        "targets": [20, 21, 22, 30, 31, 50, 60, 61],
        "response_of": [0, 0, 0, 1, 1, 2, 3, 3],
        "last": [5, 7, 10, 12],
        "lengths": [3, 2, 1, 2],
        "key_index": [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 9, 10, 8, 9, 11, 12],
        "cu_queries": [0, 6, 8, 11, 13],
        "cu_keys": [0, 6, 11, 14, 18],
    }
    assert {name: getattr(layout, name).tolist() for name in expected} == expected
    assert layout.shape == ((3, (3, 2)), (2, (1, 2)))
    assert layout.query_lengths == [6, 2, 3, 2]
    assert layout.key_lengths == [6, 5, 3, 4]
    assert (layout.num_tokens, layout.num_responses) == (13, 4)
    # as the varlen kernels ask for bounds
    assert layout.cu_queries.dtype == layout.cu_keys.dtype == torch.int32
    assert layout.input_ids.dtype == layout.key_index.dtype == torch.int64


@pytest.mark.parametrize(
    "bad",
    [group([], [1, 2]), group([1, 2]), group([1, 2], []), group([1, 2], [3], [])],
    ids=["empty prompt", "no response", "empty response", "second response empty"],
)
def test_a_group_that_nothing_could_score_is_refused(bad):
    with pytest.raises(ValueError, match=r"got \d prompt tokens and responses of \["):
        lay_out([group([1], [2]), bad])


def test_unshared_rows_hold_at_every_index_what_the_packed_row_holds():
    """The token that follows a predictor is its target, the last row is the last response token; the
    ids of pad (0) and EOS (2) inside a response change nothing."""
    groups = [group([4, 0, 2], [0, 2, 0, 2], [2]), group([2], [0, 0]), *token_groups(SHAPES)]
    layout = lay_out(groups)
    padded = unshare(layout)
    flat = padded.input_ids.flatten()
    assert torch.equal(flat[padded.predictor + 1], layout.targets)
    assert torch.equal(flat[padded.predictor], layout.input_ids[layout.predictor])
    assert torch.equal(flat[padded.last], layout.input_ids[layout.last])
    assert padded.attention_mask.sum(1).tolist() == layout.key_lengths
    sequences = [[*g.prompt_ids, *r] for g in groups for r in g.response_ids]
    for ids, mask, sequence in zip(padded.input_ids, padded.attention_mask, sequences, strict=True):
        assert ids[mask.bool()].tolist() == sequence
        assert not mask[len(sequence) :].any()


def test_to_moves_every_tensor_and_forgets_masks_of_the_old_device():
    layout = lay_out(DRAWING)
    layout.masks["a mask of the old device"] = torch.ones(1)
    moved = layout.to("meta")
    tensors = {name: t for name, t in vars(layout).items() if isinstance(t, Tensor)}
    assert len(tensors) == 11
    for name, tensor in tensors.items():
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == tensor.shape
        assert tensor.device.type == "cpu"
    assert moved.masks == {}
    assert moved.shape == layout.shape
