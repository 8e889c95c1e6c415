"""Candidates: read from files, or drawn from a policy until there are enough of them.

Candidates are drawn in chunks of prompts, and a chunk's draws depend only on the chunk, so a killed job
resumes to the same candidates. A prompt that a policy cannot answer is recorded as refused.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from transformers import PreTrainedModel

from hafrm.best_of_n.endpoint import Endpoint, Reply, require_some
from hafrm.data.encoding import Encoder
from hafrm.data.files import RefusedError, check_text
from hafrm.data.reader import read_preferences
from hafrm.engine.sampling import Sampling, sample
from hafrm.errors import ModelError
from hafrm.preferences import Group, Message
from hafrm.progress import OnProgress, no_progress
from hafrm.recipe import Section
from hafrm.run_folder import RecordFile
from hafrm.scoring import loading
from hafrm.scoring.model_files import load_any_tokenizer, load_config, load_generation_config

CHUNK = 64  # prompts whose work is lost by a kill
_NO_LIMIT = 2**20


class DrawSection(Section):
    """How a policy samples candidates."""

    num: int = Field(default=16, ge=2)
    """Candidates for each prompt."""
    repeats: bool = False
    """Keep repeated draws, so that candidates are independent samples of the policy."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives other candidates."""
    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 1: the policy itself."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that together have this probability."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum tokens of a candidate."""
    batch_size: int = Field(default=32, ge=1)
    """Candidates that a policy on this machine samples at a time."""


@dataclass
class Candidates:
    """The candidates for one prompt; grows while they are drawn."""

    prompt: Group  # without responses
    texts: list[str] = field(default_factory=list)
    """The draws that are candidates, in their order; repeated only with `draw.repeats`."""
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

    def add(self, replies: Sequence[Reply], section: DrawSection) -> None:
        """Add the policy's replies, as far as they are new and needed."""
        self.error = replies[0].error
        for reply in replies if self.error is None else ():
            text = reply.text
            self.num_cut += not reply.ended
            is_new = section.repeats or text not in self.texts
            if not is_usable_text(text):
                self.num_blank += 1
            elif is_new and len(self.texts) < section.num:
                self.texts.append(text)

    def to_record(self) -> dict[str, Any]:
        """One line of candidates.jsonl, which the data readers accept as a row."""
        return {
            "id": self.prompt.id,
            "prompt": [message._asdict() for message in self.prompt.prompt],
            "responses": self.texts,
            "source": self.prompt.source,
            "num_cut": self.num_cut,
            "num_blank": self.num_blank,
            "error": self.error,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Candidates":
        """The candidates that `to_record` wrote."""
        prompt = tuple(Message(**message) for message in record["prompt"])
        group = Group(record["id"], prompt, (), source=record["source"])
        return cls(group, *(record[n] for n in ("responses", "num_cut", "num_blank", "error")))


def read_prompts(
    sources: Sequence[str], *, max_bad_fraction: float = 0.02, bad_rows_file: Path | None = None
) -> list[Group]:
    """The distinct prompts of rows of any shape, as groups without responses and with distinct ids."""
    options: Any = {"max_bad_fraction": max_bad_fraction, "bad_rows_file": bad_rows_file}
    data = read_preferences(sources, need_responses=False, **options)
    distinct: dict[tuple[Message, ...], Group] = {}
    for group in data.groups:  # one prompt may be in several sources or subsets
        distinct.setdefault(group.prompt, replace(group, responses=(), comparisons=()))
    return _with_distinct_ids(list(distinct.values()))


def read_candidates(sources: Sequence[str], num: int) -> list[Candidates]:
    """The first `num` distinct responses to each prompt."""
    data = read_preferences(sources, need_comparisons=False, read_labels=False)
    groups = _with_distinct_ids(data.groups)
    prompts = [replace(group, responses=(), comparisons=()) for group in groups]
    return [Candidates(p, list(g.responses[:num])) for p, g in zip(prompts, groups, strict=True)]


def _with_distinct_ids(groups: Sequence[Group]) -> list[Group]:
    """The groups with distinct ids: users' ids may repeat, but records are looked up by id."""
    copies: Counter[str] = Counter()
    result = []
    for group in groups:
        copies[group.id] += 1
        mark = f"~{copies[group.id]}" if copies[group.id] > 1 else ""
        result.append(replace(group, id=group.id + mark))
    return result


def is_usable_text(text: str) -> bool:
    """Whether a draw can be a candidate: text that files and tokenizers can handle, and not empty."""
    try:
        check_text(text, "a response")
    except RefusedError:
        return False
    return bool(text.strip())


DrawRound = tuple[int, int, int]
"""(seed, first prompt of the chunk, draws already made for it); the same round gives the same draws."""


class LocalPolicy:
    """A causal LM in a directory that stock transformers loads, asked through its chat template."""

    def __init__(self, path: str | Path, section: DrawSection, place: loading.Placement) -> None:
        """Raises ModelError for anything but a causal LM whose tokenizer has a chat template."""
        directory = loading.find_heads(path).policy
        if directory is None:
            raise ModelError(f"{path} cannot write: give --policy the directory of a causal LM")
        self._directory, self._device = directory, place.device
        self.options = Sampling(section.max_new_tokens, section.temperature, section.top_p)
        self.batch_size = section.batch_size
        tokenizer = load_any_tokenizer(directory)
        if tokenizer.chat_template is None:
            raise ModelError(f"policy {path} has no chat template: write its chat_template.jinja")
        self.encoder = Encoder(tokenizer, max_length=_NO_LIMIT, close=False)
        self.turn_ends = self.encoder.turn_ends(load_generation_config(directory))
        self._dtype = loading.choose_dtype(directory, place.dtype, place.device)
        text_config = load_config(directory).get_text_config()
        self._positions = getattr(text_config, "max_position_embeddings", None) or _NO_LIMIT
        self.model: PreTrainedModel | None = None  # loaded when something must be drawn

    def cache_key(self) -> dict[str, Any]:
        """Everything that its responses depend on, including the batch size: a batch is drawn together."""
        return {
            "policy": f"{loading.model_digest(self._directory)} {self.encoder.cache_key} {self._dtype}",
            **asdict(self.options),
            "turn_ends": self.turn_ends,
            "batch_size": self.batch_size,
        }

    def write(self, prompts: Sequence[Group], num: int, draw_round: DrawRound) -> list[list[Reply]]:
        """For each prompt `num` replies, or one error if the template or the length forbids them."""
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        if self.model is None:
            self.model = loading.load_causal_lm(
                self._directory, dtype=self._dtype, device=self._device
            )
        # torch takes seeds of 63 bits
        seed = int(np.random.SeedSequence(draw_round).generate_state(1, np.uint64)[0] >> 1)
        pad = self.turn_ends[0] if self.encoder.pad_id is None else self.encoder.pad_id
        drawn = sample(
            self.model,
            [prompt for prompt in ids if not isinstance(prompt, str)],
            num,
            self.options,
            ends=self.turn_ends,
            pad=pad,
            seed=seed,
            batch_size=self.batch_size,
        )
        read = partial(self.encoder.read_response, ends=self.turn_ends)
        own = iter([Reply(*read(response)) for response in responses] for responses in drawn)
        return [[Reply(error=p)] if isinstance(p, str) else next(own) for p in ids]

    def _prompt_ids(self, prompt: Group) -> list[int] | str:
        """The ids of the prompt up to the response, or why it cannot be answered."""
        encoded, report = self.encoder.encode_prompts([prompt])
        if report.refused:
            return f"not encodable: {report.refused[0]}"
        ids: list[int] = encoded[0].tolist()
        room = self._positions - self.options.max_new_tokens
        if len(ids) > room:
            return f"too long: the prompt has {len(ids)} tokens, the policy has room for {room}"
        return ids


class EndpointPolicy:
    """A chat model behind an endpoint."""

    def __init__(self, endpoint: Endpoint, section: DrawSection) -> None:
        self.endpoint = endpoint
        self._settings = section.model_dump(include={"temperature", "top_p"})
        self._settings["max_tokens"] = section.max_new_tokens

    def cache_key(self) -> dict[str, Any]:
        """Everything its responses depend on."""
        return {"policy": self.endpoint.cache_key(self._settings)}

    def write(self, prompts: Sequence[Group], num: int, draw_round: DrawRound) -> list[list[Reply]]:
        """For each prompt `num` replies, or one error; ServerError if all first prompts are rejected."""
        replies: list[list[Reply]] = [[] for _ in prompts]
        seed, start, num_before = draw_round
        # one by one: some servers reject n > 1, others answer only once for any n
        for k in range(num):
            accepted = [i for i, own in enumerate(replies) if not own or own[0].error is None]
            asked, repetition = [prompts[i].prompt for i in accepted], (seed, num_before + k)
            answers = self.endpoint.ask(asked, self._settings, repetition=repetition)
            for i, answer in zip(accepted, answers, strict=True):
                refusal = [Reply(error=f"not encodable: {answer.error}")]
                stripped = replace(answer, text=answer.text.strip())
                replies[i] = refusal if answer.error is not None else [*replies[i], stripped]
            if k == start == num_before == 0:  # later ones may be the prompts' fault
                require_some(answers, self.endpoint.url)
        return replies


Policy = LocalPolicy | EndpointPolicy


def draw_candidates(
    policy: Policy,
    prompts: Sequence[Group],
    section: DrawSection,
    file: RecordFile,
    on_progress: OnProgress = no_progress,
) -> list[Candidates]:
    """The candidates for all prompts, in order; each chunk is appended to `file` once it is drawn."""
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        if not all(prompt.id in file.records for prompt in chunk):
            # the whole chunk is drawn again: its draws share batches and random numbers
            drawn = _draw_chunk(policy, chunk, section, start)
            file.add([c.to_record() for c in drawn if c.prompt.id not in file.records])
        on_progress(start + len(chunk), len(prompts))
    if isinstance(policy, LocalPolicy):
        policy.model = None  # the models that score need the memory
    return [Candidates.from_record(file.records[prompt.id]) for prompt in prompts]


def _draw_chunk(
    policy: Policy, chunk: Sequence[Group], section: DrawSection, start: int
) -> list[Candidates]:
    """Two rounds of draws, the second for prompts that lack candidates (the paper's protocol)."""
    candidates = [Candidates(prompt) for prompt in chunk]
    for num_before in (0, section.num):
        lacking = [c for c in candidates if c.error is None and len(c.texts) < section.num]
        prompts, draw_round = [c.prompt for c in lacking], (section.seed, start, num_before)
        replies = policy.write(prompts, section.num, draw_round) if prompts else []
        for c, own in zip(lacking, replies, strict=True):
            c.add(own, section)
    return candidates


def drawing_key(policy: Policy, prompts: Sequence[Group], section: DrawSection) -> dict[str, Any]:
    """Everything the candidates depend on."""
    own = section.model_dump(include={"num", "repeats", "seed"})
    return {**policy.cache_key(), **own, "prompts": groups_digest(prompts)}


def groups_digest(groups: Sequence[Group]) -> str:
    """Hexadecimal digest of all prompts and responses, for cache keys."""
    content = [[group.id, group.prompt, group.responses] for group in groups]
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()
