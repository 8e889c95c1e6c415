"""Scores for every candidate: by a reward model, by a policy's implicit reward, or by a known gold reward.

All candidates of a prompt are scored in one layout that holds the prompt once. A model is loaded when it is
first needed, so a finished job loads none.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.best_of_n.candidates import CHUNK
from hafrm.errors import ConfigError, DataError, NumericsError
from hafrm.evaluation.heads import EvaluationOptions, load_main_head
from hafrm.preferences import Group, Message, TokenizedGroup
from hafrm.progress import OnProgress, no_progress
from hafrm.run_folder import RecordFile
from hafrm.scoring.forward import first_responses
from hafrm.scoring.loading import AUTO, Placement, choose_dtype, find_heads, model_digest
from hafrm.scoring.reward_model import Scorer, read_implicit_rule

GoldReward = Callable[[Sequence[Message], str], float]
"""The true reward of a response, where it is known."""
GroupScores = NDArray[np.float64] | str
"""One score for each response of a group, or why there are none, as "reason: detail"."""


class ModelScorer:
    """A model directory or run folder, by its reward head, or by its implicit reward if it has none."""

    def __init__(self, path: str | Path, name: str | None = None, place: Placement = AUTO) -> None:
        """Raises ModelError when there is no model at `path`."""
        self.name, self._path = name or str(path), path
        self.heads = find_heads(path)
        self._options = EvaluationOptions(dtype=place.dtype, device=place.device)
        self._model: Scorer | None = None

    def cache_key(self) -> dict[str, Any]:
        """Everything its scores depend on."""
        directory = self.heads.reward or self.heads.policy
        assert directory is not None
        key: dict[str, Any] = {
            # "auto" depends on the device, so the key holds what it becomes here
            "dtype": str(choose_dtype(directory, self._options.dtype, self._options.device)),
            "model": model_digest(directory),
        }
        if self.heads.reward is None:
            rule = read_implicit_rule(directory)
            key["rule"] = {
                **asdict(rule),
                "reference": rule.reference and model_digest(rule.reference),
            }
        return key

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """The scores of each group's responses; none for a group that the template or length refuses."""
        if self._model is None:
            self._model = load_main_head(self._path, self._options)
        encoded = [_encode(self._model, group) for group in groups]
        usable = [group for group in encoded if not isinstance(group, str)]
        scores = np.asarray(self._model.score_encoded(usable), np.float64)
        parts = iter(np.split(scores, first_responses(usable)[1:]))
        return [group if isinstance(group, str) else next(parts) for group in encoded]

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None


def _encode(model: Scorer, group: Group) -> TokenizedGroup | str:
    """The group as ids, uncut, or why it cannot be scored."""
    try:
        encoded, report = model.encoder.encode([group])
    except DataError as error:
        return f"not encodable: {error}"
    # half an answer would get a score too, and a wrong one
    if report.prompts_cut or report.responses_cut or not encoded:
        return (
            f"too long: prompt and candidate are longer than {model.encoder.lengths.max_length} tokens, "
            "which is what the model takes"
        )
    return encoded[0]


class GoldScorer:
    """A reward that is known, such as that of a made-up world."""

    def __init__(self, name: str, gold: GoldReward) -> None:
        self.name, self._gold = name, gold

    def cache_key(self) -> dict[str, Any]:
        """Everything its scores depend on."""
        return {"gold": self.name}

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """The gold reward of each group's responses; none for a prompt that it does not know."""
        scores: list[GroupScores] = []
        for group in groups:
            try:
                rewards = [self._gold(group.prompt, response) for response in group.responses]
                scores.append(np.array(rewards, float))
            except DataError as error:
                scores.append(f"unknown prompt: {error}")
        return scores


CandidateScorer = ModelScorer | GoldScorer


def score_all(
    scorer: CandidateScorer,
    groups: Sequence[Group],
    file: RecordFile,
    on_progress: OnProgress = no_progress,
) -> list[GroupScores]:
    """The scores of all groups, in order; each chunk is added to `file` when it is scored.

    Raises NumericsError for a score that is not finite.
    """
    missing = [group for group in groups if group.id not in file.records]
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        scores = scorer.score(chunk)
        file.add([_record(scorer, group, s) for group, s in zip(chunk, scores, strict=True)])
        on_progress(start + len(chunk), len(missing))
    records = (file.records[group.id] for group in groups)
    return [r["error"] if "error" in r else np.array(r["scores"], np.float64) for r in records]


def _record(scorer: CandidateScorer, group: Group, scores: GroupScores) -> dict[str, Any]:
    if isinstance(scores, str):
        return {"id": group.id, "error": scores}
    if not np.isfinite(scores).all():
        raise NumericsError(f"{scorer.name} gives {group.id} a score that is not finite")
    return {"id": group.id, "scores": scores.tolist()}


def named_models(models: Sequence[str]) -> list[tuple[str, str]]:
    """(name, path) of every PATH or NAME=PATH; a path without a name is called after its run folder."""
    named = []
    for text in models:
        name, equals, path = text.partition("=")
        if not equals or not name or "/" in name:
            name, path = _run_name(text), text
        if not path:
            raise ConfigError(
                f"{text!r} names no model; give PATH or NAME=PATH, such as haf=runs/haf"
            )
        named.append((name, path))
    return named


def _run_name(path: str) -> str:
    """runs/haf/model/reward -> haf, runs/haf/model/policy -> haf-policy."""
    parts = [part for part in Path(path).parts if part not in ("model", "reward", ".", "/")]
    return "-".join(parts[-2:] if parts[-1:] == ["policy"] else parts[-1:]) or path


def file_name(name: str) -> str:
    """A scorer's name as the name of a file."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip(".") or "model"
