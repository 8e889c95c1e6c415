"""Groups as text: each rendered by the chat template and cut where the response begins.

The template is rendered with the real responses, so the text is what a consumer renders, whatever
the template does to it (trimming, say); a probe in the place of the response tells where to cut.
Special tokens in people's text are replaced by marks before the template sees them.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from hafrm.data.special_tokens import Marker, SpecialTokens
from hafrm.data.template import render
from hafrm.errors import DataError, ModelError
from hafrm.preferences import Group, Message


class Texts(NamedTuple):
    """A rendered group: the shared prompt, and what follows it in each conversation."""

    prompt: str
    responses: list[str]


class Renderer:
    """Renders groups with a tokenizer's own (final) chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: SpecialTokens) -> None:
        self._tokenizer = tokenizer
        self._template = str(tokenizer.chat_template)
        self._special = special
        self._blanks = self._find_blanks()

    def render(self, prompt: Sequence[Message], response: str) -> str:
        """The text that a consumer of the template renders, nothing marked."""
        conversation = [*(_turn(m.role, m.content) for m in prompt), _turn("assistant", response)]
        return render(self._tokenizer, self._template, [conversation])[0]

    def render_groups(self, groups: Sequence[Group]) -> tuple[list[Texts], Marker]:
        """The marked and cut texts of each group, and what tells the marks from text.

        Raises:
            DataError: a group without prompt or responses, with lone surrogates, or that the
                template refuses or renders without any prompt.
        """
        marker = Marker(self._special, _checked_texts(groups))
        probe = marker.word + "r"
        conversations = []
        for group in groups:
            turns = [_turn(m.role, marker.mark(m.content)) for m in group.prompt]
            answers = [probe, *(marker.mark(response) for response in group.responses)]
            conversations += [[*turns, _turn("assistant", answer)] for answer in answers]
        try:
            rendered = iter(render(self._tokenizer, self._template, conversations))
        except TemplateError:
            self._raise_refused(groups)
            raise
        texts = []
        for group in groups:
            before, found, _ = next(rendered).rpartition(probe)
            if not found:
                raise ModelError("The chat template leaves out the assistant's content. Repair it.")
            texts.append(self._cut(before, list(islice(rendered, len(group.responses)))))
            if not texts[-1].prompt:
                raise DataError(
                    f"The prompt of group {group.id!r} renders to nothing under the chat template, so its "
                    "responses have nothing to be predicted from. Remove it or repair the template."
                )
        return texts, marker

    def _cut(self, before: str, conversations: list[str]) -> Texts:
        """Cut the conversations behind what they share, at the place where the response begins.

        `before` is what the template writes before any response. Some templates look into the
        response (for reasoning, say): the cut is then behind the last added token that is shared.
        """
        if not all(text.startswith(before) for text in conversations):
            before = _shared_start([before, *conversations])
            ends = [match.end() for match in self._special.boundary.finditer(before)]
            before = before[: ends[-1]] if ends else before[: before.rfind("\n") + 1]
        prompt = before.rstrip(self._blanks)
        return Texts(prompt, [text[len(prompt) :] for text in conversations])

    def _find_blanks(self) -> str:
        """What at a prompt's end is left to the response, so that no token lies across the seam.

        A blank is part of the word behind it. And GPT-2's word pattern makes one token of two line
        breaks at the end of a text, but two before a word: after a header that ends in them every
        response would be a seam merge.
        """
        word = "Hello"
        text = self.render((Message("user", word),), word)
        before = text.rpartition(word)[0]
        backend = self._tokenizer.backend_tokenizer
        whole = backend.encode(text, add_special_tokens=False).ids
        for blanks in (" ", " \t\r\n"):
            prompt = backend.encode(before.rstrip(blanks), add_special_tokens=False).ids
            if whole[: len(prompt)] == prompt:
                return blanks
        return " "

    def _raise_refused(self, groups: Sequence[Group]) -> None:
        """Raise DataError with the name of the first group that the template fails on."""
        for group in groups:
            try:
                for response in group.responses:
                    self.render(group.prompt, response)
            except TemplateError as error:
                roles = ", ".join(message.role for message in group.prompt)
                raise DataError(
                    f"The chat template refuses group {group.id!r} of {group.source!r}, whose roles are "
                    f"{roles}: {error}. Remove it, or change its turns to what the template takes."
                ) from error


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _shared_start(texts: list[str]) -> str:
    """The longest text that all of them begin with: that of the first and last in order of letters."""
    first, last = min(texts), max(texts)
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    return first[:same]


def _checked_texts(groups: Sequence[Group]) -> list[str]:
    """All texts that people wrote, after the checks that a tokenizer would fail without a name."""
    texts: list[str] = []
    for group in groups:
        if not group.prompt or not group.responses:
            raise DataError(
                f"Group {group.id!r} has {len(group.prompt)} prompt messages and {len(group.responses)} "
                "responses; at least one of each is needed. Remove it."
            )
        mine = [*(message.content for message in group.prompt), *group.responses]
        try:
            "".join(mine).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"Group {group.id!r} holds a lone surrogate, which is no text: {error}. Remove it."
            ) from error
        texts += mine
    return texts
