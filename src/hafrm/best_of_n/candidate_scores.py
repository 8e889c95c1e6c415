"""Scores for every candidate: by a reward model, by a policy's implicit reward, or by a known gold reward.

All candidates of a prompt are scored in one layout that holds the prompt once. A model is loaded when it is
first needed, so a finished job loads none.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hafrm.best_of_n.drawing import CHUNK
from hafrm.errors import ConfigError, DataError, NumericsError
from hafrm.preferences import Group, Message, TokenizedGroup
from hafrm.progress import OnProgress, no_progress
from hafrm.resumable import RecordFile
from hafrm.scoring.forward import first_responses
from hafrm.scoring.loading import AUTO, Placement, choose_dtype, find_heads, model_digest
from hafrm.scoring.reward_model import PolicyModel, RewardModel, read_implicit_rule

GoldReward = Callable[[Sequence[Message], str], float]
"""The true reward of a response, where it is known."""
GroupScores = NDArray[np.float64] | str
"""One score for each response of a group, or why there are none, as "reason: detail"."""


@runtime_checkable
class CandidateScorer(Protocol):
    """Anything that scores responses."""

    name: str

    def cache_key(self) -> dict[str, Any]:
        """Everything its scores depend on, except what is scored."""

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """The scores of each group's responses, in order, or why it has none."""

    def close(self) -> None:
        """Free memory; the next `score` may need it again."""


class ModelScorer:
    """A model directory or run folder, by its reward head, or by its implicit reward if it has none."""

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        max_length: int | None = None,
        place: Placement = AUTO,
        reference: str | Path | None = None,
    ) -> None:
        """Raises ModelError when there is no model at `path`."""
        self.name = name or str(path)
        self.heads = find_heads(path)
        main = self.heads.reward or self.heads.policy
        assert main is not None
        self._options: dict[str, Any] = {
            "max_length": max_length,
            "dtype": choose_dtype(main, place.dtype, place.device),
            "device": place.device,
        }
        self._reference = reference
        self._model: RewardModel | PolicyModel | None = None

    def cache_key(self) -> dict[str, Any]:
        """Everything its scores depend on."""
        options: dict[str, Any] = {
            "max_length": self._options["max_length"],
            "dtype": str(self._options["dtype"]),
        }
        if self.heads.reward is not None:
            return {**options, "reward": model_digest(self.heads.reward)}
        assert self.heads.policy is not None
        rule = read_implicit_rule(self.heads.policy)
        reference = self._reference or rule.reference
        return {
            **options,
            "policy": model_digest(self.heads.policy),
            "rule": {**asdict(rule), "reference": None},
            "reference": None if reference is None else model_digest(reference),
        }

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """The scores of each group's responses; none for a group that the template or length refuses.

        Raises NumericsError for a score that is not finite.
        """
        model = self._loaded()
        encoded = [_encode(model, group) for group in groups]
        usable = [group for group in encoded if not isinstance(group, str)]
        scores = np.asarray(model.score_encoded(usable), np.float64)
        parts = iter(np.split(scores, first_responses(usable)[1:]))
        return [group if isinstance(group, str) else next(parts) for group in encoded]

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None

    def _loaded(self) -> RewardModel | PolicyModel:
        if self._model is None:
            if self.heads.reward is not None:
                self._model = RewardModel.from_pretrained(self.heads.reward, **self._options)
            else:
                assert self.heads.policy is not None
                self._model = PolicyModel.from_pretrained(
                    self.heads.policy, reference=self._reference, **self._options
                )
        return self._model


def _encode(model: RewardModel | PolicyModel, group: Group) -> TokenizedGroup | str:
    """The group as ids, uncut, or why it cannot be scored."""
    try:
        encoded, report = model.encoder.encode([group])
    except DataError as error:
        return f"not encodable: {error}"
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
        """The gold reward of each group's responses; none where the gold reward knows no such prompt."""
        scores: list[GroupScores] = []
        for group in groups:
            try:
                rewards = [self._gold(group.prompt, response) for response in group.responses]
                scores.append(np.array(rewards, float))
            except DataError as error:
                scores.append(f"unknown prompt: {error}")
        return scores

    def close(self) -> None:
        """Nothing to free."""


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


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each model: that of name=path, else the folder that its run is called by.

    Raises ConfigError for two models of one name.
    """
    named = [_split_name(path) for path in paths]
    names = [name or _run_name(path) for name, path in named]
    if len(set(names)) < len(names):
        names = [name or path.strip("/") for name, path in named]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ConfigError(
            f"two models are called {double[0]}; give them names: first={double[0]} ..."
        )
    return dict(zip(names, (path for _, path in named), strict=True))


def _split_name(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals and name and path and "/" not in name else ("", text)


def _run_name(path: str) -> str:
    parts = [part for part in Path(path).parts if part not in ("model", "reward", ".", "/")]
    return "-".join(parts[-2:] if parts[-1:] == ["policy"] else parts[-1:]) or path


def file_name(name: str) -> str:
    """A scorer's name as the name of a file."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip(".") or "model"
