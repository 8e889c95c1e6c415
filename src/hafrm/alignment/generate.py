"""Candidates for prompts, drawn from a policy until there are enough of them, or draws have run out.

Distinct candidates are asked for in rounds, with a bounded number of draws for each prompt; who has fewer
then, keeps fewer, and is counted. Prompts are taken in chunks whose draws depend on the chunk alone, so
that a killed job goes on to the very candidates that it would have got.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from hafrm.alignment.candidates import Candidates, candidates_of, check_num, is_usable
from hafrm.alignment.journal import Journal
from hafrm.data.values import Refusal
from hafrm.errors import ConfigError
from hafrm.preferences import Group, prompt_key

CHUNK = 64
"""Prompts that a kill can cost."""
Done = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawing:
    """How many candidates are drawn for each prompt."""

    num: int
    tries: int | None = None
    """Draws at most; None: twice as many as candidates, as in the paper's protocol."""
    repeats: bool = False
    """Keep repeated draws, so that candidates are independent samples of the policy."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_num(self.num)
        if self.tries is not None and self.tries < self.num:
            raise ConfigError(f"--tries must be {self.num} (-n) or more, got {self.tries}")
        if self.seed < 0:
            raise ConfigError(f"--seed must be 0 or more, got {self.seed}")

    @property
    def most(self) -> int:
        """Draws at most."""
        return 2 * self.num if self.tries is None else self.tries


class Round(NamedTuple):
    """Which draws these are; the same round gives the same draws."""

    seed: int
    chunk: int
    before: int
    """Draws made for these prompts before."""


class Draft(NamedTuple):
    """One draw."""

    text: str
    ended: bool
    """The policy ended by itself, and not at the limit of tokens."""


@runtime_checkable
class Policy(Protocol):
    """Anything that writes responses."""

    def decides(self) -> dict[str, Any]:
        """All that its responses depend on, but for the prompt and the round."""

    def write(
        self, prompts: Sequence[Group], num: int, turn: Round, done: Done | None
    ) -> list[list[Draft] | Refusal]:
        """For each prompt `num` draws, or why there are none."""

    def close(self) -> None:
        """Let go of memory; the next `write` may need it again."""


@dataclass
class _Drafts:
    """What has been drawn for one prompt."""

    prompt: Group
    texts: list[str] = field(default_factory=list)
    tries: int = 0
    unended: int = 0
    blank: int = 0
    error: str | None = None

    def take(self, drafts: list[Draft] | Refusal, drawing: Drawing) -> None:
        if isinstance(drafts, Refusal):
            self.error = f"{drafts.reason}: {drafts.detail}"
            return
        for text, ended in drafts:
            self.tries += 1
            self.unended += not ended
            usable = is_usable(text)
            self.blank += not usable
            known = text in self.texts and not drawing.repeats
            if usable and not known and len(self.texts) < drawing.num:
                self.texts.append(text)

    def lacks(self, drawing: Drawing) -> bool:
        return self.error is None and len(self.texts) < drawing.num

    def finish(self) -> Candidates:
        return replace(
            candidates_of(self.prompt, self.texts),
            tries=self.tries,
            unended=self.unended,
            blank=self.blank,
            error=self.error,
        )


def draw_candidates(
    policy: Policy,
    prompts: Sequence[Group],
    drawing: Drawing,
    journal: Journal,
    done: Done | None = None,
) -> list[Candidates]:
    """The candidates for all prompts, in order; `journal` gets those of every chunk, and keeps them."""
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        if all(prompt.id in journal.records for prompt in chunk):
            continue
        drafts = _draw_chunk(policy, chunk, drawing, start, done)
        records = [each.finish().to_record() for each in drafts]
        journal.add([record for record in records if record["id"] not in journal.records])
    return [Candidates.from_record(journal.records[prompt.id]) for prompt in prompts]


def _draw_chunk(
    policy: Policy, chunk: Sequence[Group], drawing: Drawing, start: int, done: Done | None
) -> list[_Drafts]:
    drafts = [_Drafts(prompt) for prompt in chunk]
    before = 0
    while before < drawing.most and (left := [each for each in drafts if each.lacks(drawing)]):
        num = min(drawing.num, drawing.most - before)
        turn = Round(drawing.seed, start, before)
        written = policy.write([each.prompt for each in left], num, turn, done)
        for each, texts in zip(left, written, strict=True):
            each.take(texts, drawing)
        before += num
    return drafts


def drawing_decides(policy: Policy, prompts: Sequence[Group], drawing: Drawing) -> dict[str, Any]:
    """All that the candidates depend on, for the journal."""
    keys = [[prompt.id, prompt_key(prompt.prompt)] for prompt in prompts]
    digest = hashlib.sha256(repr(keys).encode("utf-8", "surrogatepass")).hexdigest()
    return {**policy.decides(), **asdict(drawing), "tries": drawing.most, "prompts": digest}
