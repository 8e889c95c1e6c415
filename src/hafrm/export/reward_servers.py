"""Replay golden scores on a running reward server: vLLM, SGLang or OpenRLHF, over HTTP.

`PROTOCOLS` follows vLLM's pooling entrypoints, SGLang's native /classify and OpenRLHF's serve_rm.
"""

import base64
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hafrm.errors import DataError, ServerError
from hafrm.export.plain_model import read_golden
from hafrm.results import Column, Table
from hafrm.run_folder import hide_secrets

SERVER_TOLERANCE = 1.5e-2
"""Relative to max(1, |reward|): servers run bfloat16. vLLM's own tests of reward models allow this."""
TIMEOUT = 60.0
"""Seconds for one answer."""
_BATCH_SIZE = 8


class OtherProtocolError(ServerError):
    """The server does not know the path or the request, or its answer has another form."""


class Protocol(NamedTuple):
    """One way to request rewards: the request holds `texts`, the answer `rows` with a `reward` each."""

    name: str
    path: str
    texts: str
    rows: str | None  # None: the answer is the rows itself
    reward: str | None  # None: a row is the reward
    options: Mapping[str, bool] = {}

    def rewards(self, answer: Any) -> list[Any]:
        """A reward for each text, perhaps in a list of its own; KeyError ... for another answer."""
        rows = answer if self.rows is None else answer[self.rows]
        if self.reward is None:
            return list(rows)
        rows = rows if isinstance(rows, list) else [rows]  # as SGLang answers a single text
        return [row[self.reward] for row in sorted(rows, key=lambda row: row.get("index", 0))]


_VLLM = {"use_activation": False, "add_special_tokens": False}
PROTOCOLS = (
    Protocol("vllm-classify", "/classify", "input", "data", "probs", _VLLM),
    Protocol("sglang-classify", "/classify", "text", None, "embedding"),
    Protocol("vllm-pooling", "/pooling", "input", "data", "data", _VLLM),
    Protocol("openrlhf", "/get_reward", "query", "rewards", None),
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
    ask = partial(_ask, base, api_key, model)
    reasons = []
    for protocol in (protocol for protocol in PROTOCOLS if path in ("", protocol.path)):
        try:
            ask(protocol, texts[:1])
            break
        except OtherProtocolError as error:
            reasons.append(f"\n  {protocol.name}: {error}")
    else:
        tried = "".join(reasons)
        raise ServerError(
            f"{hide_secrets(base)} speaks no protocol that hafrm knows. Tried:{tried}"
        )
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
        url=hide_secrets(url),
        protocol=protocol.name,
        num=len(lines),
        difference=largest,
        batch_difference=between,
        worst=texts[worst][-60:],
        expected=float(expected[worst]),
        got=float(got[way, worst]),
        tolerance=tolerance,
    )


def _ask(
    base: str, api_key: str | None, model: dict[str, str], protocol: Protocol, texts: list[str]
) -> list[float]:
    url = base + protocol.path
    answer = _request(url, api_key, {**model, protocol.texts: texts, **protocol.options})
    try:
        # a number for each text, or a list of one
        rewards = np.array(protocol.rewards(answer), dtype=np.float64).reshape(len(texts))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise OtherProtocolError(
            f"{hide_secrets(url)} does not give one reward for each of {len(texts)} texts: {error!r}; it "
            "may return embeddings, or have several labels"
        ) from error
    return [float(reward) for reward in rewards]


def _request(url: str, api_key: str | None, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON answer to a POST of `body`, or to a GET without one."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    # urllib takes no user:password@ in an address
    user, at, host = url.partition("://")[2].rpartition("@")
    if at and "/" not in user:
        basic = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        headers.setdefault("Authorization", f"Basic {basic}")
        url = f"{url.partition('://')[0]}://{host}"
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
