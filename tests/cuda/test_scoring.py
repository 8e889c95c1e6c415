"""Scores of a GPU against those of a CPU in float32."""

import numpy as np
import pytest
import torch

from hafrm.scoring.reward_model import PolicyModel, RewardModel
from support.exports import export_both

pytestmark = pytest.mark.cuda

PROMPT = "How do I bake bread?"
RESPONSES = ["Mix flour and water, then wait.", "No.", "I think that it is a good idea to ask."]
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
"""Relative to the largest score. The tiny models' weights are four times the usual size."""


def assert_near(scores, expected, tolerance: float) -> None:
    expected = np.asarray(expected)
    assert np.abs(np.asarray(scores) - expected).max() < tolerance * max(1, np.abs(expected).max())


@PRECISIONS
@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "gemma2"])
def test_rewards_and_log_probs_equal_those_of_a_cpu_in_float32(
    family, dtype, tolerance, device, tmp_path
):
    export_both(tmp_path, family)
    for kind, name in ((RewardModel, "reward"), (PolicyModel, "policy")):
        cpu = kind.from_pretrained(tmp_path / name, dtype=torch.float32, device="cpu")
        ours = kind.from_pretrained(tmp_path / name, dtype=dtype, device=device)
        assert_near(ours.score(PROMPT, RESPONSES), cpu.score(PROMPT, RESPONSES), tolerance)
