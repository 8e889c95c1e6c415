"""Candidates drawn from a policy until there are enough of them, or draws have run out.

Distinct candidates are asked for in rounds, with a bounded number of draws for each prompt. Prompts are
taken in chunks whose draws depend on the chunk alone, so that a killed job resumes to the very candidates
that it would have got.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from hafrm.best_of_n.candidates import (
    Candidates,
    candidates_digest,
    candidates_of,
    check_num_candidates,
    is_usable_text,
    read_candidates,
)
from hafrm.data.values import Refusal
from hafrm.errors import ConfigError
from hafrm.preferences import Group, prompt_key
from hafrm.progress import OnProgress, no_progress
from hafrm.resumable import RecordFile, ResumableFolder

Gather = Callable[[ResumableFolder, OnProgress], list[Candidates]]
"""Where the candidates of a job come from."""
CHUNK = 64
"""Prompts whose work a kill can cost."""


@dataclass(frozen=True)
class Drawing:
    """How many candidates are drawn for each prompt."""

    num: int
    max_draws: int | None = None
    """None: twice as many as candidates, as in the paper's protocol."""
    repeats: bool = False
    """Keep repeated draws, so that candidates are independent samples of the policy."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_num_candidates(self.num)
        if self.max_draws is not None and self.max_draws < self.num:
            raise ConfigError(
                f"draw.max_draws must be {self.num} (-n) or more, got {self.max_draws}"
            )
        if self.seed < 0:
            raise ConfigError(f"--seed must be 0 or more, got {self.seed}")

    @property
    def limit(self) -> int:
        """Draws for one prompt at most."""
        return 2 * self.num if self.max_draws is None else self.max_draws


class DrawRound(NamedTuple):
    """Which draws these are; the same round gives the same draws."""

    seed: int
    chunk: int
    num_before: int
    """Draws made for these prompts before."""


class Draw(NamedTuple):
    """One response that a policy wrote."""

    text: str
    ended: bool
    """The policy ended by itself, not at the token limit."""


@runtime_checkable
class SamplingPolicy(Protocol):
    """Anything that writes responses."""

    def cache_key(self) -> dict[str, Any]:
        """Everything its responses depend on, except the prompt and the round."""

    def write(
        self, prompts: Sequence[Group], num: int, draw_round: DrawRound
    ) -> list[list[Draw] | Refusal]:
        """For each prompt `num` draws, or why there are none."""

    def close(self) -> None:
        """Free memory; the next `write` may need it again."""


@dataclass
class _Draws:
    """What has been drawn for one prompt so far."""

    prompt: Group
    texts: list[str] = field(default_factory=list)
    num_draws: int = 0
    num_cut: int = 0
    num_blank: int = 0
    error: str | None = None

    def add(self, draws: list[Draw] | Refusal, drawing: Drawing) -> None:
        if isinstance(draws, Refusal):
            self.error = f"{draws.reason}: {draws.detail}"
            return
        for text, ended in draws:
            usable = is_usable_text(text)
            self.num_draws += 1
            self.num_cut += not ended
            self.num_blank += not usable
            is_new = drawing.repeats or text not in self.texts
            if usable and is_new and len(self.texts) < drawing.num:
                self.texts.append(text)

    def to_candidates(self) -> Candidates:
        return replace(
            candidates_of(self.prompt, self.texts),
            num_draws=self.num_draws,
            num_cut=self.num_cut,
            num_blank=self.num_blank,
            error=self.error,
        )


def draw_candidates(
    policy: SamplingPolicy,
    prompts: Sequence[Group],
    drawing: Drawing,
    file: RecordFile,
    on_progress: OnProgress = no_progress,
) -> list[Candidates]:
    """The candidates for all prompts, in order; each chunk is added to `file` when it is drawn."""
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        if not all(prompt.id in file.records for prompt in chunk):
            records = [d.to_candidates().to_record() for d in _draw(policy, chunk, drawing, start)]
            # a kill may have cut a chunk in two; what stands in the file is not written again
            file.add([record for record in records if record["id"] not in file.records])
        on_progress(start + len(chunk), len(prompts))
    return [Candidates.from_record(file.records[prompt.id]) for prompt in prompts]


def _draw(
    policy: SamplingPolicy, chunk: Sequence[Group], drawing: Drawing, start: int
) -> list[_Draws]:
    draws = [_Draws(prompt) for prompt in chunk]
    num_before = 0
    while num_before < drawing.limit:
        lacking = [d for d in draws if d.error is None and len(d.texts) < drawing.num]
        if not lacking:
            break
        num = min(drawing.num, drawing.limit - num_before)
        draw_round = DrawRound(drawing.seed, start, num_before)
        responses = policy.write([d.prompt for d in lacking], num, draw_round)
        for d, texts in zip(lacking, responses, strict=True):
            d.add(texts, drawing)
        num_before += num
    return draws


def drawing_key(
    policy: SamplingPolicy, prompts: Sequence[Group], drawing: Drawing
) -> dict[str, Any]:
    """Everything the candidates depend on."""
    keys = [[prompt.id, prompt_key(prompt.prompt)] for prompt in prompts]
    digest = hashlib.sha256(repr(keys).encode("utf-8", "surrogatepass")).hexdigest()
    return {
        **policy.cache_key(),
        **asdict(drawing),
        "max_draws": drawing.limit,
        "prompts": digest,
    }


def from_policy(policy: SamplingPolicy, prompts: Sequence[Group], drawing: Drawing) -> Gather:
    """Candidates that a policy writes."""

    def gather(folder: ResumableFolder, on_progress: OnProgress) -> list[Candidates]:
        file = folder.records("candidates.jsonl", drawing_key(policy, prompts, drawing))
        candidates = draw_candidates(policy, prompts, drawing, file, on_progress)
        policy.close()  # the models that score need the memory
        return candidates

    return gather


def from_files(sources: Sequence[str], num: int) -> Gather:
    """Candidates that files hold, the first `num` of each prompt."""

    def gather(folder: ResumableFolder, _: OnProgress) -> list[Candidates]:
        candidates = read_candidates(sources, num)
        key = {"candidates read": candidates_digest(candidates)}
        file = folder.records("candidates.jsonl", key)
        file.add([c.to_record() for c in candidates if c.group.id not in file.records])
        return candidates

    return gather
