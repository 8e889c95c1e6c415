"""From groups of text to groups of token ids, exactly as a consumer of the exported template sees them.

Prompt and response are encoded so that all responses of a group share the prompt's ids, and for
text without special tokens prompt ids + response ids are the ids of the rendered conversation; where
a merge across the seam would give other ids, the two are encoded apart and the case is counted.
Every response ends in the EOS, once, even when it is cut. Never pads, never shuffles, reads no file.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hafrm.data.lengths import LengthPolicy
from hafrm.data.rendering import Renderer
from hafrm.data.special_tokens import SpecialTokens
from hafrm.data.template import written_around_turns
from hafrm.data.tokenizer import prepare, write_no_habits
from hafrm.errors import ModelError
from hafrm.preferences import Group, Message, TokenizedGroup

# Enough for the tokenizer to work on many texts at once, little enough to hold all their text.
_RESPONSES_AT_ONCE = 2048
# Part of the fingerprint: raise it when the same input comes to give other ids.
_SCHEME = "hafrm-encoding-1"


@dataclass(slots=True)
class EncodingReport:
    """What encoding did, as counts."""

    groups: int = 0
    responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    dropped: int = 0
    """Groups that were too long, under too_long="drop"; the counts above are of the others."""
    indistinct: int = 0
    """Comparisons of two responses with the same ids (once trimmed or cut): they teach nothing."""
    seam_merges: int = 0
    """Responses whose first tokens would merge with the prompt's last for a consumer."""
    neutralised: int = 0
    """Special tokens that people had typed, encoded as plain text."""

    def add(self, group: TokenizedGroup) -> None:
        """Count a finished group."""
        self.groups += 1
        self.responses += len(group.response_ids)
        self.prompt_tokens += len(group.prompt_ids)
        self.response_tokens += sum(len(ids) for ids in group.response_ids)
        self.indistinct += sum(
            np.array_equal(group.response_ids[c.chosen], group.response_ids[c.rejected])
            for c in group.comparisons
        )


class Encoder:
    """Encodes groups with a model's chat template, under an explicit length policy.

    When the prompt and the longest response exceed `max_length` tokens, the prompt is cut on the
    left to at least `max_prompt_length` (default: half of max_length), then responses on the right;
    too_long="drop" leaves the whole group out instead. close=False scores other people's models.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        too_long: Literal["cut", "drop"] = "cut",
        close: bool = True,
    ) -> None:
        self.lengths = LengthPolicy(max_length, max_prompt_length, too_long)
        self.close = close
        self.tokenizer = prepare(tokenizer, close=close)
        """Our own copy, the one that is exported; the tokenizer given stays as it was."""
        self.template = str(self.tokenizer.chat_template)
        self._backend = self.tokenizer.backend_tokenizer
        around = written_around_turns(self.tokenizer, self.template)
        self._special = SpecialTokens(self.tokenizer, around)
        self._renderer = Renderer(self.tokenizer, self._special)
        self.eos_id = self.tokenizer.eos_token_id
        self.pad_id = self.tokenizer.pad_token_id

    @property
    def template_sha256(self) -> str:
        """Hexadecimal digest of the exported template, for model cards and caches."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that decides which ids a group gets."""
        parts = [_SCHEME, self._backend.to_str(), self.template, self.close, self.lengths]
        parts += [self.tokenizer.bos_token_id, self.eos_id, self.pad_id]
        return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()

    def render(self, prompt: Sequence[Message], response: str) -> str:
        """The text that a consumer of the exported template renders."""
        return self._renderer.render(prompt, response)

    def encode(self, groups: Sequence[Group]) -> tuple[list[TokenizedGroup], EncodingReport]:
        """The groups as ids, in the order given, and counts of what was done to them.

        Comparisons may be absent: scoring encodes groups too. One group is given back for each one
        taken unless too_long="drop".

        Raises:
            DataError: a group without prompt or responses, with lone surrogates, or that the chat
                template refuses.
        """
        report = EncodingReport()
        encoded: list[TokenizedGroup] = []
        for chunk in _chunks(groups):
            for group in self._encode_chunk(chunk, report):
                report.add(group)
                encoded.append(group)
        return encoded, report

    def export_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer with the closed template and real pad, adding no BOS or EOS by itself."""
        self.tokenizer.save_pretrained(directory)
        write_no_habits(directory)

    def _encode_chunk(
        self, groups: list[Group], report: EncodingReport
    ) -> Iterator[TokenizedGroup]:
        texts, marker = self._renderer.render_groups(groups)
        prompts = self._ids(marker.to_encode(t.prompt) for t in texts)
        seams = [
            self._seam(marker.to_encode(t.prompt), ids)
            for t, ids in zip(texts, prompts, strict=True)
        ]
        joint = iter(
            self._ids(
                before + marker.to_encode(response)
                for t, (before, _) in zip(texts, seams, strict=True)
                for response in t.responses
            )
        )
        for group, t, prompt_ids, (_, before_ids) in zip(
            groups, texts, prompts, seams, strict=True
        ):
            where = f"Group {group.id!r} (source {group.source!r})"
            responses = []
            for response in t.responses:
                ids = self._behind(before_ids, next(joint), marker.to_encode(response), report)
                responses.append(self._checked(marker.spell(ids, response, where), where))
            prompt = marker.spell(prompt_ids, t.prompt, where)
            fitted = self.lengths.fit(prompt, responses, self.tokenizer.bos_token_id)
            if fitted is None:
                report.dropped += 1
                continue
            report.prompts_cut += fitted.prompt_cut
            report.responses_cut += fitted.responses_cut
            kept = tuple(_array(ids) for ids in fitted.responses)
            yield TokenizedGroup(
                _array(fitted.prompt), kept, group.comparisons, group.id, group.source, group.tags
            )
        report.neutralised += marker.num_marked

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of whole texts, each distinct one encoded once."""
        wanted = list(texts)
        distinct = list(dict.fromkeys(wanted))
        encodings = self._backend.encode_batch_fast(distinct, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(distinct, encodings, strict=True)}
        return [ids[text] for text in wanted]

    def _seam(self, prompt: str, prompt_ids: list[int]) -> tuple[str, list[int]]:
        """The end of the prompt that can influence the response's ids, as text and ids."""
        tail = self._special.find_tail(prompt, prompt_ids)
        return prompt[tail.char :], prompt_ids[tail.token :]

    def _behind(
        self, before: list[int], joint: list[int], response: str, report: EncodingReport
    ) -> list[int]:
        """The response's ids: what follows the prompt's in the joint encoding, or encoded apart."""
        if joint[: len(before)] == before:
            return joint[len(before) :]
        report.seam_merges += 1
        # Something in front keeps some tokenizers from writing a blank that they put before every text.
        for front in ("\n", self._special.placeholder):
            front_ids, whole = self._ids([front, front + response])
            if front_ids and whole[: len(front_ids)] == front_ids:
                return whole[len(front_ids) :]
        return self._ids([response])[0]

    def _checked(self, ids: list[int], where: str) -> list[int]:
        """The response's ids, which end in the only EOS among them (unless the template is literal)."""
        if self.close and not (ids and ids[-1] == self.eos_id and ids.count(self.eos_id) == 1):
            raise ModelError(
                f"{where}: the chat template does not end this response in exactly one EOS "
                f"{self.tokenizer.eos_token!r}. Repair tokenizer.chat_template, or set it to None."
            )
        return ids


def _chunks(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups in order, as few at a time as have _RESPONSES_AT_ONCE responses."""
    chunk: list[Group] = []
    num_responses = 0
    for group in groups:
        chunk.append(group)
        num_responses += len(group.responses)
        if num_responses >= _RESPONSES_AT_ONCE:
            yield chunk
            chunk, num_responses = [], 0
    if chunk:
        yield chunk


def _array(ids: list[int]) -> NDArray[np.int32]:
    array = np.array(ids, dtype=np.int32)
    array.flags.writeable = False
    return array
