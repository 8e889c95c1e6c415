"""A small HTTP server on this machine that speaks the chat-completions protocol as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


def says(*texts: str, finish: str = "stop", refusal: str | None = None) -> Answer:
    """A completion with these choices."""
    choices = [
        {
            "index": i,
            "finish_reason": finish,
            "message": {"role": "assistant", "content": text, "refusal": refusal},
        }
        for i, text in enumerate(texts)
    ]
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
    return 200, {}, json.dumps(body).encode()


def fails(status: int, text: str = "no", **headers: str) -> Answer:
    """An error."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": text}}).encode()


class FakeEndpoint:
    """Its address, and what it was asked."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["m"]
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self.url = ""

    def enter(self, body: dict[str, Any], key: str | None) -> None:
        with self._lock:
            self.asked.append(body)
            self.keys.append(key)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[FakeEndpoint]:
    """Serve `answer(request body)` until the block ends."""
    fake = FakeEndpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            data = {"object": "list", "data": [{"id": name} for name in fake.models]}
            self._send(200, {}, json.dumps(data).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.enter(body, self.headers.get("Authorization"))
            try:
                status, headers, content = fake.answer(body)
            finally:
                fake.leave()
            self._send(status, headers, content)

        def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has given up waiting

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
