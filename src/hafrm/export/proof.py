"""Proofs that a saved model gives the same scores as the model in memory did before it was saved.

`score_in_memory` records the scores, `write_golden` compares the export's scores with them and stores those
beside it, and `check_golden` repeats them in a fresh process with plain transformers.
"""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from hafrm.atomic import atomic_write
from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel, longest_sequence
from hafrm.errors import NumericsError, VerificationError
from hafrm.export.plain_model import GOLDEN, TOLERANCE, PlainModel, device_for, num_threads
from hafrm.preferences import Group, Message, TokenizedGroup
from hafrm.scoring.forward import Scores, first_responses, free_memory, run_forward
from hafrm.scoring.model_files import load_config
from hafrm.scoring.reward_model import RewardModel

log = logging.getLogger("hafrm")
T = TypeVar("T")

HALF_TOLERANCE = 0.1
"""Tolerance of log-probs if the model in memory or the stored weights are in half precision."""
LEAST_SCATTER = 0.02
"""By how much rounding to half precision may scatter rewards, however similar they are."""
_QUESTION = Message("user", "What is the capital of France?")
PLAIN = Group("plain", (_QUESTION,), ("The capital of France is Paris.", "No."))
"""Always included: a run's data may have no conversation that tokenizes like a consumer's text."""


def prove(unverified: Path, directory: Path, check: Callable[[Path], T], again: str) -> T:
    """What `check` returns for an export, which is renamed to `directory` if it passes, and else stays.

    Raises VerificationError for anything that `check` raises; `again` says how to repeat it.
    """
    try:
        result = check(unverified)
    # a consumer's library raises anything; the training must not be lost
    except Exception as error:
        raise VerificationError(
            f"the export is not verified: {error}. It is complete and kept as {unverified}; {again}"
        ) from error
    unverified.rename(directory)
    return result


@dataclass(frozen=True)
class InMemory:
    """Golden conversations, and what the model in memory gives them before it is saved."""

    groups: list[Group]
    encoded: list[TokenizedGroup]
    scores: Scores
    is_half: bool  # computed in bfloat16

    def check_rewards(self, directory: Path, rewards: NDArray[np.float32]) -> float:
        """The largest difference of a saved model's rewards, relative to max(1, |reward|); NumericsError
        above the tolerance.

        In half precision, where rounding loses a part of what adapters add to weights, it is the standard
        deviation of the differences; up to half that of the rewards is tolerated. All rewards may move by
        the same amount: they are defined up to a constant.
        """
        expected = self.scores.rewards
        if expected is None:
            return 0.0
        differences = rewards - expected
        if not self._any_half(directory):
            largest = float(np.max(np.abs(differences) / np.maximum(1.0, np.abs(expected))))
            log.info("the export gives the rewards of the model in memory within %.1e", largest)
            return _within(TOLERANCE, largest, directory)
        scatter, spread = float(differences.std()), float(expected.std())
        log.info(
            "half precision moves the rewards by %+.2g and scatters them by %.2g; "
            "their standard deviation is %.2g",
            differences.mean(),
            scatter,
            spread,
        )
        return _within(max(LEAST_SCATTER, spread / 2), scatter, directory)

    def check_logps(self, directory: Path, logps: NDArray[np.float64]) -> float:
        """The largest difference of a saved model's log-probs in nat per token (in half precision, the root
        mean square of the differences); NumericsError above the tolerance."""
        if self.scores.logps is None:
            return 0.0
        differences = np.abs(logps - self.scores.logps) / self.scores.lengths
        if self._any_half(directory):
            return _within(HALF_TOLERANCE, float(np.sqrt(np.mean(differences**2))), directory)
        return _within(TOLERANCE, float(differences.max()), directory)

    def _any_half(self, directory: Path) -> bool:
        return self.is_half or load_config(directory).dtype != torch.float32


def _within(tolerance: float, difference: float, directory: Path) -> float:
    if not difference <= tolerance:  # also for NaN
        raise NumericsError(
            f"{directory} does not give the scores that the model in memory gave: they differ by "
            f"{difference:.2g} (tolerated {tolerance:.2g})"
        )
    return difference


def score_in_memory(
    model: HybridModel,
    encoder: Encoder,
    groups: Sequence[Group],
    *,
    max_tokens: int,
    autocast: torch.dtype | None,
) -> InMemory:
    """A model's scores of golden conversations of up to `max_tokens` tokens, and of a built-in one; all
    ranks call this."""
    groups = [*groups, PLAIN]
    longest = min(max_tokens, longest_sequence(model.backbone.config) or max_tokens)
    encoded, report = Encoder(encoder.tokenizer, max_length=longest).encode(groups)
    groups = [group for i, group in enumerate(groups) if i not in report.refused]
    scores = run_forward(model.eval(), encoded, max_tokens=max_tokens, autocast=autocast)
    return InMemory(groups, list(encoded), scores, autocast is not None)


def write_golden(directory: Path, memory: InMemory) -> int:
    """Score the golden conversations with the exported weights; returns the number of golden lines.

    Conversations with special tokens in their text, and those that were cut, are left out, because a
    consumer that renders and tokenizes them gets other ids. Raises NumericsError if none is left, or if the
    rewards differ from those in memory.
    """
    torch.set_num_threads(num_threads())
    free_memory()
    device = device_for(sum(map(math.prod, PlainModel(directory).weights.values())))
    model = RewardModel.from_pretrained(directory, dtype=torch.float32, device=device)
    tokenizer = model.encoder.tokenizer
    rewards = model.score_encoded(memory.encoded)
    memory.check_rewards(directory, rewards)
    lines, starts = [], first_responses(memory.encoded)
    for group, ids, start in zip(memory.groups, memory.encoded, starts, strict=True):
        for k, response in enumerate(group.responses):
            messages = [m._asdict() for m in (*group.prompt, Message("assistant", response))]
            ours = [*ids.prompt_ids.tolist(), *ids.response_ids[k].tolist()]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            if tokenizer(text, add_special_tokens=False)["input_ids"] != ours:
                continue
            reward = float(rewards[start + k])
            line = {"messages": messages, "text": text, "input_ids": ours, "reward": reward}
            lines.append(json.dumps(line) + "\n")
    if not lines:
        raise NumericsError(
            f"{directory}: every conversation gets other ids than in training; fix tokenizer or template"
        )
    atomic_write(directory / GOLDEN, "".join(lines))
    return len(lines)


def check_golden(directory: Path, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Largest differences of plain transformers' scores, alone and padded right and left.

    Raises NumericsError if they exceed the tolerance, or if the directory gives consumers other scores.
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
def check_policy(directory: Path, memory: InMemory) -> tuple[int, float]:
    """(number of responses whose log-probs plain transformers reproduces, largest difference from the model
    in memory as `InMemory.check_logps` measures it)."""
    torch.set_num_threads(num_threads())
    free_memory()
    stock = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False
    ).eval()
    device = device_for(sum(p.numel() for p in stock.parameters()))
    stock.to(device)
    sums = []
    for prompt, response in ((g.prompt_ids, ids) for g in memory.encoded for ids in g.response_ids):
        ids = torch.from_numpy(np.concatenate([prompt, response])).long().to(device)
        token_logps = stock(ids[None]).logits[0, :-1].log_softmax(-1)
        sums.append(float(token_logps.gather(1, ids[1:, None])[len(prompt) - 1 :].sum()))
    largest = memory.check_logps(directory, np.array(sums))
    log.info("plain transformers gives the log-probs of the model in memory within %.1e", largest)
    return len(sums), largest
