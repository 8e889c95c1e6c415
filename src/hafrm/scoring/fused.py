"""Both heads in one score: reward + factor * implicit reward per token.

A run that trains both heads fits the factor on its validation comparisons and leaves it beside the
exported models; `FusedRewardModel` scores by it. Nothing here ever sees a test set. The implicit reward
counts per token, so that the sum of a long response's log-ratios does not drown its reward.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num, Shaped
from numpy.typing import NDArray
from scipy import optimize, special

from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel
from hafrm.errors import ModelError
from hafrm.preferences import TokenizedGroup
from hafrm.scoring.loading import load_reward_head
from hafrm.scoring.scorer import ImplicitRewardModel, ImplicitRule, Scorer
from hafrm.statistics import Z95

FUSED_RULE = "fused.json"


@dataclass(frozen=True)
class FusedRule:
    """How much an implicit reward per token counts against a reward."""

    factor: float
    """0: the reward alone."""
    low: float | None = None
    """95 % interval of the factor; None where validation leaves that end open."""
    high: float | None = None
    num: int = 0
    """Comparisons that it was fitted on."""
    note: str = ""
    """Why validation cannot tell the factor, or cannot tell it from 0; empty where it can."""

    def __str__(self) -> str:
        low, high = ("?" if end is None else f"{end:.3g}" for end in (self.low, self.high))
        note = f" ({self.note})" if self.note else ""
        return f"reward + {self.factor:.3g} [{low}, {high}] x implicit reward per token{note}"


def fused_scores(
    rewards: Float[np.ndarray, " responses"],
    implicit_per_token: Float[np.ndarray, " responses"],
    rule: FusedRule,
) -> Float[np.ndarray, " responses"]:
    """reward + factor * implicit reward per token, float32; linear, so margins may be given as well."""
    return (rewards + rule.factor * implicit_per_token).astype(np.float32)


def per_token(
    implicit: Float[np.ndarray, " responses"],
    lengths: Num[np.ndarray, " responses"],
    rule: ImplicitRule,
) -> Float[np.ndarray, " responses"]:
    """Implicit rewards by their responses' tokens, EOS included, unless their rule divides already."""
    return implicit if rule.per_token else (implicit / lengths).astype(np.float32)


def fit_fused(
    reward_margins: Num[np.ndarray, " comparisons"],
    implicit_margins: Num[np.ndarray, " comparisons"],
    prompts: Shaped[np.ndarray, " comparisons"] | None = None,
) -> FusedRule:
    """The factor by logistic regression of "chosen is preferred" on both margins, without intercept.

    P(chosen) = sigmoid(a * reward margin + b * implicit margin per token); the factor is b / a, at least
    0. Its interval is Fieller's, from the covariance that takes comparisons of one of `prompts` as one
    trial. Where validation cannot tell, the note says why, and where nothing can be estimated the factor
    is 0.
    """
    x = np.stack([reward_margins, implicit_margins], axis=1).astype(np.float64)
    num, scale = len(x), np.sqrt((x**2).mean(0)) if len(x) else np.zeros(2)
    if not scale.all():
        return FusedRule(0.0, num=num, note="one of the two scores never tells responses apart")
    x /= scale
    if _separable(x):
        return FusedRule(
            0.0, num=num, note="some mixture of the two is wrong about no validation comparison"
        )
    found = optimize.minimize(
        _loss,
        np.zeros(2),
        (x,),
        method="trust-exact",
        jac=_slope,
        hess=_bend,
        options={"gtol": 1e-10},
    )
    a, b = (float(each) for each in found.x / scale)
    covariance = _covariance(found.x, x, prompts) / np.outer(scale, scale)
    low, high = _fieller(a, b, covariance)
    if a <= 0:
        return FusedRule(
            0.0, num=num, note="beside the implicit reward, the reward explains nothing"
        )
    factor = max(0.0, b / a)
    if low is None or high is None:
        return FusedRule(factor, num=num, note="validation hardly tells whether the reward counts")
    note = "" if low > 0 else "validation cannot tell the factor from 0"
    return FusedRule(factor, max(0.0, low), max(0.0, high), num, note)


def _separable(x: NDArray[np.float64]) -> bool:
    """Whether all margins lie in one half-plane, so that the likelihood has no maximum."""
    angles = np.sort(np.arctan2(x[:, 1], x[:, 0])[x.any(1)])
    gaps = np.diff(np.append(angles, angles[0] + 2 * np.pi))
    return bool(gaps.max() >= np.pi - 1e-9)


def _loss(w: NDArray[np.float64], x: NDArray[np.float64]) -> float:
    return float(np.logaddexp(0.0, -(x @ w)).mean())


def _slope(w: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    slope: NDArray[np.float64] = -(special.expit(-(x @ w))[:, None] * x).mean(0)
    return slope


def _bend(w: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    p = special.expit(x @ w)
    bend: NDArray[np.float64] = (x * (p * (1 - p))[:, None]).T @ x / len(x)
    return bend


def _covariance(
    w: NDArray[np.float64], x: NDArray[np.float64], prompts: NDArray[Any] | None
) -> NDArray[np.float64]:
    """H^-1 S H^-1 of the coefficients, S from the scores' sums over each prompt (Liang and Zeger 1986)."""
    slopes = special.expit(-(x @ w))[:, None] * x
    if prompts is not None:
        _, index = np.unique(prompts, return_inverse=True)
        slopes = np.stack([np.bincount(index, weights=column) for column in slopes.T], axis=1)
    inverse = np.linalg.inv(_bend(w, x) * len(x))
    covariance: NDArray[np.float64] = inverse @ (slopes.T @ slopes) @ inverse
    return covariance


def _fieller(
    a: float, b: float, covariance: NDArray[np.float64]
) -> tuple[float | None, float | None]:
    """The 95 % interval of b / a (Fieller 1954); (None, None) where a may be 0."""
    (v_aa, v_ab), (_, v_bb) = (Z95**2 * covariance).tolist()
    # All c with (b - c a)^2 <= z^2 Var(b - c a): a quadratic in c.
    square, half, rest = a**2 - v_aa, a * b - v_ab, b**2 - v_bb
    if square <= 0:
        return None, None
    root = math.sqrt(max(0.0, half**2 - square * rest))
    return (half - root) / square, (half + root) / square


def write_fused_rule(folder: Path, rule: FusedRule) -> None:
    """Leave the rule beside `reward` and `policy`."""
    (folder / FUSED_RULE).write_text(json.dumps(asdict(rule), indent=1) + "\n")


def read_fused_rule(folder: Path) -> FusedRule:
    """The rule of a folder; raises ModelError for a damaged one."""
    file = folder / FUSED_RULE
    try:
        rule = FusedRule(**json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ModelError(f"{file} is no rule of a fused score: {error}") from error
    if not (isinstance(rule.factor, int | float) and 0 <= rule.factor < math.inf):
        raise ModelError(f"{file}: the factor is {rule.factor!r}; it must be a number >= 0")
    return rule


def find_fused(path: str | Path) -> Path | None:
    """The folder with both heads and their rule: of a run, its `model/`; None where there is none."""
    folders = (Path(path) / "model", Path(path))
    return next((folder for folder in folders if (folder / FUSED_RULE).is_file()), None)


class FusedRewardModel(Scorer):
    """Both heads of a run as one scorer; rewards and log-probs come from one forward.

    >>> rm = FusedRewardModel.from_pretrained("run")
    >>> rm.best_of("What is 2+2?", ["3", "4"]).response
    """

    def __init__(
        self,
        model: HybridModel,
        encoder: Encoder,
        *,
        rule: FusedRule,
        implicit: ImplicitRewardModel,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(model, encoder, max_tokens)
        self.model = model.eval()
        self.rule = rule
        self.implicit = implicit
        """Whose reference and rule make log-probs an implicit reward."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        reference: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        max_length: int | None = None,
        max_tokens: int | None = None,
    ) -> "FusedRewardModel":
        """Load a run folder, or its `model/`, whose method trained both heads.

        Raises ModelError where there is no rule, or a head or the reference cannot be loaded.
        """
        folder = find_fused(path)
        if folder is None:
            raise ModelError(
                f"{path} has no {FUSED_RULE}, which a run leaves in model/ when its method trains both "
                "heads (haf, grm-sft, ...); score with its reward or its policy alone"
            )
        judge = ImplicitRewardModel.from_pretrained(
            folder / "policy",
            reference=reference,
            dtype=dtype,
            device=device,
            max_length=max_length,
        )
        model = HybridModel(
            judge.policy.backbone,
            reward_head=load_reward_head(folder / "reward").to(judge.policy.device),
            policy_head=judge.policy.policy_head,
            sharing=judge.policy.sharing,
        )
        return cls(
            model,
            judge.encoder,
            rule=read_fused_rule(folder),
            implicit=judge,
            max_tokens=max_tokens,
        )

    def score_encoded(
        self, encoded: Sequence[TokenizedGroup], done: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """The fused score of every response of encoded groups, in their order.

        `done(responses, tokens)` hears of every finished row. Raises NumericsError for a score that is
        not finite.
        """
        scores = self._run(self.model, encoded, done)
        assert scores.rewards is not None
        implicit = self.implicit.judge(scores, encoded)
        return fused_scores(
            scores.rewards, per_token(implicit, scores.lengths, self.implicit.rule), self.rule
        )
