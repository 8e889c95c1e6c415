"""Scores for every candidate: by a reward model, a policy's implicit reward, or a known gold reward."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hafrm.errors import ConfigError, DataError, NumericsError
from hafrm.evaluation.heads import EvaluationOptions, load_main_head
from hafrm.preferences import Group, Message, TokenizedGroup
from hafrm.progress import show_progress
from hafrm.scoring.forward import first_responses
from hafrm.scoring.loading import Placement
from hafrm.scoring.reward_model import Scorer

GoldReward = Callable[[Sequence[Message], str], float]
"""Computes the true reward of a response, if that is known."""
GroupScores = NDArray[np.float64] | str
"""One score for each response of a group, or why there are none, as "reason: detail"."""


def score_by_model(path: str, groups: Sequence[Group], place: Placement) -> list[GroupScores]:
    """The scores of a model's main head; none for a group that the template or length refuses."""
    model = load_main_head(path, EvaluationOptions(dtype=place.dtype, device=place.device))
    encoded = [_encode(model, group) for group in groups]
    usable = [group for group in encoded if not isinstance(group, str)]
    with show_progress(f"scores by {path}") as on_progress:
        scores = np.asarray(model.score_encoded(usable, on_progress), np.float64)
    parts = iter(np.split(scores, first_responses(usable)[1:]))
    return [group if isinstance(group, str) else next(parts) for group in encoded]


def _encode(model: Scorer, group: Group) -> TokenizedGroup | str:
    """The group as ids, uncut, or why it cannot be scored."""
    encoded, report = model.encoder.encode([group])
    if report.refused:
        return f"not encodable: {report.refused[0]}"
    # half an answer would also get a score, but a wrong one
    if report.prompts_cut or report.responses_cut or not encoded:
        limit = model.encoder.lengths.max_length
        return f"too long: prompt and candidate have more than {limit} tokens, the model's limit"
    return encoded[0]


def score_by_gold(gold: GoldReward, groups: Sequence[Group]) -> list[GroupScores]:
    """The gold reward of each group's responses; none for a prompt on which it raises DataError."""
    scores: list[GroupScores] = []
    for group in groups:
        try:
            rewards = np.array([gold(group.prompt, text) for text in group.responses], np.float64)
        except DataError as error:
            scores.append(f"unknown prompt: {error}")
            continue
        if not np.isfinite(rewards).all():
            raise NumericsError(f"the gold reward of {group.id} is not finite")
        scores.append(rewards)
    return scores


def named_models(models: Sequence[str]) -> list[tuple[str, str]]:
    """(name, path) of every PATH or NAME=PATH; a path without a name is named after its run folder."""
    named = []
    for text in models:
        name, equals, path = text.partition("=")
        if not equals or not name or "/" in name:
            # runs/haf/model/reward -> haf, runs/haf/model/policy -> haf-policy
            parts = [p for p in Path(text).parts if p not in ("model", "reward", ".", "/")]
            name = "-".join(parts[-2:] if parts[-1:] == ["policy"] else parts[-1:]) or text
            path = text
        if not path:
            raise ConfigError(f"{text!r} names no model; give PATH or NAME=PATH, such as a=runs/a")
        named.append((name, path))
    return named
