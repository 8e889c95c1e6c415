"""The hybrid step as one would first write it, and one technique after another added to it.

Pairs are padded to the longest of their micro-batch and run whole. Each rung of the ladder switches one
technique on, so that a row of the ablation says what that technique is worth; the last rungs are hafrm's
own step and live in contenders.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from workload import Workload

from hafrm.engine.logprobs import token_logprobs
from hafrm.engine.model import hidden_size, new_reward_head, split_causal_lm
from hafrm.recipe import LoraSection
from hafrm.training.setup import inject_lora

ALPHA, BETA = 0.2, 0.1
"""HAF's weights."""


def pairs_of(w: Workload, checkpointing: bool) -> int:
    """Pairs of a padded micro-batch: TRL's default, and half as many where a GPU keeps all activations."""
    return 4 if w.device.type == "cuda" and not checkpointing else 8


@dataclass(frozen=True)
class Rung:
    """Which techniques a padded hybrid step uses."""

    checkpointing: bool = True
    """TRL's default."""
    cached_reference: bool = False
    one_forward: bool = False
    chunked: bool = False
    """Log-probs of response tokens only, in chunks; else full logits of all positions."""


class PaddedHybrid:
    """A causal LM with a reward head beside it, and the frozen model where it is not cached."""

    def __init__(self, w: Workload, rung: Rung, dtype: torch.dtype) -> None:
        self.rung = rung
        causal = w.causal_lm(dtype)
        if w.lora_rank:
            causal.requires_grad_(False)
            inject_lora(LoraSection(rank=w.lora_rank), causal.base_model)
        if rung.checkpointing:
            causal.gradient_checkpointing_enable({"use_reentrant": False})
            causal.train()
        self.backbone, self.policy_head = split_causal_lm(causal)
        self.reward_head = new_reward_head(hidden_size(w.config)).to(w.device)
        self.reference: Any = None
        if not rung.cached_reference:
            self.reference = w.causal_lm(dtype).eval().requires_grad_(False)
        trained = [*causal.parameters(), *self.reward_head.parameters()]
        self.parameters = [p for p in trained if p.requires_grad]

    @property
    def terms(self) -> list[Callable[["Padded"], Tensor]]:
        """The losses per pair to run backward one after another, each with its own forward."""
        if self.rung.one_forward:
            return [self._joint]
        return [
            lambda batch: self._reward(self._hidden(self.backbone, batch), batch),
            lambda batch: ALPHA * self._policy(self._hidden(self.backbone, batch), batch),
        ]

    def _joint(self, batch: "Padded") -> Tensor:
        hidden = self._hidden(self.backbone, batch)
        return self._reward(hidden, batch) + ALPHA * self._policy(hidden, batch)

    @staticmethod
    def _hidden(backbone: Any, batch: "Padded") -> Tensor:
        return backbone(
            input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state

    def _reward(self, hidden: Tensor, batch: "Padded") -> Tensor:
        last = batch.mask.sum(1) - 1
        rewards = self.reward_head(
            hidden[torch.arange(len(last), device=last.device), last].float()
        )
        chosen, rejected = rewards[:, 0].chunk(2)
        return -F.logsigmoid(chosen - rejected)

    def _policy(self, hidden: Tensor, batch: "Padded") -> Tensor:
        logps = self._logps(hidden, self.policy_head, batch)
        reference = batch.reference
        if self.reference is not None:
            with torch.no_grad():
                frozen = self._hidden(self.reference.base_model, batch)
                reference = self._logps(frozen, self.reference.get_output_embeddings(), batch)
        chosen, rejected = (logps - reference).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected))

    def _logps(self, hidden: Tensor, head: nn.Linear, batch: "Padded") -> Tensor:
        scored = batch.scored[:, 1:]
        if self.rung.chunked:
            targets = batch.ids[:, 1:][scored]
            tokens = token_logprobs(hidden[:, :-1][scored], head.weight, targets, bias=head.bias)
            row = scored.nonzero()[:, 0]
            return torch.zeros(len(batch.ids), device=tokens.device).index_add(0, row, tokens)
        logits = head(hidden).float()[:, :-1]
        tokens = logits.log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
        return (tokens * scored).sum(1)


@dataclass(frozen=True)
class Padded:
    """Pairs as right-padded sequences, the chosen ones first."""

    ids: Tensor
    mask: Tensor
    scored: Tensor
    """True for response tokens."""
    reference: Tensor | None


def padded_batches(w: Workload, references: Any, size: int) -> list[Padded]:
    """The workload's comparisons in order, in micro-batches of `size` pairs."""
    sides: list[tuple[list[Any], list[Any]]] = [
        ([g.prompt_ids, g.response_ids[c.chosen]], [g.prompt_ids, g.response_ids[c.rejected]])
        for g in w.encoded
        for c in g.comparisons
    ][: w.num_comparisons]
    places = [
        (int(first) + c.chosen, int(first) + c.rejected)
        for g, first in zip(
            w.encoded, references.first if references else [0] * len(w.encoded), strict=True
        )
        for c in g.comparisons
    ]
    batches = []
    for start in range(0, len(sides), size):
        pairs = sides[start : start + size]
        sequences = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        reference = None
        if references is not None:
            order = list(zip(*places[start : start + size], strict=True))
            reference = torch.from_numpy(references.logps[[*order[0], *order[1]]]).to(w.device)
        batches.append(_pad(sequences, reference, w))
    return batches


def _pad(sequences: Sequence[Any], reference: Tensor | None, w: Workload) -> Padded:
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), longest), w.encoder.pad_id)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    scored = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[i, : len(prompt)] = torch.from_numpy(prompt).long()
        ids[i, len(prompt) : end] = torch.from_numpy(response).long()
        mask[i, :end] = 1
        scored[i, len(prompt) : end] = True
    return Padded(ids.to(w.device), mask.to(w.device), scored.to(w.device), reference)
