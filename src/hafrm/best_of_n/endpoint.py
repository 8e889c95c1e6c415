"""An OpenAI-compatible chat endpoint: many requests at a time, every reply cached on disk.

The openai client retries what may succeed later. A request that the endpoint rejects becomes a reply with
an `error`. What no retry can fix ends the job; the same job, run again, only asks for the missing replies.
"""

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from hafrm.atomic import cache_folder
from hafrm.errors import ConfigError, ServerError
from hafrm.preferences import Message
from hafrm.progress import OnProgress, no_progress
from hafrm.recipe import Section, Text
from hafrm.run_folder import hide_secrets, without_secrets

log = logging.getLogger("hafrm")
# bad request, too large, unprocessable: the next request may be fine
_REJECTED = {400, 413, 422}


class EndpointSection(Section):
    """A model behind an endpoint, and its request settings."""

    model: Text | None = None
    """The model's name there; null: the only one that the endpoint lists."""
    request: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    """Settings added to every request; null removes one."""
    concurrency: int = Field(default=8, ge=1)
    """Requests at a time."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds for one request."""
    retries: int = Field(default=6, ge=0)
    """Retries of a request that failed."""


@dataclass(frozen=True)
class Reply:
    """A model's answer to one request."""

    text: str = ""
    ended: bool = True  # the model ended by itself, not at the token limit
    refused: bool = False  # the model refused, or the endpoint filtered what it wrote
    error: str | None = None
    """Why the endpoint, or the policy, rejects the request; then there is no text."""


class Endpoint:
    """A chat model behind an endpoint."""

    def __init__(
        self,
        url: str,
        section: EndpointSection | None = None,
        *,
        key_variable: str = "HAFRM_ENDPOINT_KEY",
        cache: Path | None = None,
    ) -> None:
        """`url` stops before /chat/completions; the key is in `key_variable`, else in OPENAI_API_KEY."""
        try:
            import diskcache  # noqa: PLC0415 - an extra
            import openai  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ConfigError(f"endpoints need {error.name}: pip install 'hafrm[judge]'") from error
        self.url, self.section = hide_secrets(url), section or EndpointSection()
        self._openai, self._key_variable = openai, key_variable
        folder = cache or cache_folder("replies")
        try:
            self._cache = diskcache.Cache(str(folder))
        except (OSError, sqlite3.Error) as error:  # this costs repeated requests, not the run
            log.warning("replies are not kept: cannot write %s: %s", folder, error)
            self._cache = diskcache.Cache(tempfile.mkdtemp(prefix="hafrm-replies-"))
        self._client = openai.OpenAI(
            base_url=url,
            # local servers accept any key, but the client requires one
            api_key=os.environ.get(key_variable) or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.section.timeout,
            max_retries=self.section.retries,
        )
        self._model = self.section.model

    @property
    def model(self) -> str:
        """The model's name; raises ServerError if none is set and the endpoint lists several."""
        if self._model is None:
            try:
                names = [model.id for model in self._client.models.list()]
            except self._openai.OpenAIError as error:
                raise self._unusable(error) from error
            if len(names) != 1:
                listed = f"{len(names)} models ({', '.join(names[:8])})"
                raise ServerError(f"{self.url} has {listed}; name one: policy.model, judge.model")
            self._model = names[0]
        return self._model

    def cache_key(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What replies depend on besides the conversations."""
        request = without_secrets(settings | self.section.request)
        return {"url": self.url, "model": self.model, "request": request}

    def ask(
        self,
        conversations: Sequence[Sequence[Message]],
        settings: dict[str, Any],
        *,
        repetition: tuple[int, ...] = (),
        on_progress: OnProgress = no_progress,
    ) -> list[Reply]:
        """A reply to each conversation, in order.

        `repetition` distinguishes repeated requests; else the cache would give them all the same answer.
        Raises ServerError if the endpoint cannot be used.
        """
        options = settings | self.section.request
        body = {"model": self.model} | {n: v for n, v in options.items() if v is not None}
        replies: list[Reply] = []
        with ThreadPoolExecutor(self.section.concurrency) as pool:
            bodies = [{**body, "messages": [m._asdict() for m in c]} for c in conversations]
            futures = [pool.submit(self._reply, own, repetition) for own in bodies]
            try:
                for future in futures:
                    replies.append(future.result())
                    on_progress(len(replies), len(futures))
            except BaseException:  # Ctrl-C too
                # the other requests would wait for the same broken server
                pool.shutdown(cancel_futures=True)
                raise
        return replies

    def _reply(self, body: dict[str, Any], repetition: tuple[int, ...]) -> Reply:
        # the cache key is the whole request, without API key and password
        request = {"url": self.url, "body": without_secrets(body), "repetition": list(repetition)}
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode("ascii")).hexdigest()
        content = self._cache.get(key)
        if content is not None:
            return _first_choice(json.loads(content))
        # settings that the client does not know (top_k, a template's options) pass through unchanged
        extra = {name: v for name, v in body.items() if name not in ("model", "messages")}
        create = self._client.chat.completions.with_raw_response.create
        try:
            response = create(model=body["model"], messages=body["messages"], extra_body=extra)
            content = response.http_response.text
            reply = _first_choice(json.loads(content))
        except self._openai.APIStatusError as error:
            if error.status_code in _REJECTED:
                said = hide_secrets(_one_line(error.response.text))
                return Reply(error=f"status {error.status_code}: {said}")
            raise self._unusable(error) from error
        except self._openai.OpenAIError as error:
            raise self._unusable(error) from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._unusable(f"this is not a chat completion: {content}") from error
        with contextlib.suppress(OSError, sqlite3.Error):  # a full disk
            self._cache.set(key, content)
        return reply

    def _unusable(self, reason: object) -> ServerError:
        why = hide_secrets(_one_line(str(reason)))
        return ServerError(
            f"{self.url} cannot be used: {why}. Check the address (it usually ends in "
            f"/v1), the model, the key ({self._key_variable} or OPENAI_API_KEY), and run the command again"
        )


def require_some(replies: Sequence[Reply], url: str) -> None:
    """Raise ServerError if every request was rejected: then the settings are wrong."""
    if replies and all(reply.error is not None for reply in replies):
        fix = "change policy.request='{name: value}' (null removes one)"
        raise ServerError(f"{url} rejects every request, the first with {replies[0].error}; {fix}")


def is_url(text: str | None) -> bool:
    """Whether a policy or judge is an endpoint rather than a directory."""
    return text is not None and text.startswith(("http://", "https://"))


def _first_choice(body: Mapping[str, Any]) -> Reply:
    """The answer in a chat completion; raises IndexError, KeyError or TypeError if it is not one."""
    choice = body["choices"][0]
    message, reason = choice["message"], choice.get("finish_reason")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise TypeError("the content is not text")
    refused = bool(message.get("refusal")) or reason == "content_filter"
    return Reply(text or "", ended=reason != "length", refused=refused)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + "..."
