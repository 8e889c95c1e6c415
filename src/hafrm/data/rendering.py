"""Groups as text, cut where the response begins; special tokens typed in messages stay plain text.

A typed `<|im_end|>` would end the turn for the model, and a forged turn would be scored. So each special
token in a message becomes a mark for the template, a placeholder for the tokenizer, plain text in the ids.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from os.path import commonprefix

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hafrm.data.chat_template import render_conversations, time_limit
from hafrm.errors import DataError, ModelError
from hafrm.preferences import Group, Message


class SpecialTokens:
    """The strings that a tokenizer turns into control ids, and the ids of each string as plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, written: str) -> None:
        backend = tokenizer.backend_tokenizer
        named = set(tokenizer.all_special_tokens)
        tokens = sorted(tokenizer.added_tokens_decoder.items())
        visible = {index: token for index, token in tokens if not token.content.isspace()}
        # some ChatML tokenizers do not flag the tokens that the template writes around turns (`written`)
        added = {
            index: token
            for index, token in visible.items()
            if token.special or token.content in named or token.content in written
        }
        texts = [token.content for token in added.values()]
        self.pattern = _any_of(texts)
        # <think> and the like split a text without being special: good places to cut, allowed in messages
        self.boundary = _any_of(token.content for token in visible.values())
        self.index = {text: number for number, text in enumerate(texts)}
        ends = {tokenizer.bos_token, tokenizer.eos_token}
        # plain text may encode to <unk>, except where <unk> also is the EOS (GPT-2)
        never = {tokenizer.unk_token} - ends
        self.is_special = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.bool_)
        self.is_special[[i for i, token in added.items() if token.content not in never]] = True
        # a token that is matched before normalisation splits a text into parts encoded independently
        self._splitting = frozenset(
            token.content
            for token in added.values()
            if backend.normalizer is None or not token.normalized
        )
        usable = [t for i, t in added.items() if self.is_special[i]]
        usable.sort(key=lambda t: (t.lstrip or t.rstrip or t.single_word, t.content in ends))
        self.placeholder = usable[0].content if usable else ""
        self.spellings = [_spell_out(backend, text, self.is_special) for text in texts]

    def find_tail(self, text: str, ids: Sequence[int]) -> tuple[int, int]:
        """Where the last special token begins in a text and in its ids; (0, 0) when there is none."""
        # no token after it depends on the text before it
        matches = list(self.pattern.finditer(text))
        places = np.flatnonzero(self.is_special[ids])
        if not matches or matches[-1][0] not in self._splitting or not places.size:
            return 0, 0
        return matches[-1].start(), int(places[-1])


class Marker:
    """Marks for the special tokens typed in some texts; no part of those texts looks like a mark."""

    def __init__(self, special: SpecialTokens, texts: Sequence[str]) -> None:
        self._special = special
        # the word's only h is its first letter, so that no end of a text can complete another word
        self.word = "h0"
        while any(self.word in text for text in texts):
            self.word = "h" + hashlib.sha256(self.word.encode()).hexdigest()[:16]
        self._mark = re.compile(f"{self.word}x([0-9]+)x")
        self._either = re.compile(f"{self._mark.pattern}|{special.pattern.pattern}")
        self.num_marked = 0
        self.num_shortened = 0  # responses that the template did not write in full

    def mark(self, text: str) -> str:
        """The text with a mark in place of each special token; counted in `num_marked`."""
        index = self._special.index
        marked, count = self._special.pattern.subn(lambda m: f"{self.word}x{index[m[0]]}x", text)
        self.num_marked += count
        return marked

    def to_encode(self, marked: str) -> str:
        """A rendered text with the placeholder token in place of each mark: the tokenizer's input."""
        return self._mark.sub(lambda _: self._special.placeholder, marked)

    def spell(self, ids: list[int], marked: str, where: str) -> list[int]:
        """The ids of a rendered text, the placeholders spelled out as the text that was typed."""
        # special tokens in the text and special ids correspond one to one, in order, unless a normaliser
        # turned other characters into a special token
        places = np.flatnonzero(self._special.is_special[ids])
        matches = list(self._either.finditer(marked))
        if len(matches) != places.size:
            raise DataError(
                f"{where}: its text holds {len(matches)} special tokens but encodes to {places.size}: "
                "some of it is turned into a special token by the tokenizer. Remove it from the data."
            )
        spelled, start = list[int](), 0
        for match, place in zip(matches, places.tolist(), strict=True):
            if match[1] is not None:
                spelled += [*ids[start:place], *self._special.spellings[int(match[1])]]
                start = place + 1
        return spelled + ids[start:]


RenderedGroup = tuple[str, list[str]]
"""The shared prompt, and what follows it in each conversation."""


class Renderer:
    """Renders groups with a tokenizer's own (final) chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: SpecialTokens) -> None:
        self._tokenizer = tokenizer
        self._render = partial(render_conversations, tokenizer, str(tokenizer.chat_template))
        self._special = special
        self._blanks = self._find_blanks()

    @time_limit(60)  # one of some hundred conversations may make a template loop
    def render_groups(self, groups: Sequence[Group]) -> tuple[list[RenderedGroup], Marker]:
        """The marked and cut texts of each group, and the marker that reads the marks."""
        marker = Marker(self._special, _checked_texts(groups))
        probe = marker.word + "r"
        rendered = []
        for group in groups:
            turns = [Message(m.role, marker.mark(m.content)) for m in group.prompt]
            answers = [probe, *(marker.mark(response) for response in group.responses)]
            try:
                talks = [[*turns, Message("assistant", answer)] for answer in answers]
                before, *texts = self._render(talks)
            except TemplateError as error:
                roles = ", ".join(message.role for message in group.prompt)
                raise DataError(
                    f"The chat template refuses group {group.id!r} of {group.source!r}, whose roles are "
                    f"{roles}: {error}. Remove it, or change its turns to what the template accepts."
                ) from error
            marker.num_shortened += len(texts) - sum(map(_holds, texts, answers[1:]))
            before, match, _ = before.rpartition(probe)
            if not match:
                raise ModelError("The chat template leaves out the assistant's content. Repair it.")
            rendered.append(self._cut(before, texts))
            if not rendered[-1][0]:
                raise DataError(f"The chat template drops the prompt of group {group.id!r}.")
        return rendered, marker

    @time_limit(60)
    def render_prompts(self, groups: Sequence[Group]) -> tuple[list[str], Marker]:
        """The marked text that asks for a response to each prompt, and the marker that reads the marks."""
        probes = [replace(group, responses=("a", "b"), comparisons=()) for group in groups]
        rendered, marker = self.render_groups(probes)
        texts = []
        for group, (before, _) in zip(groups, rendered, strict=True):
            turns = [[Message(m.role, marker.mark(m.content)) for m in group.prompt]]
            (asked,), (plain,) = (self._render(turns, ask=ask) for ask in (True, False))
            # A thinking model's template writes other text before a finished answer than to ask for one.
            # A template that ignores add_generation_prompt has no such text: use what precedes an answer.
            is_same = asked == plain or asked.rstrip(self._blanks) == before
            texts.append(before if is_same else asked)
        return texts, marker

    def _cut(self, before: str, conversations: list[str]) -> RenderedGroup:
        # Some templates look into the response (for reasoning, say) and write other text before it: then
        # cut after the last added token that all share.
        if not all(text.startswith(before) for text in conversations):
            before = commonprefix([before, *conversations])  # noqa: RUF071 - of text, not of paths
            ends = [match.end() for match in self._special.boundary.finditer(before)]
            before = before[: ends[-1]] if ends else before[: before.rfind("\n") + 1]
        prompt = before.rstrip(self._blanks)
        return prompt, [text[len(prompt) :] for text in conversations]

    def _find_blanks(self) -> str:
        """White space at a prompt's end that goes to the response, so that no token crosses the seam."""
        # A blank belongs to the word after it. And GPT-2's pattern makes one token of two line breaks at
        # the end of a text, but two before a word: after a header that ends in them, every response would
        # be a seam merge.
        word = "Hello"
        (text,) = self._render([[Message("user", word), Message("assistant", word)]])
        before = text.rpartition(word)[0]
        backend = self._tokenizer.backend_tokenizer
        whole = backend.encode(text, add_special_tokens=False).ids
        for blanks in (" ", " \t\r\n"):
            prompt = backend.encode(before.rstrip(blanks), add_special_tokens=False).ids
            if whole[: len(prompt)] == prompt:
                return blanks
        return " "


def _holds(text: str, response: str) -> bool:
    """Whether a conversation contains a whole response; templates may change the white space in it."""
    return response.strip() in text or "".join(response.split()) in "".join(text.split())


def _checked_texts(groups: Sequence[Group]) -> list[str]:
    # a tokenizer would fail on these without naming the group
    texts: list[str] = []
    for group in groups:
        if not group.prompt or not group.responses:
            raise DataError(f"Group {group.id!r} has no prompt, or no response: remove it.")
        own = [*(message.content for message in group.prompt), *group.responses]
        try:
            "".join(own).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"Group {group.id!r} holds a lone surrogate: {error}") from error
        texts += own
    return texts


def _spell_out(backend: Tokenizer, text: str, is_special: NDArray[np.bool_]) -> list[int]:
    """The ids of a special token's string as plain text, in the middle of a line."""
    for parts in ([text], list(text)):
        ids = [i for part in parts for i in _plain_ids(backend, part)]
        if not is_special[ids].any():
            return ids
    raise ModelError(
        f"The special token {text!r} is an ordinary piece of the vocabulary too, so the same text typed in "
        "a message cannot be distinguished from it. Choose another token (as eos, pad, ...)."
    )


def _plain_ids(backend: Tokenizer, text: str) -> list[int]:
    """Ids without any added token: normalised, pre-split, and looked up by the vocabulary's model."""

    def model_ids(text: str) -> list[int]:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    # a line break in front, cut off again: some tokenizers add a space at the start of every text
    whole, line_break = model_ids("\n" + text), model_ids("\n")
    return whole[len(line_break) :] if whole[: len(line_break)] == line_break else model_ids(text)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)  # as the tokenizer matches
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
