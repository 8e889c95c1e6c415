"""Special tokens: only the template writes them; typed inside a message they are plain text.

`<|im_end|>` typed inside a message would end the turn for the model, and a forged turn would be scored. So
each special token in a message is replaced by a mark before the template is rendered, encoded as a
placeholder token, and finally spelled out as plain text. Text without special tokens passes unchanged. This
module knows ids and strings, no templates and no groups.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hafrm.errors import DataError, ModelError


class Tail(NamedTuple):
    """Where a text's last special token begins: no token after it depends on the text before it."""

    char: int
    token: int


class SpecialTokens:
    """The strings that a tokenizer turns into control ids, and the ids of each string as plain text.

    These are the added tokens flagged as special, the named ones (EOS, ...), and those that the template
    writes around turns (`written`), since some ChatML tokenizers do not flag theirs. Blank ones are not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, written: str) -> None:
        backend = tokenizer.backend_tokenizer
        named = set(tokenizer.all_special_tokens)
        added = {
            index: token
            for index, token in sorted(tokenizer.added_tokens_decoder.items())
            if not token.content.isspace()
            and (token.special or token.content in named or token.content in written)
        }
        self.texts = tuple(token.content for token in added.values())
        self.pattern = _any_of(self.texts)
        # <think> and the like split a text without being special: good places to cut, allowed in messages
        self.boundary = _any_of(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if not token.content.isspace()
        )
        self.index = {text: number for number, text in enumerate(self.texts)}
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
        self.spellings = [
            spell_out(backend, token.content, self.is_special) for token in added.values()
        ]

    def find_tail(self, text: str, ids: Sequence[int]) -> Tail:
        """The start of the last special token in a text and in its ids; (0, 0) when there is none."""
        matches = list(self.pattern.finditer(text))
        places = np.flatnonzero(self.is_special[ids])
        if not matches or matches[-1][0] not in self._splitting or not places.size:
            return Tail(0, 0)
        return Tail(matches[-1].start(), int(places[-1]))


class Marker:
    """Marks for the special tokens typed in some texts; no part of those texts looks like a mark."""

    def __init__(self, special: SpecialTokens, texts: Iterable[str]) -> None:
        self._special = special
        self.word = _absent_word(list(texts))
        self._mark = re.compile(f"{self.word}x([0-9]+)x")
        self._either = re.compile(f"{self._mark.pattern}|{special.pattern.pattern}")
        self.num_marked = 0

    def mark(self, text: str) -> str:
        """The text with a mark in place of each special token; counted in `num_marked`."""
        index = self._special.index
        marked, count = self._special.pattern.subn(lambda m: f"{self.word}x{index[m[0]]}x", text)
        self.num_marked += count
        return marked

    def to_encode(self, marked: str) -> str:
        """A rendered text with the placeholder token in place of each mark: the tokenizer's input."""
        if not self.num_marked:
            return marked
        return self._mark.sub(lambda _: self._special.placeholder, marked)

    def spell(self, ids: list[int], marked: str, where: str) -> list[int]:
        """The ids of a rendered text, the placeholders spelled out as the text that was typed.

        Special tokens in the text and special ids correspond one to one, in order, so this also checks
        that no content became a special id.

        Raises:
            DataError: when they do not (a normaliser turned other characters into a special token).
        """
        places = np.flatnonzero(self._special.is_special[ids])
        matches = list(self._either.finditer(marked))
        if len(matches) != places.size:
            raise DataError(
                f"{where}: its text holds {len(matches)} special tokens but encodes to {places.size}: "
                "some of it is turned into a special token by the tokenizer. Remove it from the data."
            )
        if not self.num_marked:
            return ids
        spelled, start = list[int](), 0
        for match, place in zip(matches, places.tolist(), strict=True):
            if match[1] is not None:
                spelled += [*ids[start:place], *self._special.spellings[int(match[1])]]
                start = place + 1
        return spelled + ids[start:]


def spell_out(backend: Tokenizer, text: str, is_special: NDArray[np.bool_]) -> list[int]:
    """The ids of a special token's string as plain text, in the middle of a line.

    Raises:
        ModelError: when even its single characters give a special id.
    """
    for parts in ([text], list(text)):
        ids = [i for part in parts for i in _plain_ids(backend, part)]
        if not is_special[ids].any():
            return ids
    raise ModelError(
        f"The special token {text!r} cannot be distinguished from the same text typed in a message: the "
        "vocabulary has it as an ordinary piece. Choose another token for this purpose (eos, pad, ...)."
    )


def _plain_ids(backend: Tokenizer, text: str) -> list[int]:
    """Ids without any added token."""
    # a line break in front, cut off again: else some tokenizers write the blank that starts every text
    whole, line_break = _model_ids(backend, "\n" + text), _model_ids(backend, "\n")
    if whole[: len(line_break)] == line_break:
        return whole[len(line_break) :]
    return _model_ids(backend, text)


def _model_ids(backend: Tokenizer, text: str) -> list[int]:
    """The ids that the vocabulary's model gives for the normalised and pre-split text."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest where several match, as the tokenizer does."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _absent_word(texts: list[str]) -> str:
    """A word that none of the texts contains, always the same for the same texts."""
    # the word's only h is its first letter, so that no end of a text can complete another word
    word = "h0"
    while any(word in text for text in texts):
        word = "h" + hashlib.sha256(word.encode()).hexdigest()[:16]
    return word
