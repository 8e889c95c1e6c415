"""Scores for every candidate: by a reward model, by a policy's implicit reward, or by a known gold reward.

All candidates of a prompt are scored once, from one layout in which the prompt stands once. A model is
loaded when it is first needed, so a job that was finished before loads none.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hafrm.alignment.generate import CHUNK, Done
from hafrm.alignment.journal import Journal
from hafrm.data.encoding import EncodedGroup
from hafrm.data.groups import Group, Message
from hafrm.errors import ConfigError, DataError, NumericsError
from hafrm.evaluation.evaluate import find_heads
from hafrm.scoring.forward import first_responses
from hafrm.scoring.loading import AUTO, Placement, choose_dtype, model_digest
from hafrm.scoring.scorer import ImplicitRewardModel, RewardModel, read_implicit_rule

Gold = Callable[[Sequence[Message], str], float]
"""The true reward of a response, where it is known."""
Scores = NDArray[np.float64] | str
"""One score for each response of a group, or why there are none, as "reason: detail"."""


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores responses."""

    name: str

    def decides(self) -> dict[str, Any]:
        """All that its scores depend on, but for what is scored."""

    def score(self, groups: Sequence[Group], done: Done | None = None) -> list[Scores]:
        """The scores of each group's responses, in order, or why it has none."""

    def close(self) -> None:
        """Let go of memory; the next `score` may need it again."""


class ModelScorer:
    """A model directory or run folder, by its reward head, or by its implicit reward where it has none."""

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
        self._model: RewardModel | ImplicitRewardModel | None = None

    def decides(self) -> dict[str, Any]:
        """All that its scores depend on."""
        known: dict[str, Any] = {
            "max_length": self._options["max_length"],
            "dtype": str(self._options["dtype"]),
        }
        if self.heads.reward is not None:
            return {**known, "reward": model_digest(self.heads.reward)}
        assert self.heads.policy is not None
        rule = read_implicit_rule(self.heads.policy)
        reference = self._reference or rule.reference
        return {
            **known,
            "policy": model_digest(self.heads.policy),
            "rule": {**asdict(rule), "reference": None},
            "reference": None if reference is None else model_digest(reference),
        }

    def score(self, groups: Sequence[Group], done: Done | None = None) -> list[Scores]:
        """The scores of each group's responses; a group that the model's template or length refuses has
        none.

        Raises NumericsError for a score that is not finite.
        """
        model = self._loaded()
        encoded = [_encoded(model, group) for group in groups]
        kept = [each for each in encoded if not isinstance(each, str)]
        scores = np.asarray(model.score_encoded(kept, done), np.float64)
        parts = iter(np.split(scores, first_responses(kept)[1:]))
        return [each if isinstance(each, str) else next(parts) for each in encoded]

    def close(self) -> None:
        """Let go of the model's memory."""
        self._model = None

    def _loaded(self) -> RewardModel | ImplicitRewardModel:
        if self._model is None:
            if self.heads.reward is not None:
                self._model = RewardModel.from_pretrained(self.heads.reward, **self._options)
            else:
                assert self.heads.policy is not None
                self._model = ImplicitRewardModel.from_pretrained(
                    self.heads.policy, reference=self._reference, **self._options
                )
        return self._model


def _encoded(model: RewardModel | ImplicitRewardModel, group: Group) -> EncodedGroup | str:
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

    def __init__(self, name: str, gold: Gold) -> None:
        self.name, self._gold = name, gold

    def decides(self) -> dict[str, Any]:
        """All that its scores depend on."""
        return {"gold": self.name}

    def score(self, groups: Sequence[Group], done: Done | None = None) -> list[Scores]:
        """The gold reward of each group's responses; none where the gold reward knows no such prompt."""
        scores: list[Scores] = []
        for group in groups:
            try:
                scores.append(
                    np.array([self._gold(group.prompt, r) for r in group.responses], float)
                )
            except DataError as error:
                scores.append(f"unknown prompt: {error}")
            if done is not None:
                done(len(group.responses), 0)
        return scores

    def close(self) -> None:
        """Nothing to let go of."""


def score_all(
    scorer: Scorer, groups: Sequence[Group], journal: Journal, done: Done | None = None
) -> list[Scores]:
    """The scores of all groups, in order; `journal` gets those of every chunk, and keeps them.

    Raises NumericsError for a score that is not finite.
    """
    left = [group for group in groups if group.id not in journal.records]
    for start in range(0, len(left), CHUNK):
        chunk = left[start : start + CHUNK]
        scores = scorer.score(chunk, done)
        journal.add([_record(scorer, group, s) for group, s in zip(chunk, scores, strict=True)])
    found = (journal.records[group.id] for group in groups)
    return [r["error"] if "error" in r else np.array(r["scores"], np.float64) for r in found]


def _record(scorer: Scorer, group: Group, scores: Scores) -> dict[str, Any]:
    if isinstance(scores, str):
        return {"id": group.id, "error": scores}
    if not np.isfinite(scores).all():
        raise NumericsError(f"{scorer.name} gives {group.id} a score that is not finite")
    return {"id": group.id, "scores": scores.tolist()}


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each model: what was given as name=path, else the folder that its run is called by.

    Raises ConfigError for two models of one name.
    """
    named = [_split_name(given) for given in paths]
    names = [name or _run_name(path) for name, path in named]
    if len(set(names)) < len(names):
        names = [name or path.strip("/") for name, path in named]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ConfigError(
            f"two models are called {double[0]}; name them apart: first={double[0]} ..."
        )
    return dict(zip(names, (path for _, path in named), strict=True))


def _split_name(given: str) -> tuple[str, str]:
    name, equals, path = given.partition("=")
    return (name, path) if equals and name and path and "/" not in name else ("", given)


def _run_name(path: str) -> str:
    parts = [part for part in Path(path).parts if part not in ("model", "reward", ".", "/")]
    return "-".join(parts[-2:] if parts[-1:] == ["policy"] else parts[-1:]) or path


def file_name(name: str) -> str:
    """A scorer's name as the name of a file."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip(".") or "model"
