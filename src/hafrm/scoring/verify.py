"""Proof that exported directories give every consumer our numbers.

Of a reward model, `write_golden` records conversations, ids and float32 rewards, and `check_golden`
replays them in a fresh process with plain transformers (golden_check.py). Of a policy, `check_policy`
compares log-probs with plain transformers in this process. `prove` gives an export its name once it
has passed, and keeps it where it has not.
"""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hafrm.atomic import atomic_write
from hafrm.engine.packing import free_memory
from hafrm.errors import HafrmError, NumericsError, VerificationError
from hafrm.preferences import Group, Message
from hafrm.scoring import golden_check
from hafrm.scoring.forward import first_responses, run_forward
from hafrm.scoring.golden_file import GOLDEN
from hafrm.scoring.loading import load_encoder, load_policy
from hafrm.scoring.scorer import MAX_TOKENS_CPU, RewardModel

log = logging.getLogger("hafrm")
T = TypeVar("T")

TOLERANCE = 1e-4
"""Relative to max(1, |reward|), float32: padded against packed sums of a deep model."""
PLAIN = Group(
    id="plain",
    prompt=(Message("user", "What is the capital of France?"),),
    responses=("The capital of France is Paris.", "No."),
)
"""Always recorded too: data may hold nothing that is told in ids as a consumer tells it."""


def prove(unverified: Path, directory: Path, check: Callable[[Path], T], again: str) -> T:
    """What `check` returns for an export, which becomes `directory` if it passes and is kept if not.

    Raises VerificationError for whatever `check` raises; `again` says how the proof is repeated.
    """
    try:
        result = check(unverified)
    except (HafrmError, RuntimeError, OSError) as error:  # a RuntimeError: out of memory
        raise VerificationError(
            f"the export is not verified: {error}. It is complete and kept as {unverified}; {again}"
        ) from error
    unverified.rename(directory)
    return result


def proof_device(directory: Path) -> torch.device:
    """Where the float32 weights of an export are run: on the GPU if they fit into its free memory, with a
    margin for activations, else on the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    free_memory()
    needed, free = golden_check.room_for(_num_weights(directory)), torch.cuda.mem_get_info()[0]
    if needed <= free:
        return torch.device("cuda")
    log.info(
        "the golden scores are computed on the CPU: float32 takes %.1f GiB, the GPU has %.1f GiB free",
        needed / 2**30,
        free / 2**30,
    )
    return torch.device("cpu")


def _num_weights(directory: Path) -> int:
    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(n).get_shape()) for n in tensors.keys())  # noqa: SIM118
    return total


def num_threads() -> int:
    """Threads of a proof: this process's own, but all of the host's where it was one of several ranks.

    torchrun sets OMP_NUM_THREADS=1 for each, and by the time of the proof the others have ended.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return torch.get_num_threads()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_golden(directory: Path, groups: Sequence[Group]) -> int:
    """Score every response of `groups` with the exported weights and record what consumers must get.

    Conversations with special tokens in their text, and those cut, are left out: a consumer that renders
    and tokenises them gets other ids. Returns the number of lines.

    Raises NumericsError when consumers get other ids for all of them.
    """
    torch.set_num_threads(num_threads())
    model = RewardModel.from_pretrained(
        directory, dtype=torch.float32, device=proof_device(directory)
    )
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
    atomic_write(directory / GOLDEN, "\n".join(lines) + "\n")
    return len(lines)


def check_golden(directory: Path, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Largest differences of plain transformers' scores, alone and padded right and left.

    Raises NumericsError when they exceed the tolerance, or when ids, labels, weights or settings are
    not as a consumer needs them.
    """
    # -P: the script's own directory must not hide anybody's modules.
    command = [sys.executable, "-P", golden_check.__file__, str(directory), str(tolerance)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads())}
    free_memory()
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
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
    del model  # each of the two takes 4 bytes a weight
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
