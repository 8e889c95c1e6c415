"""Proof that exported directories give every consumer our scores.

For a reward model, `write_golden` records conversations, ids and rewards, and `check_golden` replays them
with plain transformers in a fresh process. For a policy, `check_policy` compares log-probs in this process.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hafrm.atomic import atomic_write
from hafrm.errors import NumericsError, VerificationError
from hafrm.export.golden import GOLDEN
from hafrm.export.plain_model import TOLERANCE, PlainModel, device_for
from hafrm.preferences import Group, Message
from hafrm.scoring.forward import first_responses, free_memory, run_forward
from hafrm.scoring.loading import load_encoder, load_policy
from hafrm.scoring.reward_model import MAX_TOKENS_CPU, RewardModel

T = TypeVar("T")

_QUESTION = (Message("user", "What is the capital of France?"),)
PLAIN = Group("plain", _QUESTION, ("The capital of France is Paris.", "No."))
"""Always recorded too: a run's data may hold no conversation that tokenizes like a consumer's text."""


def prove(unverified: Path, directory: Path, check: Callable[[Path], T], again: str) -> T:
    """What `check` returns for an export, which is renamed to `directory` if it passes, and else stays.

    Raises VerificationError for whatever `check` raises; `again` says how to repeat it.
    """
    try:
        result = check(unverified)
    # whatever a consumer's library raises: the training must not be lost
    except Exception as error:
        raise VerificationError(
            f"the export is not verified: {error}. It is complete and kept as {unverified}; {again}"
        ) from error
    unverified.rename(directory)
    return result


def num_threads() -> int:
    """Threads for a proof: this process's own, but all of the host's if it was one of several ranks."""
    # torchrun sets OMP_NUM_THREADS=1 for each rank, and the others have ended when the proof runs
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return torch.get_num_threads()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_golden(directory: Path, groups: Sequence[Group]) -> int:
    """Score every response of `groups` with the exported weights; returns the number of golden lines.

    Conversations with special tokens in their text, and those cut, are left out, because a consumer that
    renders and tokenizes them gets other ids. Raises NumericsError when that leaves none.
    """
    torch.set_num_threads(num_threads())
    free_memory()
    device = device_for(sum(map(math.prod, PlainModel(directory).weights.values())))
    model = RewardModel.from_pretrained(directory, dtype=torch.float32, device=device)
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
            lines.append(json.dumps(line) + "\n")
    if not lines:
        raise NumericsError(
            f"{directory}: rendered and tokenized, every conversation gets other ids than in training; fix "
            "the tokenizer or its template"
        )
    atomic_write(directory / GOLDEN, "".join(lines))
    return len(lines)


def check_golden(directory: Path, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Largest differences of plain transformers' scores, alone and padded right and left.

    Raises NumericsError when they exceed the tolerance, or the directory gives consumers other scores.
    """
    # -P: modules of the current directory must not be imported
    command = [sys.executable, "-P", "-m", "hafrm.export.checklist", str(directory), str(tolerance)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads())}
    free_memory()
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = run.stdout.strip().splitlines()
    if run.returncode not in (0, 1) or not lines:
        raise NumericsError(
            f"{directory} cannot be loaded by plain transformers:\n{run.stderr.strip()[-2000:]}"
        )
    replay = json.loads(lines[-1])
    differences: dict[str, float] = replay["differences"]
    if not replay["ok"]:
        raise NumericsError(
            f"{directory} does not give consumers the scores of training: differences {differences} "
            f"(tolerated {tolerance:g}), faults {replay['faults']}"
        )
    return differences


@torch.no_grad()
def check_policy(
    directory: Path, groups: Sequence[Group], tolerance: float = TOLERANCE
) -> tuple[int, float]:
    """Number of responses whose log-probs plain transformers reproduces, and the largest difference.

    It is relative to max(1, |log-prob|), in float32. Raises NumericsError beyond the tolerance.
    """
    model = load_policy(directory, dtype=torch.float32, device="cpu")
    encoder = load_encoder(directory, model.backbone.config, None)
    encoded, _ = encoder.encode([*groups, PLAIN])
    logps = run_forward(model.eval(), encoded, max_tokens=MAX_TOKENS_CPU).logps
    assert logps is not None
    del model  # two models in float32 might not fit
    stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = []
    for group in encoded:
        for response in group.response_ids:
            ids = torch.tensor(np.concatenate([group.prompt_ids, response]), dtype=torch.int64)
            token_logps = stock(ids[None]).logits[0, :-1].log_softmax(-1)
            tokens = token_logps.gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :]
            expected.append(float(tokens.sum()))
    plain = np.array(expected)
    difference = float((np.abs(logps - plain) / np.maximum(1.0, np.abs(plain))).max())
    if not difference <= tolerance:  # True for NaN
        raise NumericsError(
            f"log-probs of {directory} differ from plain transformers' by {difference:.2g} (tolerated "
            f"{tolerance:g})"
        )
    return len(expected), difference
