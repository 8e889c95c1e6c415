"""Groups as text: each rendered by the chat template and cut where the response begins.

The template is rendered with the real responses, so the text is what a consumer renders, whatever the
template does to it (trimming, say); a probe in the place of the response shows where to cut. Special tokens
in messages are replaced by marks before the template sees them.
"""

from collections.abc import Sequence
from itertools import islice
from os.path import commonprefix
from typing import NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from hafrm.data.chat_template import render_conversations
from hafrm.data.special_tokens import Marker, SpecialTokens
from hafrm.errors import DataError, ModelError
from hafrm.preferences import Group, Message


class RenderedGroup(NamedTuple):
    """The shared prompt, and what follows it in each conversation."""

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
        conversation = [message._asdict() for message in (*prompt, Message("assistant", response))]
        return render_conversations(self._tokenizer, self._template, [conversation])[0]

    def render_groups(self, groups: Sequence[Group]) -> tuple[list[RenderedGroup], Marker]:
        """The marked and cut texts of each group, and the marker that reads the marks.

        Raises:
            DataError: a group without prompt or responses, with lone surrogates, or that the
                template refuses or renders without any prompt.
        """
        marker = Marker(self._special, _checked_texts(groups))
        probe = marker.word + "r"
        conversations = []
        for group in groups:
            turns = [{"role": m.role, "content": marker.mark(m.content)} for m in group.prompt]
            answers = [probe, *(marker.mark(response) for response in group.responses)]
            conversations += [[*turns, {"role": "assistant", "content": a}] for a in answers]
        try:
            texts = iter(render_conversations(self._tokenizer, self._template, conversations))
        except TemplateError:
            self._raise_refused(groups)
            raise
        rendered = []
        for group in groups:
            before, match, _ = next(texts).rpartition(probe)
            if not match:
                raise ModelError("The chat template leaves out the assistant's content. Repair it.")
            rendered.append(self._cut(before, list(islice(texts, len(group.responses)))))
            if not rendered[-1].prompt:
                raise DataError(
                    f"The prompt of group {group.id!r} renders to nothing under the chat template, so its "
                    "responses have nothing to be predicted from. Remove it or repair the template."
                )
        return rendered, marker

    def _cut(self, before: str, conversations: list[str]) -> RenderedGroup:
        """Cut the conversations where the response begins, which is behind the text `before`.

        Some templates look into the response (for reasoning, say) and write another text before it: the
        cut is then behind the last added token that all share.
        """
        if not all(text.startswith(before) for text in conversations):
            before = commonprefix([before, *conversations])  # noqa: RUF071 - of text, not of paths
            ends = [match.end() for match in self._special.boundary.finditer(before)]
            before = before[: ends[-1]] if ends else before[: before.rfind("\n") + 1]
        prompt = before.rstrip(self._blanks)
        return RenderedGroup(prompt, [text[len(prompt) :] for text in conversations])

    def _find_blanks(self) -> str:
        """White space at a prompt's end that goes to the response, so that no token crosses the seam."""
        # A blank belongs to the word behind it. And GPT-2's pattern makes one token of two line breaks at
        # the end of a text, but two before a word: after a header that ends in them, every response would
        # be a seam merge.
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
        """Raise DataError with the id of the first group that the template fails on."""
        for group in groups:
            try:
                for response in group.responses:
                    self.render(group.prompt, response)
            except TemplateError as error:
                roles = ", ".join(message.role for message in group.prompt)
                raise DataError(
                    f"The chat template refuses group {group.id!r} of {group.source!r}, whose roles are "
                    f"{roles}: {error}. Remove it, or change its turns to what the template accepts."
                ) from error


def _checked_texts(groups: Sequence[Group]) -> list[str]:
    """All texts of the groups, after the checks that a tokenizer would fail without naming the group."""
    texts: list[str] = []
    for group in groups:
        if not group.prompt or not group.responses:
            raise DataError(
                f"Group {group.id!r} has {len(group.prompt)} prompt messages and {len(group.responses)} "
                "responses; at least one of each is needed. Remove it."
            )
        own = [*(message.content for message in group.prompt), *group.responses]
        try:
            "".join(own).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"Group {group.id!r} holds a lone surrogate, which is no text: {error}. Remove it."
            ) from error
        texts += own
    return texts
