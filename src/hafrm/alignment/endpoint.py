"""Any OpenAI-compatible endpoint: many chat requests at a time, repeated where that helps, kept on disk.

Rate limits, server errors, lost connections and nonsense are tried again, after growing pauses or what
`Retry-After` says, which every worker then keeps. A single request that the endpoint rejects (too long,
say) is a reply with an `error`; what no repetition can mend ends the job. What was answered is cached,
so the same job called again asks for the rest only.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hafrm.alignment.replies import Reply, choices_of, retry_after, shortened
from hafrm.alignment.reply_cache import ReplyCache, request_key
from hafrm.errors import ConfigError, ServerError
from hafrm.preferences import Message

Result = TypeVar("Result")

_REJECTED = {400, 413, 422}
"""What is wrong with one request and may be right with the next."""
_TRANSIENT = {408, 409, 425, 429}
"""Tried again, as are all from 500."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
LONGEST_WAIT = 900.0
"""Seconds that `Retry-After` may ask of one request, all in all, before the job is ended instead."""


@dataclass(frozen=True)
class EndpointOptions:
    """Where an endpoint is and how it is used; the last four do not change its replies."""

    url: str
    """Up to and without /chat/completions, such as http://localhost:8000/v1."""
    model: str | None = None
    """None: the only one that the endpoint lists."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Added to every request; None takes a setting out."""
    concurrency: int = 8
    timeout: float = 120.0
    """Seconds for one request."""
    retries: int = 6
    """Of one request after its first try; what `Retry-After` asks for does not count."""
    key_variables: tuple[str, ...] = ("OPENAI_API_KEY",)
    """Environment variables of which the first that is set is the API key."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"an endpoint is given as http://... or https://..., got {self.url!r}"
            )
        if self.concurrency < 1:
            raise ConfigError(f"concurrency must be 1 or more, got {self.concurrency}")
        if not self.timeout > 0:
            raise ConfigError(f"timeout must be above 0 seconds, got {self.timeout}")
        if self.retries < 0:
            raise ConfigError(f"retries must be 0 or more, got {self.retries}")


class _TransientError(Exception):
    """Worth another try, after `wait` seconds where the endpoint said so; `astray` where it may not be the
    endpoint that was meant."""

    def __init__(self, what: str, wait: float | None = None, *, astray: bool = False) -> None:
        super().__init__(what)
        self.wait, self.astray = wait, astray


class _RejectedError(Exception):
    """This one request is wrong."""


class Endpoint:
    """A chat model behind an endpoint."""

    def __init__(self, options: EndpointOptions, cache: ReplyCache | None = None) -> None:
        """Raises ConfigError where the openai client is missing."""
        try:
            import openai  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ConfigError(
                "endpoints are spoken to by the openai client, which is not installed: "
                "pip install 'hafrm[judge]'"
            ) from error
        self.options, self.cache = options, cache
        keys = [os.environ[name] for name in options.key_variables if os.environ.get(name)]
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=options.url,
            api_key=keys[0] if keys else "none",
            timeout=options.timeout,
            max_retries=0,  # ours, because all workers must keep a rate limit's pause
        )
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._answered = False
        self._not_before = 0.0
        self._model = options.model

    @property
    def model(self) -> str:
        """The model's name; asked for where none was given.

        Raises ServerError when there is not exactly one.
        """
        if self._model is None:
            try:
                listed = self._tried("models", self._client.models.with_raw_response.list)
            except _RejectedError as rejected:
                raise self._useless(str(rejected)) from rejected
            names = [str(each["id"]) for each in listed.get("data", ())]
            if len(names) != 1:
                raise ServerError(
                    f"{self.options.url} has {len(names)} models ({', '.join(names[:8])}); name one of "
                    "them (--endpoint-model, --judge-model)"
                )
            self._model = names[0]
        return self._model

    def ask(
        self,
        conversations: Sequence[Sequence[Message]],
        settings: Mapping[str, Any],
        *,
        repetition: tuple[int, ...] = (),
        done: Callable[[int, int], None] | None = None,
    ) -> list[Reply]:
        """A reply to each conversation, in order, all asked for with the same settings.

        `repetition` tells repeated requests apart, which the cache would answer alike otherwise;
        `done(replies, 0)` hears of each. Raises ServerError when the endpoint cannot be used.
        """
        bodies = [self._body(messages, settings) for messages in conversations]
        replies = []
        pool = ThreadPoolExecutor(self.options.concurrency)
        try:
            for future in [pool.submit(self._reply, body, repetition) for body in bodies]:
                replies.append(future.result())
                if done is not None:
                    done(1, 0)
        finally:
            self._stopped.set()  # whoever still waits to try again gives up
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()
        return replies

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
        known = None if self.cache is None else self.cache.get(request)
        if known is None:
            extra = {name: v for name, v in body.items() if name not in ("model", "messages")}
            create = self._client.chat.completions.with_raw_response.create
            try:
                known = self._tried(
                    request_key(request),
                    lambda: create(
                        model=body["model"], messages=body["messages"], extra_body=extra
                    ),
                    check=choices_of,
                )
            except _RejectedError as rejected:
                return Reply((), str(rejected))
            if self.cache is not None:
                self.cache.put(request, known)
        return Reply(choices_of(known))

    def _tried(
        self, key: str, call: Callable[[], Any], check: Callable[[Any], object] = dict
    ) -> dict[str, Any]:
        """The body of a response that `check` accepts, after as many tries as it takes."""
        attempt, waited = 0, 0.0
        while True:
            self._wait()
            try:
                body = self._called(call, check)
            except _TransientError as failure:
                if failure.wait is None:
                    self._pause(attempt, key, failure)
                    attempt += 1
                else:
                    waited += self._hold(failure, failure.wait, waited)
            else:
                self._answered = True
                return body

    def _called(self, call: Callable[[], Any], check: Callable[[Any], object]) -> dict[str, Any]:
        """One request; raises what is to be done about a failure."""
        try:
            response = call().http_response
        except self._openai.APIStatusError as error:
            status, text = error.status_code, shortened(error.response.text or error.message)
            what = f"status {status}: {text}"
            if status in _REJECTED:
                raise _RejectedError(what) from error
            if status in _TRANSIENT or status >= 500:
                raise _TransientError(what, retry_after(error.response.headers)) from error
            raise self._useless(what) from error
        except self._openai.APITimeoutError as error:
            what = f"no answer within {self.options.timeout:g} s (--timeout)"
            raise _TransientError(what) from error
        except self._openai.APIConnectionError as error:
            raise _TransientError(f"{error} ({error.__cause__})", astray=True) from error
        try:
            body: dict[str, Any] = json.loads(response.content)
            check(body)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"an answer in no known form: {shortened(response.text)}"
            raise _TransientError(what, astray=True) from error
        return body

    def _pause(self, attempt: int, key: str, failure: _TransientError) -> None:
        """Let time pass after a failed try; raises ServerError instead after the last one."""
        # An address at which nobody has answered yet is more likely wrong than busy.
        few = failure.astray and not self._answered
        if attempt >= min(self.options.retries, 2 if few else self.options.retries):
            raise self._useless(f"{failure}, {attempt + 1} times") from failure
        # Spread by the request's own digest, so that workers do not come back all at once.
        spread = 1 + int(request_key({"key": key})[:4], 16) / 0xFFFF / 4
        self._sleep(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) * spread)

    def _hold(self, failure: _TransientError, wait: float, waited: float) -> float:
        """Keep all workers back for what the endpoint asks; the seconds, at least a short pause."""
        wait = max(wait, _FIRST_PAUSE)
        if waited + wait > LONGEST_WAIT:
            raise self._useless(f"{failure}; it asks to wait {wait:.0f} s more") from failure
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + wait)
        return wait

    def _wait(self) -> None:
        """Keep the pause that a rate limit asked for."""
        while (left := self._not_before - time.monotonic()) > 0:
            self._sleep(left)

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise ServerError("another request has failed")

    def _useless(self, what: str) -> ServerError:
        return ServerError(
            f"{self.options.url} cannot be used: {what}. See that the address (it usually ends in /v1), "
            f"the model and the key ({' or '.join(self.options.key_variables)}) are right and the server "
            "is up; what it has answered is kept, and the same command asks for the rest"
        )


def require_some(replies: Sequence[Reply], url: str) -> None:
    """Raises ServerError when every one of several requests was rejected: then they are at fault."""
    if replies and all(reply.error is not None for reply in replies):
        raise ServerError(
            f"{url} rejects every request, such as with {replies[0].error}; change what is asked for "
            "(--request name=value, or name=null to leave a setting out)"
        )
