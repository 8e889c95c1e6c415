"""Small HTTP servers that answer as vLLM, SGLang and OpenRLHF do, with any rewards, for tests."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from support.chat_endpoint import as_json, serving_http

Rewards = Callable[[Sequence[str]], list[float]]
Server = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""Path and body to status and content."""
NOT_FOUND = 404, {"detail": "Not Found"}


def vllm(rewards: Rewards, *paths: str) -> Server:
    """`/classify`, `/pooling` and `/v1/models`; as vLLM does, it refuses what has no `input`."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "rm", "object": "model"}]}
        if path not in (paths or ("/classify", "/pooling")):
            return NOT_FOUND
        if "input" not in body or body.get("model") != "rm":
            return 400, {"error": {"message": "input is missing", "code": 400}}
        assert body["use_activation"] is False
        assert body["add_special_tokens"] is False
        values = rewards(body["input"])
        key = "data" if path == "/pooling" else "probs"
        rows = [{"index": k, key: [value]} for k, value in enumerate(values)]
        return 200, {"object": "list", "model": "rm", "data": rows[::-1]}

    return answer


def pooling_only(rewards: Rewards) -> Server:
    """A vLLM that was started without --convert classify."""
    return vllm(rewards, "/pooling")


def sglang(rewards: Rewards) -> Server:
    """Native `/classify` with `text`; one object, not a list, where it is asked for one text."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/classify":
            return NOT_FOUND
        if "text" not in body:
            return 400, {"error": {"message": "Either text or input_ids should be provided."}}
        rows = [{"embedding": [value]} for value in rewards(body["text"])]
        return 200, rows[0] if len(rows) == 1 else rows

    return answer


def openrlhf(rewards: Rewards) -> Server:
    """`/get_reward`, as openrlhf.cli.serve_rm."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/get_reward":
            return NOT_FOUND
        values = rewards(body["query"])
        return 200, {"rewards": values, "scores": values, "extra_logs": {"dummy": values}}

    return answer


def serving(answer: Server) -> AbstractContextManager[str]:
    """The address of a server on this machine that gives these answers while the block runs."""

    def encoded(path: str, body: dict[str, Any], key: str | None) -> tuple[int, dict, bytes]:
        status, content = answer(path, body | {"_authorization": key})
        is_raw = isinstance(content, bytes)
        return (status, {}, content) if is_raw else as_json(content, status)

    return serving_http(encoded)


def until_ready(client: Any) -> Any:
    """A client of `hafrm serve`, once the golden scores have been replayed."""
    for _ in range(200):
        if client.get("/ready").status_code == 200:
            return client
        time.sleep(0.01)
    raise AssertionError(client.get("/ready").json())
