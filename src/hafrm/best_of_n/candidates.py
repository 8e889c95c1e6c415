"""Candidates: read from files, or drawn from a policy until there are enough of them.

`candidates.jsonl` of a best-of-n job is a file of rows like any other, so it can be read again. Prompts are
drawn in chunks that depend on nothing but the chunk, so a killed job resumes to the same candidates.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from hafrm.best_of_n.endpoint import Reply
from hafrm.best_of_n.policies import DrawRound, EndpointPolicy, LocalPolicy
from hafrm.data.parse import RefusedError, check_text
from hafrm.data.reader import read_preferences
from hafrm.errors import DataError
from hafrm.preferences import Group, Message, prompt_key
from hafrm.progress import OnProgress, no_progress
from hafrm.recipe import Section
from hafrm.resumable import RecordFile, ResumableFolder

log = logging.getLogger("hafrm")
Gather = Callable[[ResumableFolder, OnProgress], list["Candidates"]]
"""Where the candidates of a job come from."""
Policy = LocalPolicy | EndpointPolicy
CHUNK = 64  # prompts whose work is lost by a kill


class DrawSection(Section):
    """How a policy writes candidates."""

    num: int = Field(default=16, ge=2)
    """Candidates for each prompt."""
    repeats: bool = False
    """Keep repeated draws, so that candidates are independent samples of the policy."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives other candidates."""
    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 1: the policy as it is."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of a candidate at most."""
    batch_size: int = Field(default=32, ge=1)
    """Candidates that a policy on this machine writes at a time."""


@dataclass
class Candidates:
    """What there is to pick from for one prompt; grows while it is drawn."""

    prompt: Group  # without responses
    texts: list[str] = field(default_factory=list)
    """The draws that are candidates, in their order; repeated only with `draw.repeats`."""
    num_draws: int = 0
    num_cut: int = 0  # draws that reached the token limit
    num_blank: int = 0  # draws that were not text, and so are not candidates
    error: str | None = None  # why the policy could not answer this prompt

    @property
    def group(self) -> Group:
        """The prompt with its distinct candidates, which are scored."""
        return replace(self.prompt, responses=tuple(dict.fromkeys(self.texts)))

    @property
    def drawn(self) -> list[int]:
        """Every draw as an index into the group's responses."""
        indices = {text: k for k, text in enumerate(dict.fromkeys(self.texts))}
        return [indices[text] for text in self.texts]

    def add(self, reply: Reply, section: DrawSection) -> None:
        """Take in what a policy wrote, as far as it is new and needed."""
        self.error = reply.error
        for choice in reply.choices:
            text = choice.text.strip()
            self.num_draws += 1
            self.num_cut += not choice.ended
            self.num_blank += not is_usable_text(text)
            is_new = section.repeats or text not in self.texts
            if is_usable_text(text) and is_new and len(self.texts) < section.num:
                self.texts.append(text)

    def to_record(self) -> dict[str, Any]:
        """One line of candidates.jsonl, which the data readers take as a row."""
        return {
            "id": self.prompt.id,
            "prompt": [message._asdict() for message in self.prompt.prompt],
            "responses": self.texts,
            "source": self.prompt.source,
            **{name: getattr(self, name) for name in _STORED},
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Candidates":
        """The candidates that `to_record` wrote."""
        prompt = tuple(Message(**message) for message in record["prompt"])
        group = Group(record["id"], prompt, (), source=record["source"])
        return cls(group, record["responses"], *(record[name] for name in _STORED))


_STORED = ("num_draws", "num_cut", "num_blank", "error")


def candidates_digest(candidates: Sequence[Candidates]) -> str:
    """Hexadecimal digest of all prompts and draws, for cache keys."""
    content = [(c.prompt.id, c.prompt.prompt, c.texts) for c in candidates]
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def read_prompts(
    sources: Sequence[str], *, max_bad_fraction: float = 0.02, bad_rows_file: Path | None = None
) -> list[Group]:
    """The distinct prompts of rows of any shape, as groups without responses and with distinct ids."""
    data = read_preferences(
        sources,
        max_bad_fraction=max_bad_fraction,
        bad_rows_file=bad_rows_file,
        need_responses=False,
    )
    distinct: dict[tuple[Message, ...], Group] = {}
    for group in data.groups:  # one prompt may be in several sources or subsets
        distinct.setdefault(group.prompt, replace(group, responses=(), comparisons=()))
    return _with_distinct_ids(list(distinct.values()))


def read_candidates(sources: Sequence[str], num: int) -> list[Candidates]:
    """The first `num` distinct responses to each prompt that has several.

    Prompts with fewer than two responses are left out with a warning. Raises DataError when no prompt has
    two.
    """
    groups = read_preferences(sources, need_comparisons=False).groups
    single = [group.id for group in groups if len(group.responses) < 2]
    if len(single) == len(groups):
        raise DataError(
            f"{', '.join(sources)}: none of {len(groups)} prompts has two responses or more, so there is "
            "nothing to pick from; give rows with `prompt` and `responses`, or let a policy write them "
            "(--policy)"
        )
    if single:
        log.warning(
            "%d of %d prompts have fewer than two responses and are left out, such as %s",
            len(single),
            len(groups),
            single[0],
        )
    usable = _with_distinct_ids([group for group in groups if len(group.responses) > 1])
    return [
        Candidates(replace(g, responses=(), comparisons=()), list(g.responses[:num]))
        for g in usable
    ]


def _with_distinct_ids(groups: Sequence[Group]) -> list[Group]:
    """The groups; ids that users give may repeat, and records are looked up by theirs."""
    copies: Counter[str] = Counter()
    result = []
    for group in groups:
        copies[group.id] += 1
        copy = copies[group.id]
        result.append(group if copy == 1 else replace(group, id=f"{group.id}~{copy}"))
    return result


def is_usable_text(text: str) -> bool:
    """Whether a draw can be a candidate: some text that files and tokenizers can hold."""
    try:
        check_text(text, "a response")
    except RefusedError:
        return False
    return bool(text.strip())


def draw_candidates(
    policy: Policy,
    prompts: Sequence[Group],
    section: DrawSection,
    file: RecordFile,
    on_progress: OnProgress = no_progress,
) -> list[Candidates]:
    """The candidates for all prompts, in order; each chunk is added to `file` when it is drawn."""
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        if not all(prompt.id in file.records for prompt in chunk):
            # the whole chunk is drawn again: its draws share batches and random numbers
            drawn = _draw_chunk(policy, chunk, section, start)
            file.add([c.to_record() for c in drawn if c.prompt.id not in file.records])
        on_progress(start + len(chunk), len(prompts))
    return [Candidates.from_record(file.records[prompt.id]) for prompt in prompts]


def _draw_chunk(
    policy: Policy, chunk: Sequence[Group], section: DrawSection, start: int
) -> list[Candidates]:
    """Two rounds of draws, the second for prompts that lack candidates (the paper's protocol)."""
    candidates = [Candidates(prompt) for prompt in chunk]
    for num_before in (0, section.num):
        lacking = [c for c in candidates if c.error is None and len(c.texts) < section.num]
        draw_round = DrawRound(section.seed, start, num_before)
        prompts = [c.prompt for c in lacking]
        replies = policy.write(prompts, section.num, draw_round) if prompts else []
        for c, reply in zip(lacking, replies, strict=True):
            c.add(reply, section)
    return candidates


def drawing_key(policy: Policy, prompts: Sequence[Group], section: DrawSection) -> dict[str, Any]:
    """Everything the candidates depend on."""
    keys = [[prompt.id, prompt_key(prompt.prompt)] for prompt in prompts]
    digest = hashlib.sha256(repr(keys).encode("utf-8", "surrogatepass")).hexdigest()
    own = section.model_dump(include={"num", "repeats", "seed"})
    return {**policy.cache_key(), **own, "prompts": digest}


def from_policy(policy: Policy, prompts: Sequence[Group], section: DrawSection) -> Gather:
    """Candidates that a policy writes."""

    def gather(folder: ResumableFolder, on_progress: OnProgress) -> list[Candidates]:
        file = folder.records("candidates.jsonl", drawing_key(policy, prompts, section))
        candidates = draw_candidates(policy, prompts, section, file, on_progress)
        policy.close()  # the models that score need the memory
        return candidates

    return gather


def from_files(sources: Sequence[str], num: int) -> Gather:
    """Candidates that files hold, the first `num` of each prompt."""

    def gather(folder: ResumableFolder, _: OnProgress) -> list[Candidates]:
        candidates = read_candidates(sources, num)
        file = folder.records("candidates.jsonl", {"candidates": candidates_digest(candidates)})
        file.add([c.to_record() for c in candidates if c.prompt.id not in file.records])
        return candidates

    return gather
