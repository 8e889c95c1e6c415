"""The mathematics of training: pure functions, one value per comparison.

Nothing here reduces, gathers, logs or knows of models: the caller weights the values and divides by the
number of comparisons in the whole optimiser step, so that packing cannot change a gradient. For the same
reason no loss reads other comparisons of the micro-batch: what depends on the whole step comes in as a
number, constant for the gradient (`hafrm.training.step.StepMeans`). Log-probs come in as sums over response
tokens (nat); everything is computed in float32, or in float64 where the inputs are.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6  # keeps NormBT's factor finite where two responses have the same state


@dataclass(frozen=True, slots=True)
class PolicyLogps:
    """What every policy loss reads: log-prob sums and token counts of both sides of each comparison."""

    chosen_logps: Float[Tensor, " comparisons"]
    rejected_logps: Float[Tensor, " comparisons"]
    chosen_counts: Int[Tensor, " comparisons"]
    """Response tokens that were summed, the EOS included; at least 1."""
    rejected_counts: Int[Tensor, " comparisons"]
    reference_chosen_logps: Float[Tensor, " comparisons"] | None = None
    reference_rejected_logps: Float[Tensor, " comparisons"] | None = None


def reward_loss(
    chosen_rewards: Float[Tensor, " comparisons"],
    rejected_rewards: Float[Tensor, " comparisons"],
    *,
    margin: Float[Tensor, " comparisons"] | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Float[Tensor, " comparisons"]:
    """Negative log-likelihood (nat) of each preference under Bradley-Terry.

    `margin` asks for chosen - rejected > margin (Llama 2, arXiv 2307.09288, Eq. 2). `label_smoothing` is
    the probability that a label is wrong; a wrong label would ask for the same margin the other way, so
    at 0.5 both sides are treated alike. `centering` pulls the sum of each pair to zero
    (arXiv 2312.09244, Eq. 2), which Bradley-Terry leaves free; TRL names it center_rewards_coefficient.
    """
    chosen, rejected = _full_precision(chosen_rewards), _full_precision(rejected_rewards)
    gap = chosen - rejected
    asked = torch.zeros_like(gap) if margin is None else _full_precision(margin)
    # HAF-RM's L_reward (arXiv 2407.04185); with the margin, Llama 2's.
    loss = _preference_nll(gap - asked, -gap - asked, label_smoothing)
    return loss + centering * (chosen + rejected) ** 2


def distance_weights(
    distances: Float[Tensor, " comparisons"], mean_distance: Float[Tensor, ""]
) -> Float[Tensor, " comparisons"]:
    """NormBT's factor on each reward loss: mean distance by own distance, constant for the gradient.

    `distances` are ||h_chosen - h_rejected|| of the states that rewards are read from. The gradient of
    Bradley-Terry by the reward head is the error times this distance, so that near pairs hardly train;
    the factor cancels it and keeps the scale of the loss (arXiv 2512.06343: mu / (||h_w - h_l|| + eps)).
    """
    return (mean_distance / (distances + EPSILON)).detach()


def sum_to_zero_loss(
    chosen_rewards: Float[Tensor, " comparisons"],
    rejected_rewards: Float[Tensor, " comparisons"],
    mean_reward: Float[Tensor, ""],
    num_comparisons: int,
) -> Float[Tensor, " comparisons"]:
    """BSR's penalty (arXiv 2505.07271): n * mean^2 over the step's 2 n rewards, a part per comparison.

    The paper squares the sum of a batch's rewards; its code (LinkedIn-XFACT/RM-Robustness) takes n times
    the squared mean, and so does this. With the mean m held constant, parts n * (2 m s - m^2), s the mean
    of a comparison's two rewards, average to n * m^2 and have its gradient.
    """
    mean, own = mean_reward.detach(), (chosen_rewards + rejected_rewards) / 2
    return num_comparisons * (2 * mean * own - mean**2)


def dpo_loss(
    batch: PolicyLogps, *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " comparisons"]:
    """Direct preference optimisation; with label smoothing, its conservative form (cDPO).

    ln 2 while the policy equals the reference. Raises ValueError without reference log-probs.
    """
    chosen, rejected = _log_ratios(batch)
    # Eq. 7 of arXiv 2305.18290; Eq. 3 of ericmitchell.ai/cdpo.pdf for label_smoothing > 0.
    gap = beta * (chosen - rejected)
    return _preference_nll(gap, -gap, label_smoothing)


def reference_free_dpo_loss(
    batch: PolicyLogps, *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " comparisons"]:
    """DPO against a uniform reference: only the policy's own log-prob sums are compared.

    GRM's "DPO-noref" regulariser (arXiv 2406.10216). Unlike DPO it does not start at ln 2, and it
    favours pushing long rejected responses down.
    """
    gap = beta * (_full_precision(batch.chosen_logps) - _full_precision(batch.rejected_logps))
    return _preference_nll(gap, -gap, label_smoothing)


def ipo_loss(batch: PolicyLogps, *, beta: float) -> Float[Tensor, " comparisons"]:
    """Identity preference optimisation on log-ratios **per token**; `beta` is the paper's tau.

    The paper writes the log-ratio of whole responses; its authors and TRL average over tokens
    (huggingface.co/blog/pref-tuning, huggingface/trl#1265), since the target is one constant for short and
    long ones. Raises ValueError without reference log-probs.
    """
    chosen, rejected = _log_ratios(batch)
    gap = chosen / batch.chosen_counts - rejected / batch.rejected_counts
    # Eq. 17 of arXiv 2310.12036.
    return (gap - 1 / (2 * beta)) ** 2


def simpo_loss(batch: PolicyLogps, *, beta: float, gamma: float) -> Float[Tensor, " comparisons"]:
    """SimPO: mean log-probs, no reference, and a target margin `gamma` in units of beta * log-prob.

    SimPO's recipes, like TRL's `simpo_gamma`, mean the same gamma; the ratio gamma/beta is what they tune.
    """
    chosen, rejected = _mean_logps(batch)
    # Eq. 6 of arXiv 2405.14734.
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(batch: PolicyLogps, *, beta: float) -> Float[Tensor, " comparisons"]:
    """Mean negative log-prob of the chosen response plus `beta` (the paper's lambda) times the odds ratio.

    The likelihoods inside the odds are geometric means over tokens. The SFT term reads response tokens
    only; the authors' and TRL's trainers also train on the prompt there.
    """
    chosen, rejected = _mean_logps(batch)
    # Eq. 4 of arXiv 2403.07691, odds = p / (1 - p), in logarithms.
    log_odds_ratio = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    # Eq. 6 and 7.
    return -chosen - beta * F.logsigmoid(log_odds_ratio)


def kto_loss(batch: PolicyLogps, *, beta: float) -> Float[Tensor, " comparisons"]:
    """KTO over pairs: the mean of its desirable and undesirable losses, reference point z0 = 0.

    The paper estimates z0 >= 0 from mismatched pairs of the micro-batch: another forward, and a loss that
    depends on packing. Zero is the estimate's floor and start; the loss is then half of APO-zero (arXiv
    2408.06266, Eq. 7). Raises ValueError without reference log-probs.
    """
    chosen, rejected = _log_ratios(batch)
    # Eq. 7 of arXiv 2402.01306 with lambda_D = lambda_U = 1: 1 - sigmoid(x) = sigmoid(-x).
    return (torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)) / 2


def sft_loss(batch: PolicyLogps) -> Float[Tensor, " comparisons"]:
    """Mean negative log-prob (nat per token) of the chosen response."""
    chosen, _ = _mean_logps(batch)
    return -chosen


def sft_logsigmoid_loss(batch: PolicyLogps, *, beta: float) -> Float[Tensor, " comparisons"]:
    """GRM's default regulariser: -log sigmoid(beta * log-prob sum of the chosen response).

    The gradient vanishes for responses that are likely already; for the usual, unlikely ones it is SFT
    with gradient `beta` per nat (GRM, arXiv 2406.10216).
    """
    return -F.logsigmoid(beta * _full_precision(batch.chosen_logps))


def implicit_rewards(
    policy_logps: Float[Tensor, " responses"],
    reference_logps: Float[Tensor, " responses"] | None,
    beta: float,
    counts: Int[Tensor, " responses"] | None = None,
) -> Float[Tensor, " responses"]:
    """beta * (log pi - log pi_ref) of each response: what DPO scores with (arXiv 2305.18290, Eq. 5).

    Without reference, beta * log pi. With `counts`, per token instead of summed.
    """
    logps = _full_precision(policy_logps)
    if reference_logps is not None:
        logps = logps - _full_precision(reference_logps)
    return beta * (logps if counts is None else logps / counts)


def _preference_nll(
    gap: Float[Tensor, " comparisons"],
    flipped_gap: Float[Tensor, " comparisons"],
    label_smoothing: float,
) -> Float[Tensor, " comparisons"]:
    """-log sigmoid(gap), with weight `label_smoothing` on the other label."""
    right, wrong = -F.logsigmoid(gap), -F.logsigmoid(flipped_gap)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def _log_ratios(
    batch: PolicyLogps,
) -> tuple[Float[Tensor, " comparisons"], Float[Tensor, " comparisons"]]:
    """log pi - log pi_ref of the chosen and the rejected responses, summed over tokens."""
    if batch.reference_chosen_logps is None or batch.reference_rejected_logps is None:
        raise ValueError(
            "this policy loss compares with a reference, but reference_chosen_logps or "
            "reference_rejected_logps is None: compute the reference log-probs first, or take a "
            "reference-free loss (simpo, orpo, sft, dpo-noref)"
        )
    chosen = _full_precision(batch.chosen_logps) - _full_precision(batch.reference_chosen_logps)
    rejected = _full_precision(batch.rejected_logps) - _full_precision(
        batch.reference_rejected_logps
    )
    return chosen, rejected


def _mean_logps(
    batch: PolicyLogps,
) -> tuple[Float[Tensor, " comparisons"], Float[Tensor, " comparisons"]]:
    """Log-probs per token of the chosen and the rejected responses."""
    return (
        _full_precision(batch.chosen_logps) / batch.chosen_counts,
        _full_precision(batch.rejected_logps) / batch.rejected_counts,
    )


def _log1mexp(logp: Float[Tensor, " comparisons"]) -> Float[Tensor, " comparisons"]:
    """log(1 - exp(logp)) for logp <= 0, exact near both ends (Maechler 2012, Eq. 7).

    A certain response (logp = 0) would have infinite odds; it is taken as one rounding short of certain.
    """
    # So both branches stay finite: where() multiplies the unused branch's gradient by zero, and zero
    # times infinity is NaN.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near, far = torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp))
    return torch.where(logp > -math.log(2), near, far)


def _full_precision(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The values in float32, or float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
