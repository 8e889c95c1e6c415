"""The reference implementation of PPO: one response at a time, plain loops, stock forward, autograd.

It uses nothing of hafrm's packing, chunked log-probs or vectorised terms.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


@dataclass
class ReferenceRules:
    """What the update needs to know."""

    epochs: int
    mini_batches: int
    clip: float
    value_clip: float
    value_weight: float
    gamma: float
    lam: float
    kl_coefficient: float
    temperature: float
    learning_rate: float
    max_grad_norm: float
    eps: float


class ReferencePpo:
    """A stock causal LM, a value head, and a frozen copy of the start."""

    def __init__(self, causal: nn.Module, rules: ReferenceRules) -> None:
        self.causal = causal
        self.start = copy.deepcopy(causal)
        self.head = torch.zeros(causal.config.hidden_size, requires_grad=True)
        self.rules = rules
        trained = [p for p in causal.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [*trained, self.head], lr=rules.learning_rate, weight_decay=0.0, eps=rules.eps
        )

    def tokens(self, causal: nn.Module, prompt: list[int], response: list[int]) -> tuple:
        """Log-probs and states of the response's tokens."""
        ids = torch.tensor([prompt + response])
        out = causal(input_ids=ids, output_hidden_states=True, use_cache=False)
        logps = (out.logits[0].float() / self.rules.temperature).log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        chosen = [logps[r, t] for r, t in zip(rows, response, strict=True)]
        return torch.stack(chosen), out.hidden_states[-1][0, rows.start : rows.stop]

    def batch(
        self,
        prompts: list[list[int]],
        responses: list[list[list[int]]],
        scores: list[float],
        order: np.random.Generator,
    ) -> list[tuple[float, float]]:
        """All updates of a batch; (policy loss, value loss) of each, per token."""
        rules = self.rules
        pairs = [(p, r) for p, rs in zip(prompts, responses, strict=True) for r in rs]
        owner = [i for i, rs in enumerate(responses) for _ in rs]
        old, old_values, advantages = [], [], []
        with torch.no_grad():
            for (prompt, response), score in zip(pairs, scores, strict=True):
                logps, states = self.tokens(self.causal, prompt, response)
                reference, _ = self.tokens(self.start, prompt, response)
                values = states @ self.head
                rewards = [-rules.kl_coefficient * float(d) for d in logps - reference]
                rewards[-1] += score
                running, estimates = 0.0, []
                for t in reversed(range(len(response))):
                    after = float(values[t + 1]) if t + 1 < len(response) else 0.0
                    delta = rewards[t] + rules.gamma * after - float(values[t])
                    running = delta + rules.gamma * rules.lam * running
                    estimates.insert(0, running)
                old.append(logps)
                old_values.append(values)
                advantages.append(torch.tensor(estimates))
        returns = [a + v for a, v in zip(advantages, old_values, strict=True)]
        everything = torch.cat(advantages)
        mean, std = everything.mean(), everything.std()
        white = [(a - mean) / (std**2 + 1e-8).sqrt() for a in advantages]
        losses = []
        for _ in range(rules.epochs):
            for chosen in np.array_split(order.permutation(len(prompts)), rules.mini_batches):
                picked = [i for i in range(len(pairs)) if owner[i] in chosen]
                losses.append(self._update(picked, pairs, old, old_values, white, returns))
        return losses

    def _update(self, picked, pairs, old, old_values, white, returns) -> tuple[float, float]:
        rules = self.rules
        policy_loss = value_loss = torch.zeros(())
        num = sum(len(pairs[i][1]) for i in picked)
        for i in picked:
            logps, states = self.tokens(self.causal, *pairs[i])
            values = states @ self.head
            for t in range(len(logps)):
                ratio = (logps[t] - old[i][t]).exp()
                a = white[i][t]
                policy_loss = policy_loss - torch.min(
                    ratio * a, ratio.clamp(1 - rules.clip, 1 + rules.clip) * a
                )
                v, v_old, r = values[t], old_values[i][t], returns[i][t]
                near = torch.min(torch.max(v, v_old - rules.value_clip), v_old + rules.value_clip)
                value_loss = value_loss + 0.5 * torch.max((v - r) ** 2, (near - r) ** 2)
        loss = (policy_loss + rules.value_weight * value_loss) / num
        self.optimizer.zero_grad()
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, rules.max_grad_norm)
        self.optimizer.step()
        return float(policy_loss.detach()) / num, float(value_loss.detach()) / num
