"""Proof that exported directories give every consumer our numbers.

Of a reward model, `write_golden` records conversations, ids and float32 rewards, and `check_golden`
replays them in a fresh process with plain transformers (golden_check.py). Of a policy, `check_policy`
compares log-probs with plain transformers in this process.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hafrm.errors import NumericsError
from hafrm.preferences import Group, Message
from hafrm.scoring import golden_check
from hafrm.scoring.forward import first_responses, run_forward
from hafrm.scoring.golden_file import GOLDEN
from hafrm.scoring.loading import load_encoder, load_policy
from hafrm.scoring.scorer import MAX_TOKENS_CPU, RewardModel

TOLERANCE = 1e-4
"""Relative to max(1, |reward|), float32: padded against packed sums of a deep model."""
PLAIN = Group(
    id="plain",
    prompt=(Message("user", "What is the capital of France?"),),
    responses=("The capital of France is Paris.", "No."),
)
"""Always recorded too: data may hold nothing that is told in ids as a consumer tells it."""


def write_golden(directory: Path, groups: Sequence[Group]) -> int:
    """Score every response of `groups` with the exported weights and record what consumers must get.

    Conversations with special tokens in their text, and those cut, are left out: a consumer that renders
    and tokenises them gets other ids. Returns the number of lines.

    Raises NumericsError when consumers get other ids for all of them.
    """
    model = RewardModel.from_pretrained(directory)
    tokenizer = model.encoder.tokenizer
    groups = [*groups, PLAIN]
    encoded, _ = model.encoder.encode(groups)
    rewards = model.score_encoded(encoded)
    lines = []
    for group, ids, start in zip(groups, encoded, first_responses(encoded), strict=True):
        for k, response in enumerate(group.responses):
            messages = [{"role": m.role, "content": m.content} for m in group.prompt]
            messages.append({"role": "assistant", "content": response})
            ours = [*ids.prompt_ids.tolist(), *ids.response_ids[k].tolist()]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            if tokenizer(text, add_special_tokens=False)["input_ids"] != ours:
                continue
            reward = float(rewards[start + k])
            line = {"messages": messages, "text": text, "input_ids": ours, "reward": reward}
            lines.append(json.dumps(line))
    if not lines:
        raise NumericsError(
            f"{directory}: whoever renders its chat template and tokenises the text gets other ids than "
            f"training did, in each of {len(rewards)} conversations; mend the tokenizer or its template"
        )
    (directory / GOLDEN).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def check_golden(directory: Path, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Largest differences of plain transformers' scores, alone and padded right and left.

    Raises NumericsError when they exceed the tolerance, or when ids, labels, weights or settings are
    not as a consumer needs them.
    """
    # -P: the script's own directory must not hide anybody's modules.
    command = [sys.executable, "-P", golden_check.__file__, str(directory), str(tolerance)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = run.stdout.strip().splitlines()
    if run.returncode not in (0, 1) or not lines:
        raise NumericsError(
            f"{directory} cannot be loaded by plain transformers:\n{run.stderr.strip()[-2000:]}"
        )
    found = json.loads(lines[-1])
    if not found["ok"]:
        raise NumericsError(
            f"{directory} does not give consumers the scores that training gave: differences "
            f"{found['differences']} (tolerated {tolerance:g}), faults {found['faults']}"
        )
    differences: dict[str, float] = found["differences"]
    return differences


@torch.no_grad()
def check_policy(
    directory: Path, groups: Sequence[Group], tolerance: float = TOLERANCE
) -> tuple[int, float]:
    """How many responses' log-probs were compared with plain transformers', and the largest difference.

    Relative to max(1, |log-prob|), float32, whatever the weights are stored in. Raises NumericsError
    where they disagree, ModelError for a directory that is not a whole causal LM.
    """
    model = load_policy(directory, dtype=torch.float32, device="cpu")
    encoder = load_encoder(directory, model.backbone.config, None)
    encoded, _ = encoder.encode([*groups, PLAIN])
    found = run_forward(model.eval(), encoded, max_tokens=MAX_TOKENS_CPU).logps
    assert found is not None
    stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = []
    for group in encoded:
        for response in group.response_ids:
            ids = torch.tensor(np.concatenate([group.prompt_ids, response]), dtype=torch.int64)
            logps = stock(ids[None]).logits[0, :-1].log_softmax(-1)
            tokens = logps.gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :]
            expected.append(float(tokens.sum()))
    plain = np.array(expected)
    difference = float((np.abs(found - plain) / np.maximum(1.0, np.abs(plain))).max())
    if not difference <= tolerance:  # a NaN is no agreement
        raise NumericsError(
            f"{directory} gives plain transformers other log-probs than hafrm: they differ by "
            f"{difference:.2g} (tolerated {tolerance:g})"
        )
    return len(expected), difference
