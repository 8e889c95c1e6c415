"""Small HTTP servers that answer as vLLM, SGLang and OpenRLHF do, with any rewards, for tests."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rewards = Callable[[Sequence[str]], list[float]]
Answer = tuple[int, Any]


def vllm(rewards: Rewards) -> Callable[[str, dict[str, Any]], Answer]:
    """`/classify`, `/pooling` and `/v1/models`; as vLLM does, it refuses what has no `input`."""

    def answer(path: str, body: dict[str, Any]) -> Answer:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "rm", "object": "model"}]}
        if path not in ("/classify", "/pooling"):
            return 404, {"detail": "Not Found"}
        if "input" not in body or body.get("model") != "rm":
            return 400, {"error": {"message": "input is missing", "code": 400}}
        assert body["use_activation"] is False
        assert body["add_special_tokens"] is False
        values = rewards(body["input"])
        rows = [
            {"index": k, "object": "pooling", "data": [value]}
            if path == "/pooling"
            else {"index": k, "label": "LABEL_0", "probs": [value], "num_classes": 1}
            for k, value in enumerate(values)
        ]
        return 200, {"object": "list", "model": "rm", "data": rows[::-1]}

    return answer


def pooling_only(rewards: Rewards) -> Callable[[str, dict[str, Any]], Answer]:
    """A vLLM that was started without --convert classify."""
    inner = vllm(rewards)
    return lambda path, body: (404, {}) if path == "/classify" else inner(path, body)


def sglang(rewards: Rewards) -> Callable[[str, dict[str, Any]], Answer]:
    """Native `/classify` with `text`; one object, not a list, where it is asked for one text."""

    def answer(path: str, body: dict[str, Any]) -> Answer:
        if path != "/classify":
            return 404, {"detail": "Not Found"}
        if "text" not in body:
            return 400, {"error": {"message": "Either text or input_ids should be provided."}}
        rows = [
            {"embedding": [value], "meta_info": {"prompt_tokens": 3}}
            for value in rewards(body["text"])
        ]
        return 200, rows[0] if len(rows) == 1 else rows

    return answer


def openrlhf(rewards: Rewards) -> Callable[[str, dict[str, Any]], Answer]:
    """`/get_reward`, as openrlhf.cli.serve_rm."""

    def answer(path: str, body: dict[str, Any]) -> Answer:
        if path != "/get_reward":
            return 404, {"detail": "Not Found"}
        values = rewards(body["query"])
        return 200, {"rewards": values, "scores": values, "extra_logs": {"dummy": values}}

    return answer


@contextmanager
def serving(answer: Callable[[str, dict[str, Any]], Answer]) -> Iterator[str]:
    """The address of a server on this machine that gives these answers while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._give(*answer(self.path, {}))

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(content) | {"_authorization": self.headers.get("Authorization")}
            self._give(*answer(self.path, body))

        def _give(self, status: int, content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
