"""What a chat endpoint answers: choices, or why there are none; and what its headers say about waiting."""

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One answer of a model."""

    text: str
    refused: bool
    """The endpoint says that the model refused, or filtered what it wrote."""
    ended: bool
    """The model ended by itself, and not at the limit of tokens."""


@dataclass(frozen=True)
class Reply:
    """What came back for one request."""

    choices: tuple[Choice, ...]
    error: str | None = None
    """Why the endpoint rejected the request; then there are no choices."""


def choices_of(body: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The answers in a chat completion; raises KeyError, TypeError, ValueError or AttributeError where it
    is none."""
    found = []
    for choice in body["choices"]:
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        if text is not None and not isinstance(text, str):
            raise TypeError("content that is no text")
        refused = bool(message.get("refusal")) or reason == "content_filter"
        found.append(Choice(text or "", refused, reason != "length"))
    if not found:
        raise ValueError("no choices")
    return tuple(found)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks to wait, as a number of them or a date; None where it does not say."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def shortened(text: str) -> str:
    """The text on one line of at most 200 characters, for messages."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + "..."
