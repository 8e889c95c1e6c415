"""Any OpenAI-compatible endpoint: many chat requests at a time, replies kept on disk.

The openai client repeats what may work the next time (rate limits, server errors, lost connections). A
request that the endpoint rejects (too long, say) becomes a reply with an `error`; what no repetition can
fix ends the job. Replies are cached under the whole request, never with the key, so the same job called
again asks for the rest only.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hafrm.errors import ConfigError, ServerError
from hafrm.preferences import Message
from hafrm.resumable import cache_folder

_REJECTED = {400, 413, 422}
"""What is wrong with one request and may be right with the next."""


@dataclass(frozen=True)
class EndpointOptions:
    """Where an endpoint is and how it is used; the last four do not change its replies."""

    url: str
    """Up to and without /chat/completions, such as http://localhost:8000/v1."""
    model: str | None = None
    """None: the only one that the endpoint lists."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Added to every request; None removes a setting."""
    concurrency: int = 8
    timeout: float = 120.0
    """Seconds for one request."""
    retries: int = 6
    """Of one request after its first try."""
    key_variables: tuple[str, ...] = ("OPENAI_API_KEY",)
    """Environment variables; the first that is set is the API key."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"an endpoint is given as http://... or https://..., got {self.url!r}"
            )


@dataclass(frozen=True)
class Choice:
    """One answer of a model."""

    text: str
    refused: bool
    """The endpoint says that the model refused, or filtered what it wrote."""
    ended: bool
    """The model ended by itself, not at the token limit."""


@dataclass(frozen=True)
class Reply:
    """The answers to one request."""

    choices: tuple[Choice, ...]
    error: str | None = None
    """Why the endpoint rejected the request; then there are no choices."""


class Endpoint:
    """A chat model behind an endpoint."""

    def __init__(self, options: EndpointOptions, cache: Path | None = None) -> None:
        """Replies are kept in the folder `cache`, by default under the user's cache folder.

        Raises ConfigError where the extra `judge` is missing.
        """
        try:
            import diskcache  # noqa: PLC0415 - an extra
            import openai  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ConfigError(
                f"endpoints need the package {error.name}: pip install 'hafrm[judge]'"
            ) from error
        self.options = options
        self._openai = openai
        self._cache = diskcache.Cache(str(cache or cache_folder("replies")))
        keys = [os.environ[name] for name in options.key_variables if os.environ.get(name)]
        self._client = openai.OpenAI(
            base_url=options.url,
            api_key=keys[0] if keys else "none",
            timeout=options.timeout,
            max_retries=options.retries,
        )
        self._model = options.model

    @property
    def model(self) -> str:
        """The model's name, asked for where none was given.

        Raises ServerError when the endpoint does not list exactly one.
        """
        if self._model is None:
            try:
                names = [model.id for model in self._client.models.list()]
            except self._openai.OpenAIError as error:
                raise self._unusable(error) from error
            if len(names) != 1:
                raise ServerError(
                    f"{self.options.url} has {len(names)} models ({', '.join(names[:8])}); name one of "
                    "them (--set policy.model=NAME, --set judge.model=NAME)"
                )
            self._model = names[0]
        return self._model

    def ask(
        self,
        conversations: Sequence[Sequence[Message]],
        settings: Mapping[str, Any],
        *,
        repetition: tuple[int, ...] = (),
    ) -> list[Reply]:
        """A reply to each conversation, in order, all with the same settings.

        `repetition` distinguishes repeated requests, which the cache would otherwise answer alike.
        Raises ServerError when the endpoint cannot be used.
        """
        bodies = [self._body(messages, settings) for messages in conversations]
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            futures = [pool.submit(self._reply, body, repetition) for body in bodies]
            try:
                return [future.result() for future in futures]
            except ServerError:
                pool.shutdown(cancel_futures=True)
                raise

    def _body(self, messages: Sequence[Message], settings: Mapping[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            **settings,
            **self.options.request,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _reply(self, body: dict[str, Any], repetition: tuple[int, ...]) -> Reply:
        request = {"url": self.options.url, "body": body, "repetition": list(repetition)}
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode("ascii")).hexdigest()
        content = self._cache.get(key)
        if content is not None:
            return Reply(_choices(json.loads(content)))
        # settings that the client does not know (top_k, a template's options) travel as they are
        extra = {name: v for name, v in body.items() if name not in ("model", "messages")}
        create = self._client.chat.completions.with_raw_response.create
        try:
            response = create(model=body["model"], messages=body["messages"], extra_body=extra)
            content = response.http_response.text
            choices = _choices(json.loads(content))
        except self._openai.APIStatusError as error:
            if error.status_code in _REJECTED:
                return Reply((), f"status {error.status_code}: {_one_line(error.response.text)}")
            raise self._unusable(error) from error
        except self._openai.OpenAIError as error:
            raise self._unusable(error) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = f"an answer that is no chat completion: {_one_line(content)}"
            raise self._unusable(text) from error
        self._cache.set(key, content)
        return Reply(choices)

    def _unusable(self, reason: object) -> ServerError:
        keys = " or ".join(self.options.key_variables)
        return ServerError(
            f"{self.options.url} cannot be used: {_one_line(str(reason))}. Check that the address (it "
            f"usually ends in /v1), the model and the key ({keys}) are right and the server is up; its "
            "answers so far are kept, and the same command resumes"
        )


def require_some(replies: Sequence[Reply], url: str) -> None:
    """Raises ServerError when every one of several requests was rejected: the settings are wrong."""
    if replies and all(reply.error is not None for reply in replies):
        raise ServerError(
            f"{url} rejects every request, such as with {replies[0].error}; change what is asked for "
            "(--set policy.request='{name: value}', null removes a setting)"
        )


def _choices(body: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The answers in a chat completion; raises KeyError, TypeError or ValueError where it is none."""
    choices = []
    for choice in body["choices"]:
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        if text is not None and not isinstance(text, str):
            raise TypeError("the content is not text")
        refused = bool(message.get("refusal")) or reason == "content_filter"
        choices.append(Choice(text or "", refused, reason != "length"))
    if not choices:
        raise ValueError("no choices")
    return tuple(choices)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + "..."
