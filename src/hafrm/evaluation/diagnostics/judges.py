"""Models run on the comparisons: their margins and their last tokens' hidden states."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from numpy import ndarray

from hafrm.data.encoding import EncodedGroup
from hafrm.engine.model import HybridModel, hidden_size
from hafrm.errors import ModelError
from hafrm.evaluation.diagnostics.decided import Decided
from hafrm.evaluation.evaluate import Heads, load_judge
from hafrm.scoring.loading import AUTO, Placement, load_policy
from hafrm.scoring.scorer import ImplicitRewardModel, RewardModel
from hafrm.scoring.states import last_states, some_responses

log = logging.getLogger("hafrm")

NUM_STATES = 2048
"""Responses whose hidden states are looked at; drawn with STATES_SEED, the same for every model."""
STATES_SEED = 0

Done = Callable[[int, int], None]


@dataclass(frozen=True)
class Judged:
    """What one model makes of the comparisons."""

    name: str
    scored_with: str
    """"reward" or "implicit reward"."""
    margins: Float[ndarray, " comparisons"]
    states: Float[ndarray, "responses hidden"]
    """Of some of the responses, the same ones for all models."""


def judge(
    path: str | Path,
    decided: Decided,
    *,
    reference: str | Path | None = None,
    max_length: int | None = None,
    place: Placement = AUTO,
    done: Done | None = None,
) -> tuple[Judged, list[EncodedGroup]]:
    """The model's main head on the comparisons, and their ids as it sees them."""
    log.info("scoring with %s", path)
    model = load_judge(path, reference=reference, max_length=max_length, place=place)
    encoded, _ = model.encoder.encode(decided.groups)
    margins = decided.margins(model.score_encoded(encoded, done))
    if isinstance(model, RewardModel):
        head, network = "reward", model.model
    else:
        head, network = "implicit reward", model.policy
    return Judged(str(path), head, margins, _states(network, encoded)), encoded


def implicit_margins(
    heads: Heads,
    decided: Decided,
    *,
    reference: str | Path | None = None,
    max_length: int | None = None,
    place: Placement = AUTO,
    done: Done | None = None,
) -> Float[ndarray, " comparisons"] | None:
    """Margins of the policy's implicit reward, where there is a policy beside a reward head."""
    if heads.reward is None or heads.policy is None:
        return None
    log.info("scoring with the policy %s", heads.policy)
    options = place.options(max_length)
    model = ImplicitRewardModel.from_pretrained(heads.policy, reference=reference, **options)
    encoded, _ = model.encoder.encode(decided.groups)
    return decided.margins(model.score_encoded(encoded, done))


def base_states(
    path: str | Path,
    encoded: Sequence[EncodedGroup],
    judged: Judged,
    *,
    place: Placement = AUTO,
) -> Float[ndarray, "responses hidden"]:
    """The base model's states of the same ids; raises ModelError for one of another shape."""
    log.info("hidden states of %s", path)
    model = load_policy(path, dtype=place.dtype, device=place.device)
    config = model.backbone.config
    size, vocabulary = hidden_size(config), config.get_text_config().vocab_size
    largest = max(int(ids.max()) for g in encoded for ids in (g.prompt_ids, *g.response_ids))
    if size != judged.states.shape[1] or largest >= vocabulary:
        raise ModelError(
            f"the base model {path} has hidden size {size} and a vocabulary of {vocabulary}, which do not "
            f"fit {judged.name} (hidden size {judged.states.shape[1]}, ids up to {largest}); give the "
            "checkpoint that it was trained from (--base)"
        )
    return _states(model, encoded)


def _states(
    model: HybridModel, encoded: Sequence[EncodedGroup]
) -> Float[ndarray, "responses hidden"]:
    return last_states(model, some_responses(encoded, NUM_STATES, seed=STATES_SEED))
