"""The server of `hafrm serve`: routes of every protocol, keys, limits, readiness, metrics.

The event loop moves bytes only: one thread reads and tokenizes requests, another one runs the model. A
request's texts reach no log.
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from pydantic_core import from_json
from scipy import special
from starlette.applications import Starlette
from starlette.authentication import AuthenticationBackend, AuthenticationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from hafrm.errors import DataError, HafrmError, ServerError
from hafrm.preferences import TokenizedGroup
from hafrm.scoring.outputs import TOKENS, OutputScores
from hafrm.serving.backends import Backend, ConversationEncoder
from hafrm.serving.protocols import (
    PROTOCOLS,
    Dialogue,
    GroupsRequest,
    Protocol,
    Rendered,
    RequestError,
    RewardRequest,
)
from hafrm.serving.score_queue import ScoreQueue

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


_Prepared = tuple[list[TokenizedGroup], tuple[str, ...], Callable[[list[OutputScores]], Any]]
"""A request as token ids, the outputs that it needs, and how its answer is written."""


class RewardServer(AuthenticationBackend):
    """An app around a backend; `keys` empty: nobody needs one."""

    def __init__(self, backend: Backend, name: str, keys: Sequence[str] = ()) -> None:
        self.backend, self.name, self._reader = backend, name, ConversationEncoder(backend.encoder)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._encoding = ThreadPoolExecutor(1, "encoding")
        self.not_ready: str | None = "the golden scores are being replayed"
        self.difference: float | None = None
        self._count_metrics()
        paths = dict.fromkeys(["/score", *(protocol.path for protocol in PROTOCOLS)])
        routes = [Route(path, self._score, methods=["POST"]) for path in paths]
        others = {"/health": self._health, "/ready": self._ready, "/info": self._info}
        others |= {"/metrics": self._metrics, "/v1/models": self._models}
        routes += [Route(path, answer) for path, answer in others.items()]
        auth = Middleware(AuthenticationMiddleware, backend=self, on_error=_http_error)
        options: Any = {"exception_handlers": {HTTPException: _http_error}, "middleware": [auth]}
        options |= {"lifespan": self._lifespan, "max_body_size": MAX_BODY}
        self.app = Starlette(routes=routes, **options)

    def _count_metrics(self) -> None:
        self._registry = CollectorRegistry()  # of its own: several apps may live in one process
        own: Any = {"registry": self._registry}
        self._requests = Counter("hafrm_requests", "Answers", ["path", "status"], **own)
        self._seconds = Histogram("hafrm_request_seconds", "Time to answer", ["path"], **own)
        self._responses = Counter("hafrm_responses", "Scored responses", **own)
        self._golden = Gauge("hafrm_golden_difference", "Of the last replay, relative", **own)
        waiting = Gauge("hafrm_waiting_tokens", "Tokens that wait to be scored", **own)
        waiting.set_function(lambda: self.queue.waiting)
        ready = Gauge("hafrm_ready", "1 while the golden scores hold", **own)
        ready.set_function(lambda: float(self.not_ready is None))

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        tokens = {"batch_tokens": self.backend.batch_tokens, "max_waiting": MAX_WAITING}
        self.queue = ScoreQueue(self.backend.score, **tokens)
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            self.queue.close()
            self._encoding.shutdown()

    async def _watch(self) -> None:
        """Replay the golden scores; an upstream's again and again."""
        while True:
            try:
                self.difference = await self._replay()
                self._golden.set(self.difference)
                good = self.difference <= self.backend.tolerance  # False for NaN
                why = f"golden scores differ by {self.difference:.2g}, tolerated {self.backend.tolerance:g}"
                now = None if good else why
            except Exception as error:  # noqa: BLE001 - a dead watch would leave it ready
                now = f"the golden scores cannot be replayed: {error}"
            if now != self.not_ready:
                log.warning("scores are %s", f"refused: {now}" if now else "served")
            self.not_ready = now
            if self.backend.replay_every is None:
                return
            await asyncio.sleep(RETRY if now else self.backend.replay_every)

    async def _replay(self) -> float:
        """The largest difference to the golden scores, relative to max(1, |reward|)."""
        lines = self.backend.golden
        if not lines:
            log.warning("the model has no golden scores: that it serves right is not proved")
            return 0.0
        groups = self._reader.encode(
            [
                Dialogue(line.messages[:-1], [line.messages[-1]["content"]])
                if line.messages
                else Rendered(str(line.text))
                for line in lines
            ]
        )
        for line, group in zip(lines, groups, strict=True):
            ids = (*group.prompt_ids.tolist(), *group.response_ids[0].tolist())
            if line.input_ids not in (None, ids):
                raise DataError("tokenizer or template give a golden conversation other ids")
        got = [scores["reward"][0] for scores in await self.queue.submit(groups, ("reward",))]
        expected = np.array([line.reward for line in lines])
        return float((np.abs(got - expected) / np.maximum(1.0, np.abs(expected))).max())

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
        golden = {"num": len(backend.golden), "tolerance": backend.tolerance}
        golden["difference"] = self.difference or 0.0
        limits = {"max_length": encoder.lengths.max_length, "body": MAX_BODY, "items": MAX_ITEMS}
        about = {"model": self.name, **backend.about, "template": encoder.template_sha256}
        about["tokenizer"] = encoder.cache_key
        parts = {"outputs": backend.names, "golden": golden, "limits": limits}
        return JSONResponse({**about, **parts, "protocols": {p.name: p.path for p in PROTOCOLS}})

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def _score(self, request: Request) -> Response:
        path, start = request.url.path, time.monotonic()
        try:
            response = await self._answer(request)
        except HafrmError as error:
            response = _hafrm_error(error)
        except ClientDisconnect:
            response = Response(status_code=499)
        except HTTPException as error:
            response = _http_error(request, error)
        except Exception as error:  # noqa: BLE001 - its message may quote a text, and would be logged
            log.error("%s is answered 500: %s", path, type(error).__name__)
            response = _error(500, f"the server failed: {type(error).__name__}")
        self._requests.labels(path, response.status_code).inc()
        self._seconds.labels(path).observe(time.monotonic() - start)
        return response

    async def _answer(self, request: Request) -> Response:
        if self.not_ready is not None:
            return _error(503, self.not_ready, headers={"Retry-After": "10"})
        try:
            async with asyncio.timeout(SLOW):
                body = await request.body()
        except TimeoutError:
            return _error(408, f"no body in {SLOW:g} s", headers={"Connection": "close"})
        loop, path = asyncio.get_running_loop(), request.url.path
        prepare = loop.run_in_executor(self._encoding, self._prepare, path, body)
        groups, names, write = await prepare
        scores = await _unless_gone(request, self.queue.submit(groups, names))
        self._responses.inc(sum(len(group.response_ids) for group in groups))
        return JSONResponse(write(scores))

    def _prepare(self, path: str, body: bytes) -> _Prepared:
        asked, protocol = _parse(path, body)
        try:
            talks = asked.conversations()
        except ValueError as error:
            raise RequestError(422, str(error)) from error
        by, outputs = self.backend.names[0], ["reward"]  # `by`: what probabilities compare
        if isinstance(asked, GroupsRequest):
            outputs = [*asked.outputs, *[TOKENS] * asked.per_token]
        names = tuple(dict.fromkeys(by if name == "probability" else name for name in outputs))
        if lacking := set(names) - set(self.backend.names):
            raise RequestError(422, f"this server cannot give: {', '.join(sorted(lacking))}")
        num = sum(len(t.responses) if isinstance(t, Dialogue) else 1 for t in talks)
        if num > MAX_ITEMS:
            raise RequestError(413, f"{num:,} conversations, at most {MAX_ITEMS:,} are taken")
        groups = self._reader.encode(talks)

        def write(scores: list[OutputScores]) -> Any:
            if isinstance(asked, GroupsRequest):
                for group, own in zip(asked.groups, scores, strict=True):
                    if "probability" in outputs:
                        gaps = np.subtract(own[by], own[by][-1])  # the reference stands last
                        own["probability"] = special.expit(gaps).tolist()
                    own |= {name: own[name][: len(group.responses)] for name in own}
                named = [{name: own[name] for name in outputs} for own in scores]
                return {"model": self.name, "groups": named}
            assert protocol is not None
            answer = protocol.answer([r for own in scores for r in own["reward"]], asked)
            if protocol.rows != "data":
                return answer
            tokens = sum(group.num_tokens for group in groups)
            usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
            return {**answer, "model": self.name, "usage": usage}

        return groups, names, write


def _parse(path: str, body: bytes) -> tuple[RewardRequest, Protocol | None]:
    """The request of a route, and its protocol (None: the native one); RequestError for another body."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is no JSON: {error}") from error
    fitting = [p for p in PROTOCOLS if p.path == path]
    keys = value.keys() if isinstance(value, dict) else ()
    # two protocols may share a path: the one whose field is there
    protocol = next((p for p in fitting if {p.texts, p.ids} & {*keys}), (*fitting, None)[0])
    try:
        return (protocol.request if protocol else GroupsRequest).model_validate(value), protocol
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(422, f"{where}: {first['msg']}") from error


async def _unless_gone(request: Request, scores: Awaitable[Any]) -> Any:
    """What `scores` gives; cancelled, with ClientDisconnect, when the client hangs up before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(scores), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _error(status: int, message: str, index: int | None = None, **options: Any) -> JSONResponse:
    error = {"message": message, "code": status} | ({} if index is None else {"index": index})
    return JSONResponse({"error": error}, status, **options)


def _hafrm_error(error: HafrmError) -> JSONResponse:
    if not isinstance(error, RequestError):
        return _error(502 if isinstance(error, ServerError) else 500, str(error))
    after = error.retry_after
    headers = None if after is None else {"Retry-After": str(after)}
    return _error(error.status, str(error), error.index, headers=headers)


def _http_error(_: HTTPConnection, error: Any) -> JSONResponse:
    if isinstance(error, AuthenticationError):
        return _error(401, str(error), headers={"WWW-Authenticate": "Bearer"})
    return _error(error.status_code, error.detail, headers=error.headers)


class _ImpatientProtocol(H11Protocol):
    """Closes a connection whose headers are not complete in time, however steadily they drip in."""

    _due = 0.0

    def _wait(self) -> None:
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_at(
                self._due, self.timeout_keep_alive_handler
            )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._due = self.loop.time() + SLOW
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        self._due = self.loop.time() + SLOW
        super().on_response_complete()


def run_server(server: RewardServer, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then answer what has been accepted, and return."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises what it caught once more at the end: that would be its exit code
        signal.signal(number, lambda *_: None)
    options: Any = {"http": _ImpatientProtocol, "timeout_keep_alive": int(SLOW)}
    options |= {"log_config": None, "access_log": False, "server_header": False}
    uvicorn.Server(uvicorn.Config(server.app, host, port, **options)).run()
