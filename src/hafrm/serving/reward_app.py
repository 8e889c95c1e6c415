"""The server of `hafrm serve`: routes of every protocol, keys, limits, readiness, metrics.

The event loop only moves bytes: one thread reads and tokenizes requests, another one runs the model. The
texts of requests are never logged.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.authentication import AuthenticationBackend, AuthenticationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from hafrm.errors import ConfigError, HafrmError, ServerError
from hafrm.preferences import TokenizedGroup
from hafrm.serving.backends import Backend, ConversationEncoder
from hafrm.serving.protocols import (
    PROTOCOLS,
    Asked,
    Dialogue,
    Rendered,
    RequestError,
    read_request,
)
from hafrm.serving.score_queue import ScoreQueue
from hafrm.serving.server_checks import relative_differences, reward_spread

log = logging.getLogger("hafrm")

MAX_BODY = 16 * 2**20
"""Bytes of a request."""
MAX_ITEMS = 8192
"""Conversations of a request."""
MAX_WAITING = 2**22
"""Tokens that may wait: more are answered 429."""
RETRY = 10.0
"""Seconds until an upstream that failed its golden scores is asked again."""
SLOW = 30.0
"""Seconds in which a client must have sent its headers, and then its body."""
_LATER = {"Retry-After": "10"}


class RewardServer(AuthenticationBackend):
    """An app around a backend; if `keys` is empty, no key is needed."""

    def __init__(self, backend: Backend, name: str, keys: Sequence[str] = ()) -> None:
        self.backend, self.name, self._reader = backend, name, ConversationEncoder(backend.encoder)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._encoding = ThreadPoolExecutor(1, "encoding")
        self.not_ready: str | None = "the golden scores are being replayed"
        self.difference = 0.0
        self._count_metrics()
        paths = {"/score", *(protocol.path for protocol in PROTOCOLS)}
        routes = [Route(path, self._score, methods=["POST"]) for path in paths]
        others = {"/health": self._health, "/ready": self._ready, "/info": self._info}
        others |= {"/metrics": self._metrics, "/v1/models": self._models}
        routes += [Route(path, answer) for path, answer in others.items()]
        auth = Middleware(AuthenticationMiddleware, backend=self, on_error=_refuse)
        options: Any = {"exception_handlers": {HTTPException: _refuse}, "middleware": [auth]}
        options |= {"lifespan": self._lifespan, "max_body_size": MAX_BODY}
        self.app = Starlette(routes=routes, **options)

    def _count_metrics(self) -> None:
        self._registry = CollectorRegistry()  # not global: several apps may live in one process
        own: Any = {"registry": self._registry}
        self._requests = Counter("hafrm_requests", "Answers", ["path", "status"], **own)
        self._seconds = Histogram("hafrm_request_seconds", "Time to answer", ["path"], **own)
        self._responses = Counter("hafrm_responses", "Scored responses", **own)
        for name, what, value in (
            ("hafrm_golden_difference", "Of the last replay, relative", lambda: self.difference),
            ("hafrm_waiting_tokens", "Tokens that wait to be scored", lambda: self.queue.waiting),
            ("hafrm_ready", "1 while the golden scores hold", lambda: self.not_ready is None),
        ):
            Gauge(name, what, **own).set_function(value)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        tokens = {"batch_tokens": self.backend.batch_tokens, "max_waiting": MAX_WAITING}
        self.queue = ScoreQueue(self.backend.score, **tokens)
        watch = asyncio.create_task(self._watch())
        yield
        watch.cancel()
        self.queue.close()
        self._encoding.shutdown()

    async def _watch(self) -> None:
        """Replay the golden scores; for an upstream, repeatedly."""
        while True:
            try:
                self.difference = await self._replay()
                tolerance = self.backend.tolerance
                why = f"golden scores differ by {self.difference:.2g}, tolerated {tolerance:.2g}"
                now = None if self.difference <= tolerance else why  # not None for NaN
            except Exception as error:  # noqa: BLE001 - a dead watch would leave it ready
                now = f"the golden scores cannot be replayed: {error}"
            if now != self.not_ready:
                log.warning("scores are %s", f"refused: {now}" if now else "served")
            self.not_ready = now
            if self.backend.replay_every is None:
                return
            await asyncio.sleep(RETRY if now else self.backend.replay_every)

    async def _replay(self) -> float:
        """The largest difference to the golden scores, as `relative_differences` measures it."""
        lines = self.backend.golden
        if not lines:
            log.warning("the model has no golden scores: that it serves right is not proved")
            return 0.0
        talks = [
            Dialogue(line.messages[:-1], [line.messages[-1]["content"]])
            if line.messages
            else Rendered(str(line.text))
            for line in lines
        ]
        scores = await self.queue.submit(self._reader.encode(talks), ("reward",))
        expected = [line.reward for line in lines]
        got = [own["reward"][0] for own in scores]
        return float(relative_differences(got, expected, reward_spread(lines)).max())

    async def authenticate(self, conn: HTTPConnection) -> None:
        """starlette's hook: AuthenticationError without a right bearer key."""
        kind, _, key = conn.headers.get("Authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # every key is compared, each in constant time
        right = [secrets.compare_digest(digest, own) for own in self._keys]
        is_open = not self._keys or conn.url.path == "/health"
        if not is_open and not (kind.lower() == "bearer" and any(right)):
            self._requests.labels("unauthorised", 401).inc()
            raise AuthenticationError("this server needs Authorization: Bearer KEY")

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        body = {"ready": self.not_ready is None, "reason": self.not_ready}
        return JSONResponse(body, 200 if self.not_ready is None else 503)

    async def _info(self, _: Request) -> Response:
        encoder, backend = self.backend.encoder, self.backend
        about = {"model": self.name, **backend.about, "template": encoder.template_sha256}
        golden = {"num": len(backend.golden), "difference": self.difference}
        limits = {"max_length": encoder.lengths.max_length, "body": MAX_BODY, "items": MAX_ITEMS}
        parts = {"outputs": backend.names, "golden": golden, "limits": limits}
        parts["protocols"] = {p.name: p.path for p in PROTOCOLS}
        return JSONResponse({**about, "tokenizer": encoder.cache_key, **parts})

    async def _models(self, _: Request) -> Response:  # asked for first by vLLM's examples
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")

    async def _score(self, request: Request) -> Response:
        path, start = request.url.path, time.monotonic()
        try:
            response: Response = JSONResponse(await self._answer(request))
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception as error:  # noqa: BLE001 - its message may quote a text, and would be logged
            response = _refuse(request, error)
        self._requests.labels(path, response.status_code).inc()
        self._seconds.labels(path).observe(time.monotonic() - start)
        return response

    async def _answer(self, request: Request) -> Any:
        if self.not_ready is not None:
            raise RequestError(503, self.not_ready)
        try:
            body = await asyncio.wait_for(request.body(), SLOW)
        except TimeoutError as error:
            raise RequestError(408, f"no body in {SLOW:g} s") from error
        run, path = asyncio.get_running_loop().run_in_executor, request.url.path
        groups, asked = await run(self._encoding, self._prepare, path, body)
        scores = asyncio.create_task(self.queue.submit(groups, asked.outputs))
        # the body has been read: the only message that can still come is that the client hangs up
        gone = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait((scores, gone), return_when=asyncio.FIRST_COMPLETED)
            if not scores.done():
                raise ClientDisconnect
            answer = asked.answer(await scores)
        finally:
            scores.cancel()
            gone.cancel()
        self._responses.inc(sum(len(group.response_ids) for group in groups))
        return answer

    def _prepare(self, path: str, body: bytes) -> tuple[list[TokenizedGroup], Asked]:
        asked = read_request(path, body, by=self.backend.names[0])
        if lacking := set(asked.outputs) - set(self.backend.names):
            raise RequestError(422, f"this server cannot give: {', '.join(sorted(lacking))}")
        talks = asked.conversations
        num = sum(len(t.responses) if isinstance(t, Dialogue) else 1 for t in talks)
        if num > MAX_ITEMS:
            raise RequestError(413, f"{num:,} conversations, at most {MAX_ITEMS:,} are taken")
        return self._reader.encode(talks), asked


def _refuse(conn: HTTPConnection, error: Exception) -> JSONResponse:
    """The answer to a request that gets no scores."""
    status, message, headers = 500, str(error), dict[str, str]()
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, ServerError):
        status = 502
    elif isinstance(error, AuthenticationError):
        status, headers = 401, {"WWW-Authenticate": "Bearer"}
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, dict(error.headers or {})
    elif not isinstance(error, HafrmError):  # its message may quote a text
        message = f"the server failed: {type(error).__name__}"
        log.error("%s is answered 500: %s", conn.url.path, type(error).__name__)
    headers |= {408: {"Connection": "close"}, 429: _LATER, 503: _LATER}.get(status, {})
    index = getattr(error, "index", None)
    place = {} if index is None else {"index": index}
    return JSONResponse({"error": {"message": message, "code": status, **place}}, status, headers)


class _ImpatientProtocol(H11Protocol):
    """Closes a connection if two checks find it between the same requests, even if headers trickle in."""

    _seen: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(SLOW, self._check)

    def _check(self) -> None:
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and self._seen is self.cycle:
            self.transport.close()
        if not self.transport.is_closing():
            self._seen = self.cycle if is_waiting else "busy"
            self.loop.call_later(SLOW, self._check)


def check_port(host: str, port: int) -> None:
    """Raise ConfigError if nothing can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        problem = os.strerror(number) if number and number > 0 else error
        raise ConfigError(
            f"cannot listen at {host}, port {port} ({problem}): give another --port or --host"
        ) from error


def run_server(server: RewardServer, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then answer what has been accepted, and return."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signals that it caught again at its end: that would set the exit code
        signal.signal(number, lambda *_: None)
    options: Any = {"http": _ImpatientProtocol, "timeout_keep_alive": int(SLOW)}
    options |= {"log_config": None, "access_log": False, "server_header": False}
    uvicorn.Server(uvicorn.Config(server.app, host, port, **options)).run()
