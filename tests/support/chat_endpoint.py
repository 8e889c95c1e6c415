"""HTTP servers on this machine that answer as a test says, and one that speaks chat completions."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


@contextmanager
def serving_http(answer: Callable[[str, dict[str, Any], str | None], Answer]) -> Iterator[str]:
    """The address of a server that gives `answer(path, body, authorization)`; a GET's body is empty."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            status, headers, content = answer(self.path, body, self.headers.get("Authorization"))
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has given up waiting

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # of the usual 5, a burst is dropped and sent again a second later

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_json(content: Any, status: int = 200, **headers: str) -> Answer:
    """An answer in JSON."""
    return status, {"Content-Type": "application/json", **headers}, json.dumps(content).encode()


def says(*texts: str, finish: str = "stop", refusal: str | None = None) -> Answer:
    """A completion with these choices."""
    messages = [{"role": "assistant", "content": text, "refusal": refusal} for text in texts]
    choices = [{"index": i, "finish_reason": finish, "message": m} for i, m in enumerate(messages)]
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
    return as_json(body)


def fails(status: int, text: str = "no", **headers: str) -> Answer:
    """An error."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return as_json({"error": {"message": text}}, status, **named)


class FakeEndpoint:
    """Its address, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["m"]
        self.url = ""
        self.now = self.most_at_once = 0


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[FakeEndpoint]:
    """Serve `answer(request body)` until the block ends."""
    fake, lock = FakeEndpoint(), threading.Lock()

    def counted(path: str, body: dict[str, Any], key: str | None) -> Answer:
        if path.endswith("/models"):
            return as_json({"object": "list", "data": [{"id": name} for name in fake.models]})
        with lock:
            fake.asked.append(body)
            fake.keys.append(key)
            fake.now += 1
            fake.most_at_once = max(fake.most_at_once, fake.now)
        try:
            return answer(body)
        finally:
            with lock:
                fake.now -= 1

    with serving_http(counted) as url:
        fake.url = f"{url}/v1"
        yield fake
