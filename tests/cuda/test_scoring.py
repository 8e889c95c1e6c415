"""Scores of a GPU against those of a CPU in float32."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from hafrm.scoring.forward import run_forward
from hafrm.scoring.reward_model import PolicyModel, RewardModel
from support.exports import export_both
from support.models import SHAPES, tiny_hybrid, token_groups

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


@pytest.mark.parametrize("max_tokens", [40, 10_000])
def test_scores_do_not_depend_on_the_packing(max_tokens, device):
    groups = token_groups(SHAPES)
    expected = run_forward(tiny_hybrid().eval(), groups, max_tokens=1)
    scores = run_forward(tiny_hybrid().eval().to(device), groups, max_tokens=max_tokens)
    assert_near(scores.rewards, expected.rewards, 1e-4)
    assert_near(scores.logps, expected.logps, 1e-4)


def test_the_command_scores_a_file_as_the_library_does(device, tmp_path):
    export_both(tmp_path)
    source, target = tmp_path / "rows.jsonl", tmp_path / "scored"
    rows = [{"prompt": f"{PROMPT} {i}", "responses": RESPONSES} for i in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "hafrm", "score", str(tmp_path / "reward")]
    subprocess.run([*command, str(source), "--out", str(target)], check=True, capture_output=True)
    cpu = RewardModel.from_pretrained(tmp_path / "reward", dtype=torch.float32, device="cpu")
    for row, line in zip(rows, (target / "rows.jsonl").read_text().splitlines(), strict=True):
        assert_near(json.loads(line)["rewards"], cpu.score(row["prompt"], RESPONSES), 1e-4)
