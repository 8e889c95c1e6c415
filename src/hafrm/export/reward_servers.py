"""Replay golden scores on a running reward server: vLLM, SGLang or OpenRLHF, over HTTP.

`PROTOCOLS` follows vLLM's pooling entrypoints, SGLang's native /classify and OpenRLHF's serve_rm. The text
is the whole conversation, rendered. torch is not loaded: a machine without it can verify a server.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from hafrm.errors import DataError, ServerError
from hafrm.export.golden import read_golden
from hafrm.results import Column, Table

SERVER_TOLERANCE = 1.5e-2
"""Relative to max(1, |reward|): servers run bfloat16. vLLM's own tests of reward models allow this."""
TIMEOUT = 60.0
"""Seconds for one answer."""
_BATCH_SIZE = 8


class OtherProtocolError(ServerError):
    """The server does not know the path or the request, or its answer has another form."""


class Protocol(NamedTuple):
    """One way to request rewards."""

    name: str
    path: str
    request: Callable[[list[str]], dict[str, Any]]
    """The body for rendered conversations."""
    rewards: Callable[[Any], list[Any]]
    """A reward for each text, perhaps in a list of its own; KeyError or TypeError for another answer."""


def _vllm(texts: list[str]) -> dict[str, Any]:
    return {"input": texts, "use_activation": False, "add_special_tokens": False}


def _sorted(answer: Any, key: str) -> list[Any]:
    return [row[key] for row in sorted(answer["data"], key=lambda row: row["index"])]


def _embeddings(answer: Any) -> list[Any]:
    # a single text is answered by an object instead of a list
    return [row["embedding"] for row in (answer if isinstance(answer, list) else [answer])]


def _openrlhf(texts: list[str]) -> dict[str, Any]:
    return {"query": texts, "prompts": [""] * len(texts), "labels": [""] * len(texts)}


PROTOCOLS = (
    Protocol("vllm-classify", "/classify", _vllm, lambda answer: _sorted(answer, "probs")),
    Protocol("sglang-classify", "/classify", lambda t: {"text": t}, _embeddings),
    Protocol("vllm-pooling", "/pooling", _vllm, lambda answer: _sorted(answer, "data")),
    Protocol("openrlhf", "/get_reward", _openrlhf, lambda answer: list(answer["rewards"])),
)
"""In the order in which a server is tried."""


@dataclass(frozen=True)
class ServerReplay:
    """How a server's rewards compare with the golden ones."""

    ok: bool
    url: str
    protocol: str
    num: int  # conversations
    difference: float  # the largest to a golden reward, relative to max(1, |reward|)
    batch_difference: float  # the largest between a text alone and in a batch
    worst: str  # the end of the conversation with the largest difference
    expected: float
    got: float
    tolerance: float
    suspicion: str  # a known mistake that the differences look like; empty if none does

    def tables(self) -> tuple[Table, ...]:
        """Protocol, differences, and where they are largest."""
        rows = [
            ("protocol", self.protocol),
            ("golden scores", str(self.num)),
            ("largest difference", f"{self.difference:.2g}"),
            ("alone or in a batch", f"{self.batch_difference:.2g}"),
            ("tolerated", f"{self.tolerance:g} relative to max(1, |reward|)"),
        ]
        if not self.ok:
            rows.append(("where", f"{self.got:.5g} instead of {self.expected:.5g}: …{self.worst}"))
        verdict = f"the server {'gives' if self.ok else 'does NOT give'} the exported scores"
        verdict += f"; {self.suspicion}" if self.suspicion else ""
        return (Table(self.url, (Column(""), Column("")), tuple(rows), (verdict,)),)


def verify_server(
    url: str, golden: Path, *, api_key: str | None = None, tolerance: float = SERVER_TOLERANCE
) -> ServerReplay:
    """Send every golden conversation to a server, alone and in a batch, and compare the rewards.

    A `url` that ends in a protocol's path tries no other path. Raises DataError for a golden file without
    rendered texts, ServerError for a server without answers.
    """
    lines = read_golden(golden)
    texts = [line.text for line in lines if line.text is not None]
    if len(texts) < len(lines):
        raise DataError(f"{golden} has lines without rendered `text`; `hafrm export` writes it")
    base = url.rstrip("/")
    path = next((p.path for p in PROTOCOLS if base.endswith(p.path)), "")
    base = base.removesuffix(path)
    try:
        model = {"model": str(_request(f"{base}/v1/models", api_key)["data"][0]["id"])}
    except (OtherProtocolError, KeyError, IndexError, TypeError):
        model = {}  # only vLLM and SGLang name theirs

    def ask(protocol: Protocol, texts: list[str]) -> list[float]:
        where = base + protocol.path
        answer = _request(where, api_key, model | protocol.request(texts))
        return _read_rewards(protocol, answer, len(texts), where)

    reasons = []
    for protocol in (protocol for protocol in PROTOCOLS if path in ("", protocol.path)):
        try:
            ask(protocol, texts[:1])
            break
        except OtherProtocolError as error:
            reasons.append(f"\n  {protocol.name}: {error}")
    else:
        raise ServerError(f"{base} speaks no protocol that hafrm knows. Tried:{''.join(reasons)}")
    # Alone and in a batch, because servers differ in batching (sglang#2427).
    alone = [ask(protocol, [text])[0] for text in texts]
    batches = (texts[i : i + _BATCH_SIZE] for i in range(0, len(texts), _BATCH_SIZE))
    got = np.array([alone, [reward for batch in batches for reward in ask(protocol, batch)]])
    expected = np.array([line.reward for line in lines])
    differences = np.abs(got - expected) / np.maximum(1.0, np.abs(expected))
    way, worst = np.unravel_index(np.argmax(differences), differences.shape)  # NaN is the largest
    between = float((np.abs(got[0] - got[1]) / np.maximum(1.0, np.abs(got[0]))).max())
    largest = float(differences[way, worst])
    return ServerReplay(
        ok=largest <= tolerance and between <= tolerance,  # False for NaN
        url=url,
        protocol=protocol.name,
        num=len(lines),
        difference=largest,
        batch_difference=between,
        worst=texts[worst][-60:],
        expected=float(expected[worst]),
        got=float(got[way, worst]),
        tolerance=tolerance,
        suspicion="" if largest <= tolerance else _suspicion(expected, got[0], tolerance),
    )


def _read_rewards(protocol: Protocol, answer: Any, num: int, where: str) -> list[float]:
    try:
        # a number for each text, or a list of one
        rewards = np.array(protocol.rewards(answer), dtype=np.float64).reshape(num)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise OtherProtocolError(
            f"{where} does not give one reward for each of {num} texts: {error!r}; it may return "
            "embeddings, or have several labels"
        ) from error
    return [float(reward) for reward in rewards]


def _request(url: str, api_key: str | None, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON answer to a POST of `body`, or to a GET without one."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)  # noqa: S310 - the caller gives http
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            details = " ".join(error.read().decode("utf-8", "replace").split())[:300]
        hint = " (it wants another --api-key)" if error.code in (401, 403) else ""
        # other codes, such as 401 and 503, have nothing to do with the protocol and end the search
        is_other = error.code in (400, 404, 405, 415, 422, 500, 501)
        kind = OtherProtocolError if is_other else ServerError
        raise kind(f"{url} answers {error.code} {error.reason}{hint} | {details}") from error
    except ValueError as error:
        raise OtherProtocolError(f"{url} does not answer JSON: {error}") from error
    except (OSError, http.client.HTTPException) as error:  # a time-out too
        raise ServerError(f"{url} gives no answer: {error}; is the server up?") from error


def _suspicion(
    expected: Float[np.ndarray, " texts"], got: Float[np.ndarray, " texts"], tolerance: float
) -> str:
    """The known mistake of servers that wrong rewards look like."""
    if (got == 1.0).all():
        return "every reward is 1: a softmax over one label (SGLang's /v1/classify does that)"
    sigmoids = 1.0 / (1.0 + np.exp(-np.maximum(expected, -700.0)))  # exp overflows above 709
    if (np.abs(got - sigmoids) <= tolerance).all():
        return "these are sigmoids of the rewards: the server's problem_type is not regression"
    if len(got) > 2 and len(set(got.tolist())) == 1:
        return "every conversation gets the same reward: the text is cut, or read at a pad"
    return ""
