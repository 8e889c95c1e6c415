"""The losses: pure functions with one value per comparison, in float32 (float64 for float64 inputs).

No loss reads other comparisons of the micro-batch, so packing cannot change a gradient; what depends on
the whole step is passed in as a constant (`hafrm.training.step.StepMeans`).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6  # keeps NormBT's factor finite if two responses have the same state
PerComparison = Float[Tensor, " comparisons"]


@dataclass(frozen=True, slots=True)
class PolicyLogps:
    """What every policy loss reads: log-prob sums (nat) and token counts of both sides of a comparison."""

    chosen_logps: PerComparison
    rejected_logps: PerComparison
    chosen_counts: Int[Tensor, " comparisons"]  # response tokens, the EOS included
    rejected_counts: Int[Tensor, " comparisons"]
    reference_chosen_logps: PerComparison | None = None
    reference_rejected_logps: PerComparison | None = None

    def log_ratios(self) -> tuple[PerComparison, PerComparison]:
        """log pi - log pi_ref of the chosen and the rejected responses, summed over tokens."""
        assert self.reference_chosen_logps is not None
        assert self.reference_rejected_logps is not None
        chosen, rejected = _in_float32(self.chosen_logps), _in_float32(self.rejected_logps)
        chosen = chosen - _in_float32(self.reference_chosen_logps)
        return chosen, rejected - _in_float32(self.reference_rejected_logps)

    def mean_logps(self) -> tuple[PerComparison, PerComparison]:
        chosen, rejected = _in_float32(self.chosen_logps), _in_float32(self.rejected_logps)
        return chosen / self.chosen_counts, rejected / self.rejected_counts


def reward_loss(
    chosen_rewards: PerComparison,
    rejected_rewards: PerComparison,
    *,
    margin: PerComparison | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> PerComparison:
    """Negative log-likelihood (nat) of each preference under Bradley-Terry.

    `margin` asks for chosen - rejected > margin (Llama 2, arXiv 2307.09288, Eq. 2). `label_smoothing` is
    the probability that a label is wrong; a wrong label would ask for the same margin the other way.
    `centering` pulls the sum of a pair to zero (arXiv 2312.09244, Eq. 2), which Bradley-Terry leaves free.
    """
    chosen, rejected = _in_float32(chosen_rewards), _in_float32(rejected_rewards)
    gap = chosen - rejected
    asked = torch.zeros_like(gap) if margin is None else _in_float32(margin)
    # HAF-RM's L_reward (arXiv 2407.04185); with the margin, Llama 2's.
    loss = _preference_nll(gap - asked, -gap - asked, label_smoothing)
    return loss + centering * (chosen + rejected) ** 2


def distance_weights(distances: PerComparison, mean_distance: Float[Tensor, ""]) -> PerComparison:
    """NormBT's factor on each reward loss, constant for the gradient: mean distance / own distance.

    The Bradley-Terry gradient of the reward head is the error times ||h_chosen - h_rejected||, so pairs
    of similar states hardly train; the factor cancels that (arXiv 2512.06343: mu / (||h_w - h_l|| + eps)).
    """
    return (mean_distance / (distances + EPSILON)).detach()


def sum_to_zero_loss(
    chosen_rewards: PerComparison,
    rejected_rewards: PerComparison,
    mean_reward: Float[Tensor, ""],
    num_comparisons: int,
) -> PerComparison:
    """BSR's penalty (arXiv 2505.07271): n * mean^2 over the step's 2 n rewards, as one part per comparison.

    As in its code (LinkedIn-XFACT/RM-Robustness); the paper squares the sum. With the mean m held constant,
    parts n * (2 m s - m^2), s the mean of a comparison's rewards, average to n * m^2 and have its gradient.
    """
    mean, own = mean_reward.detach(), (chosen_rewards + rejected_rewards) / 2
    return num_comparisons * (2 * mean * own - mean**2)


def dpo_loss(batch: PolicyLogps, *, beta: float, label_smoothing: float = 0.0) -> PerComparison:
    """Direct preference optimisation, and cDPO; ln 2 while the policy equals the reference."""
    chosen, rejected = batch.log_ratios()
    # Eq. 7 of arXiv 2305.18290; Eq. 3 of ericmitchell.ai/cdpo.pdf for label_smoothing > 0.
    gap = beta * (chosen - rejected)
    return _preference_nll(gap, -gap, label_smoothing)


def reference_free_dpo_loss(
    batch: PolicyLogps, *, beta: float, label_smoothing: float = 0.0
) -> PerComparison:
    """GRM's "DPO-noref" (arXiv 2406.10216): DPO against a uniform reference; does not start at ln 2."""
    gap = beta * (_in_float32(batch.chosen_logps) - _in_float32(batch.rejected_logps))
    return _preference_nll(gap, -gap, label_smoothing)


def ipo_loss(batch: PolicyLogps, *, beta: float) -> PerComparison:
    """Identity preference optimisation; `beta` is the paper's tau. Log-ratios are **per token**, as its
    authors and TRL compute them (huggingface/trl#1265): the target is one constant for all lengths."""
    chosen, rejected = batch.log_ratios()
    gap = chosen / batch.chosen_counts - rejected / batch.rejected_counts
    # Eq. 17 of arXiv 2310.12036.
    return (gap - 1 / (2 * beta)) ** 2


def simpo_loss(batch: PolicyLogps, *, beta: float, gamma: float) -> PerComparison:
    """SimPO: mean log-probs, no reference, and a target margin `gamma` in units of beta * log-prob."""
    chosen, rejected = batch.mean_logps()
    # Eq. 6 of arXiv 2405.14734.
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(batch: PolicyLogps, *, beta: float) -> PerComparison:
    """Mean negative log-prob of the chosen response plus `beta` (the paper's lambda) times the odds ratio.

    Likelihoods are geometric means over response tokens; TRL's SFT term also trains on the prompt.
    """
    chosen, rejected = batch.mean_logps()
    # Eq. 4 of arXiv 2403.07691, odds = p / (1 - p), in logarithms.
    log_odds_ratio = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    # Eq. 6 and 7.
    return -chosen - beta * F.logsigmoid(log_odds_ratio)


def kto_loss(batch: PolicyLogps, *, beta: float) -> PerComparison:
    """KTO on pairs: the mean of its desirable and undesirable losses, with reference point z0 = 0.

    The paper's estimate of z0 >= 0 would depend on packing; at its floor, 0, the loss is half of APO-zero
    (arXiv 2408.06266, Eq. 7).
    """
    chosen, rejected = batch.log_ratios()
    # Eq. 7 of arXiv 2402.01306 with lambda_D = lambda_U = 1: 1 - sigmoid(x) = sigmoid(-x).
    return (torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)) / 2


def sft_loss(batch: PolicyLogps) -> PerComparison:
    """Mean negative log-prob (nat per token) of the chosen response."""
    return -batch.mean_logps()[0]


def dpo_likelihood_loss(
    batch: PolicyLogps, *, beta: float, label_smoothing: float = 0.0
) -> PerComparison:
    """DPO plus -log of the sum of both responses' length-normalised probabilities, because DPO alone lets
    them fall; after the abstract of ICML 2026 poster 60715, with weight 1."""
    likelihood = torch.logaddexp(*batch.mean_logps())
    return dpo_loss(batch, beta=beta, label_smoothing=label_smoothing) - likelihood


def sft_logsigmoid_loss(batch: PolicyLogps, *, beta: float) -> PerComparison:
    """GRM's default regulariser (arXiv 2406.10216): -log sigmoid(beta * log-prob sum of the chosen)."""
    return -F.logsigmoid(beta * _in_float32(batch.chosen_logps))


def _preference_nll(
    gap: PerComparison, flipped_gap: PerComparison, label_smoothing: float
) -> PerComparison:
    """-log sigmoid(gap), with weight `label_smoothing` on the opposite label."""
    right, wrong = -F.logsigmoid(gap), -F.logsigmoid(flipped_gap)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def _log1mexp(logp: PerComparison) -> PerComparison:
    """log(1 - exp(logp)) for logp <= 0, exact near both ends (Maechler 2012, Eq. 7)."""
    # A certain response (logp = 0) has infinite odds: treat it as one rounding short of certain, or
    # where() would multiply the unused branch's infinite gradient by zero, which is NaN.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near, far = torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp))
    return torch.where(logp > -math.log(2), near, far)


def _in_float32(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return values.to(torch.promote_types(values.dtype, torch.float32))
