"""Groups of text -> groups of token ids, exactly as a consumer of the exported template gets them.

Prompt ids + response ids are the ids of the rendered conversation. If a merge across the seam would change
them, the two are encoded separately and the case is counted. Every response ends in the EOS, even when cut.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import dropwhile
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hafrm.data.chat_template import prepare_tokenizer, written_around_turns
from hafrm.data.rendering import Renderer, SpecialTokens
from hafrm.data.store import Lazy, store_tokens
from hafrm.errors import ConfigError, DataError, ModelError
from hafrm.preferences import Group, Message, TokenizedGroup

log = logging.getLogger("hafrm")

# enough for the tokenizer to work on many texts at once, few enough to hold all their text
_GROUPS_AT_ONCE = 256
# part of the cache key: raise it when the same input gives other ids
_SCHEME = "hafrm-encoding-1"
Encoded = TypeVar("Encoded")


@dataclass(frozen=True, slots=True)
class LengthPolicy:
    """At most `max_length` tokens for a prompt with any one of its responses.

    If they exceed it, the prompt loses its oldest tokens (but keeps a BOS), down to `max_prompt_length`
    tokens (None: half of max_length) or to what the longest response leaves, if that is more. Then the
    responses lose their last tokens (but keep the EOS). too_long="drop" leaves the whole group out instead.
    """

    max_length: int
    max_prompt_length: int | None = None
    too_long: Literal["cut", "drop"] = "cut"

    def __post_init__(self) -> None:
        if self.too_long not in ("cut", "drop"):
            raise ConfigError(f"too_long must be cut or drop, got {self.too_long!r}")
        if not isinstance(self.max_length, int) or self.max_length < 4:
            raise ConfigError(
                f"max_length must be a whole number of at least 4, got {self.max_length!r}"
            )
        # two on each side: BOS and a token of the prompt, a token of the response and EOS
        if not 2 <= self.min_prompt_room <= self.max_length - 2:
            raise ConfigError(
                "data.max_prompt_length must be between 2 and data.max_length - 2, got "
                f"{self.min_prompt_room} with max_length {self.max_length}. Raise data.max_length."
            )

    @property
    def min_prompt_room(self) -> int:  # what long responses cannot take away
        return self.max_length // 2 if self.max_prompt_length is None else self.max_prompt_length

    def fit(
        self, prompt: list[int], responses: list[list[int]], bos_id: int | None
    ) -> tuple[list[int], list[list[int]]] | None:
        """The ids cut to fit; None when they do not fit and are to be dropped."""
        longest = max(len(ids) for ids in responses)
        if len(prompt) + longest <= self.max_length:
            return prompt, responses
        if self.too_long == "drop":
            return None
        room = max(self.min_prompt_room, self.max_length - longest)
        if len(prompt) > room:
            head = prompt[:1] if prompt[0] == bos_id else []
            prompt = head + prompt[len(prompt) - room + len(head) :]
        room = self.max_length - len(prompt)
        return prompt, [i if len(i) <= room else [*i[: room - 1], i[-1]] for i in responses]


@dataclass(slots=True)
class EncodingReport:
    """What encoding did, as counts."""

    prompts_cut: int = 0
    responses_cut: int = 0
    dropped: int = 0
    """Groups that were too long, with too_long="drop"; the other counts do not include them."""
    indistinct: int = 0
    """Comparisons of two responses with the same ids (after trimming or cutting): they teach nothing."""
    seam_merges: int = 0
    """Responses whose first tokens would merge with the prompt's last for a consumer."""
    neutralised: int = 0  # special tokens typed in messages, encoded as plain text
    shortened: int = 0
    """Responses from which the template drops a part, such as the thoughts before an answer."""
    refused: dict[int, str] = field(default_factory=dict)
    """Why groups have no ids (the template or the tokenizer refuses them), by their index."""

    def check(
        self, groups: Sequence[Group], max_bad_fraction: float, bad_rows_file: Path | None = None
    ) -> None:
        """Log the refused groups and append them to the file of bad rows; raise DataError if their fraction
        exceeds `max_bad_fraction`, or if every group is refused."""
        if not self.refused:
            return
        if bad_rows_file is not None:
            with bad_rows_file.open("a", encoding="utf-8") as file:
                for i, detail in self.refused.items():
                    row = {"source": groups[i].source, "group": groups[i].id}
                    row |= {"reason": "not encodable", "detail": detail}
                    file.write(json.dumps(row) + "\n")
        num, (index, why) = len(self.refused), next(iter(self.refused.items()))
        first = f"first: group {groups[index].id!r} of {groups[index].source!r}: {why}"
        if num > max_bad_fraction * len(groups) or num == len(groups):
            raise DataError(
                f"{num:,} of {len(groups):,} groups are not encodable (allowed: {max_bad_fraction:.1%}); "
                f"{first} Correct them, or raise data.max_bad_fraction to leave them out."
            )
        log.warning("%d of %d groups are not encodable and left out; %s", num, len(groups), first)

    def counts(self) -> dict[str, int]:
        """Every count, by name."""
        return {name: getattr(self, name) for name in _COUNTS} | {"refused": len(self.refused)}


_COUNTS = tuple(name for name in EncodingReport.__dataclass_fields__ if name != "refused")


class Encoder:
    """Encodes groups with a model's chat template; `prepare_tokenizer` explains `close`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        too_long: Literal["cut", "drop"] = "cut",
        close: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.lengths = LengthPolicy(max_length, max_prompt_length, too_long)
        self.close = close
        self.vocab_size = vocab_size  # rows of the model's embedding, if known
        self.tokenizer = prepare_tokenizer(tokenizer, close=close)
        """Our own copy, the one that is exported; the tokenizer passed in stays as it was."""
        self.template = str(self.tokenizer.chat_template)
        self._backend = self.tokenizer.backend_tokenizer
        around = written_around_turns(self.tokenizer, self.template)
        self._special = SpecialTokens(self.tokenizer, around)
        self._renderer = Renderer(self.tokenizer, self._special)
        self.eos_id = self.tokenizer.eos_token_id
        self.pad_id = self.tokenizer.pad_token_id

    @property
    def template_sha256(self) -> str:
        """Hexadecimal digest of the exported template."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    @cached_property
    def cache_key(self) -> str:
        """Hexadecimal digest of everything that decides which ids a group gets."""
        parts = [_SCHEME, self._backend.to_str(), self.template, self.close, self.lengths]
        parts += [self.tokenizer.bos_token_id, self.eos_id, self.pad_id]
        return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()

    def encode(self, groups: Sequence[Group]) -> tuple[Sequence[TokenizedGroup], EncodingReport]:
        """The groups as ids, in their order, and counts of what was done to them.

        Dropped and refused groups are left out. The report lists the refused ones: without prompt or
        responses, with lone surrogates or tokens that the model lacks, or rejected by the template. The ids
        of lazy groups are lazy too.
        """
        report = EncodingReport()
        encoded = self._encode_parts(groups, self._encode_chunk, report)
        return (store_tokens(encoded) if isinstance(groups, Lazy) else list(encoded)), report

    def encode_prompts(
        self, groups: Sequence[Group]
    ) -> tuple[list[NDArray[np.int32]], EncodingReport]:
        """The ids that ask for a response to each group's prompt, by the template's own generation prompt,
        uncut. Refused groups are left out and listed in the report, as by `encode`."""
        report = EncodingReport()
        return list(self._encode_parts(groups, self._encode_prompt_chunk, report)), report

    def _encode_parts(
        self,
        groups: Sequence[Group],
        encode_chunk: Callable[[Sequence[Group], EncodingReport], Iterator[Encoded]],
        report: EncodingReport,
    ) -> Iterator[Encoded]:
        def encode_part(part: Sequence[Group], start: int) -> list[Encoded]:
            own = EncodingReport()
            try:
                encoded = list(encode_chunk(part, own))
            except DataError as error:  # one group fails all: halve them until it is alone
                if len(part) == 1:
                    report.refused[start] = str(error)
                    return []
                middle = len(part) // 2
                first = encode_part(part[:middle], start)
                return first + encode_part(part[middle:], start + middle)
            for name in _COUNTS:
                setattr(report, name, getattr(report, name) + getattr(own, name))
            return encoded

        for start in range(0, len(groups), _GROUPS_AT_ONCE):
            yield from encode_part(list(groups[start : start + _GROUPS_AT_ONCE]), start)

    def turn_ends(self, generation: GenerationConfig | None = None) -> tuple[int, ...]:
        """Ids that end an assistant's turn: the template's first control token after an answer, the EOS,
        and those of a model's generation config."""
        own = None if generation is None else generation.eos_token_id
        # an id that is not a control token is a default of transformers for another tokenizer
        control_ids = set(np.flatnonzero(self._special.is_special).tolist())
        others = [i for i in (own if isinstance(own, list) else [own]) if i in control_ids]
        ends = [*self.closing()[:1], self.eos_id, *others]
        return tuple(dict.fromkeys(int(i) for i in ends if i is not None))

    def read_response(self, ids: Sequence[int], ends: Collection[int]) -> tuple[str, bool]:
        """(the text of a sampled response, whether it ended by itself), given the `turn_ends`.

        Control tokens that the policy wrote within its turn stay visible, so a reward can react to them.
        """
        end = next((k for k, token in enumerate(ids) if token in ends), None)
        verbatim = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text = self.tokenizer.decode(list(ids[:end]), **verbatim)
        # a template's blank before the answer is the response's first token, and not part of its text
        return str(text).lstrip(" "), end is not None

    def has_control_tokens(self, text: str) -> bool:
        """Whether a text contains special tokens, as text rendered by a chat template does."""
        return self._special.pattern.search(text) is not None

    def last_turn(self, ids: NDArray[np.int32]) -> int:
        """Index where the last turn of a rendered conversation may begin: after its last special token (not
        counting those at its end), or 1."""
        special = np.isin(ids, np.flatnonzero(self._special.is_special))
        places = np.flatnonzero(special[: np.flatnonzero(~special).max(initial=0)])
        return int(places.max(initial=0)) + 1

    def _example(self) -> TokenizedGroup:
        return self.encode([Group("example", (Message("user", "x"),), ("x",))])[0][0]

    def opening(self) -> int:
        """The id that the template begins a conversation with."""
        return int(self._example().prompt_ids[0])

    def closing(self) -> list[int]:
        """The ids that the template writes after every response, from its first special token on."""
        ids: list[int] = self._example().response_ids[0].tolist()
        return list(dropwhile(lambda i: not self._special.is_special[i], ids))

    def export_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer with the closed template and real pad, adding no BOS or EOS by itself."""
        self.tokenizer.save_pretrained(directory)
        file = directory / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        # transformers 5 leaves both out, and some tokenizer classes then add a BOS to the template's own
        config |= {"add_bos_token": False, "add_eos_token": False}
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _encode_chunk(
        self, groups: Sequence[Group], report: EncodingReport
    ) -> Iterator[TokenizedGroup]:
        rendered, marker = self._renderer.render_groups(groups)
        prompts = [marker.to_encode(prompt) for prompt, _ in rendered]
        prompt_ids = self._ids(prompts)
        # Only the prompt's end can influence the ids of a response: encode responses with only that end, so
        # that a long prompt is not encoded again for each of them.
        tails = [self._special.find_tail(*pair) for pair in zip(prompts, prompt_ids, strict=True)]
        joint_ids = iter(
            self._ids(
                prompt[start:] + marker.to_encode(response)
                for prompt, (start, _), (_, texts) in zip(prompts, tails, rendered, strict=True)
                for response in texts
            )
        )
        for index, (group, (prompt_text, texts)) in enumerate(zip(groups, rendered, strict=True)):
            where = f"Group {group.id!r} (source {group.source!r})"
            before, responses = prompt_ids[index][tails[index][1] :], []
            for response in texts:
                encoded = marker.to_encode(response)
                ids = self._response_ids(before, next(joint_ids), encoded, report)
                responses.append(self._checked(marker.spell(ids, response, where), where))
            prompt = marker.spell(prompt_ids[index], prompt_text, where)
            fitted = self.lengths.fit(prompt, responses, self.tokenizer.bos_token_id)
            if fitted is None:
                report.dropped += 1
                continue
            cut = [len(a) < len(b) for a, b in zip(fitted[1], responses, strict=True)]
            report.prompts_cut += len(fitted[0]) < len(prompt)
            report.responses_cut += sum(cut)
            same = (fitted[1][c.chosen] == fitted[1][c.rejected] for c in group.comparisons)
            report.indistinct += sum(same)
            arrays = [self._as_array(ids, where) for ids in (fitted[0], *fitted[1])]
            names = group.id, group.source, group.tags
            yield TokenizedGroup(arrays[0], tuple(arrays[1:]), group.comparisons, *names)
        report.neutralised += marker.num_marked
        report.shortened += marker.num_shortened

    def _encode_prompt_chunk(
        self, groups: Sequence[Group], report: EncodingReport
    ) -> Iterator[NDArray[np.int32]]:
        texts, marker = self._renderer.render_prompts(groups)
        all_ids = self._ids(map(marker.to_encode, texts))
        for group, text, ids in zip(groups, texts, all_ids, strict=True):
            where = f"Group {group.id!r} (source {group.source!r})"
            yield self._as_array(marker.spell(ids, text, where), where)
        report.neutralised += marker.num_marked

    def _as_array(self, ids: list[int], where: str) -> NDArray[np.int32]:
        array = np.array(ids, dtype=np.int32)
        largest = int(array.max(initial=0))
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise DataError(
                f"{where}: token {self.tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, "
                f"but the model's embedding has only {self.vocab_size} rows."
            )
        array.flags.writeable = False
        return array

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        wanted = list(texts)
        distinct = list(dict.fromkeys(wanted))  # each encoded once
        encodings = self._backend.encode_batch_fast(distinct, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(distinct, encodings, strict=True)}
        return [ids[text] for text in wanted]

    def _response_ids(
        self, before: list[int], joint: list[int], response: str, report: EncodingReport
    ) -> list[int]:
        """The response's ids: those after the prompt's in the joint encoding, or encoded separately."""
        if joint[: len(before)] == before:
            return joint[len(before) :]
        report.seam_merges += 1
        # something in front: some tokenizers add a space at the start of every text
        for front in ("\n", self._special.placeholder):
            front_ids, whole = self._ids([front, front + response])
            if front_ids and whole[: len(front_ids)] == front_ids:
                return whole[len(front_ids) :]
        return self._ids([response])[0]

    def _checked(self, ids: list[int], where: str) -> list[int]:
        if self.close and not (ids and ids[-1] == self.eos_id and ids.count(self.eos_id) == 1):
            raise ModelError(
                f"{where}: the chat template does not end this response in exactly one EOS "
                f"{self.tokenizer.eos_token!r}. Repair tokenizer.chat_template, or set it to None."
            )
        return ids
