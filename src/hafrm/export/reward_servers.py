"""Replay golden scores on a running reward server: vLLM, SGLang or OpenRLHF, over HTTP.

Request and answer follow vLLM's pooling entrypoints, SGLang's native /classify and OpenRLHF's serve_rm. The
text is the whole conversation, rendered by the exported template with its special tokens; the server must
not add a second BOS, nor apply a sigmoid. Each conversation is sent alone and in a batch, because servers
differ in batching. Only the standard library is used, so this works on a machine without torch.
"""

import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafrm.errors import ConfigError, DataError, ServerError
from hafrm.export.golden import GoldenLine, read_golden
from hafrm.table import Column, Table

SERVER_TOLERANCE = 1.5e-2
"""Relative to max(1, |reward|): servers run bfloat16. vLLM's own tests of reward models allow this."""
_BATCH_SIZE = 8
_OTHER_PROTOCOL = (400, 404, 405, 415, 422, 500, 501)
"""HTTP codes of a server that does not speak the protocol; other codes end the search."""
_EXPLANATIONS = {
    401: "it wants an API key (--api-key)",
    403: "the API key is not accepted",
    404: "it has no such path",
    422: "it cannot read the request: it speaks another protocol",
    429: "it is overloaded; try again",
    503: "it is not ready; try again",
}


@dataclass(frozen=True)
class Address:
    """A server's URL and how to connect to it."""

    url: str
    """Without a trailing slash."""
    api_key: str | None = None
    """Sent as a bearer token."""
    timeout: float = 60.0
    """Seconds for one answer."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"a server's address begins with http:// or https://, got {self.url}")


class HttpStatusError(ServerError):
    """The server answered with an error code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class AnswerShapeError(ServerError):
    """The answer has another form than the protocol's."""


@dataclass(frozen=True)
class Protocol:
    """One way to request rewards."""

    name: str
    path: str
    request: Callable[[Sequence[str], dict[str, Any]], dict[str, Any]]
    """The body for rendered conversations; the second argument names the model, if the server does."""
    rewards: Callable[[Any], list[float]]
    """The rewards in an answer; raises AnswerShapeError for another shape."""
    adds_bos: bool = False
    """Whether the server always tokenizes with added special tokens."""


def _vllm_request(texts: Sequence[str], model: dict[str, Any]) -> dict[str, Any]:
    return {**model, "input": list(texts), "use_activation": False, "add_special_tokens": False}


def _openrlhf_request(texts: Sequence[str], _: dict[str, Any]) -> dict[str, Any]:
    return {"query": list(texts), "prompts": [""] * len(texts), "labels": [""] * len(texts)}


def _openrlhf_rewards(answer: Any) -> list[float]:
    fields = answer if isinstance(answer, Mapping) else {}
    values = fields.get("rewards", fields.get("scores"))
    if not isinstance(values, list):
        raise AnswerShapeError("the answer has neither `rewards` nor `scores`")
    return [_number(value) for value in values]


def _get(answer: Any, key: str) -> Any:
    if not isinstance(answer, Mapping) or key not in answer:
        raise AnswerShapeError(f"the answer has no `{key}`")
    return answer[key]


def _single_rewards(rows: Any, key: str) -> list[float]:
    """The one number that each row has under `key`, by the rows' `index` if they have one."""
    if not isinstance(rows, list):
        raise AnswerShapeError(f"the answer has a {type(rows).__name__} instead of a list")
    if all(isinstance(row, Mapping) and isinstance(row.get("index"), int) for row in rows):
        rows = sorted(rows, key=lambda row: row["index"])
    values = [_get(row, key) for row in rows]
    longest = max((len(v) for v in values if isinstance(v, list)), default=1)
    if longest > 1:
        raise AnswerShapeError(
            f"`{key}` has {longest} numbers, but a reward model gives one: the server returns embeddings, "
            "or has several labels"
        )
    return [_number(value) for value in values]


def _number(value: Any) -> float:
    """A number, or the number in nested lists of length one."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AnswerShapeError(f"the answer has {value!r} instead of a reward")
    return float(value)


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "vllm-classify",
            "/classify",
            _vllm_request,
            lambda answer: _single_rewards(_get(answer, "data"), "probs"),
        ),
        Protocol(
            "sglang-classify",
            "/classify",
            lambda texts, model: {**model, "text": list(texts)},
            lambda answer: _single_rewards(
                [answer] if isinstance(answer, Mapping) else answer, "embedding"
            ),
            adds_bos=True,
        ),
        Protocol(
            "vllm-pooling",
            "/pooling",
            lambda texts, model: {**_vllm_request(texts, model), "encoding_format": "float"},
            lambda answer: _single_rewards(_get(answer, "data"), "data"),
        ),
        Protocol("openrlhf", "/get_reward", _openrlhf_request, _openrlhf_rewards),
    )
}
"""By name, in the order in which a server is tried."""


@dataclass(frozen=True)
class ServerReplay:
    """How a server's rewards compare with the golden ones."""

    ok: bool
    """Whether all rewards are within the tolerance."""
    url: str
    protocol: str
    model: str | None
    """The server's name for it; None if it has none."""
    num: int
    """Conversations."""
    difference: float
    """The largest to a golden reward, relative to max(1, |reward|)."""
    batch_difference: float
    """The largest between a text alone and in a batch."""
    worst: str
    """The end of the conversation with the largest difference."""
    expected: float
    got: float
    tolerance: float
    suspicion: str
    """A known mistake that the differences look like; empty if none does."""

    def tables(self) -> tuple[Table, ...]:
        """Protocol, differences, and where they are largest."""
        model = "" if self.model is None else f", model {self.model}"
        rows = [
            ("protocol", f"{self.protocol}{model}"),
            ("golden scores", str(self.num)),
            ("largest difference", f"{self.difference:.2g}"),
            ("alone or in a batch", f"{self.batch_difference:.2g}"),
            ("tolerated", f"{self.tolerance:g} relative to max(1, |reward|)"),
        ]
        if not self.ok:
            rows.append(
                ("worst", f"{self.got:.5g} instead of {self.expected:.5g} for ...{self.worst!r}")
            )
        if self.suspicion:
            rows.append(("it looks as if", self.suspicion))
        verdict = "gives" if self.ok else "does NOT give"
        note = f"the server {verdict} the exported scores"
        return (Table(self.url, (Column(""), Column("")), tuple(rows), (note,)),)


def verify_server(
    address: Address, golden: Path, *, protocol: str = "auto", tolerance: float = SERVER_TOLERANCE
) -> ServerReplay:
    """Replay a golden file (or the one in an exported directory) on the server at `address`.

    `protocol` is one of PROTOCOLS or auto. Raises ServerError for a server that cannot be reached, refuses
    or answers in another form than its protocol's, DataError for a golden file that cannot be used.
    """
    directory = golden if golden.is_dir() else golden.parent
    lines = read_golden(golden)
    texts = [_text(line, golden, directory) for line in lines]
    bos = _automatic_bos(directory)
    base, candidates = _split_url(address, protocol)
    name = _model_name(base)
    model = {} if name is None else {"model": name}
    spoken = _find_protocol(base, candidates, texts[0], model)
    sent = [text.removeprefix(bos) for text in texts] if spoken.adds_bos else texts
    alone = [_ask(base, spoken, [text], model)[0] for text in sent]
    batched: list[float] = []
    for start in range(0, len(sent), _BATCH_SIZE):
        batched += _ask(base, spoken, sent[start : start + _BATCH_SIZE], model)
    expected = [line.reward for line in lines]
    # of the two answers for a text, the one that is further off
    got = [
        max(pair, key=lambda reward, e=e: _rank(_relative(e, reward)))  # type: ignore[misc]
        for e, pair in zip(expected, zip(alone, batched, strict=True), strict=True)
    ]
    differences = [_relative(e, g) for e, g in zip(expected, got, strict=True)]
    worst = max(range(len(lines)), key=lambda k: _rank(differences[k]))
    between = max((_relative(a, b) for a, b in zip(alone, batched, strict=True)), key=_rank)
    return ServerReplay(
        ok=differences[worst] <= tolerance and between <= tolerance,  # False for NaN
        url=address.url,
        protocol=spoken.name,
        model=name,
        num=len(lines),
        difference=differences[worst],
        batch_difference=between,
        worst=texts[worst][-60:],
        expected=expected[worst],
        got=got[worst],
        tolerance=tolerance,
        suspicion=_suspicion(expected, alone, tolerance),
    )


def _text(line: GoldenLine, golden: Path, directory: Path) -> str:
    if line.text is not None:
        return line.text
    if not (directory / "tokenizer_config.json").is_file():
        raise DataError(
            f"{golden} has no rendered `text`, and no tokenizer beside it can render the messages; give "
            "the golden file in its exported directory"
        )
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy, and only for old files

    assert line.messages is not None
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    return str(tokenizer.apply_chat_template(list(line.messages), tokenize=False))


def _automatic_bos(directory: Path) -> str:
    """The BOS that a server adds because the tokenizer does; empty for hafrm's exports."""
    file = directory / "tokenizer_config.json"
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}") from error
    bos = config.get("bos_token") if config.get("add_bos_token") else None
    return str(bos["content"] if isinstance(bos, dict) else bos or "")


def _split_url(address: Address, protocol: str) -> tuple[Address, tuple[Protocol, ...]]:
    """The server's base address, and the protocols to try; a path in the URL limits them."""
    if protocol != "auto" and protocol not in PROTOCOLS:
        raise ConfigError(
            f"--protocol must be auto or one of {', '.join(PROTOCOLS)}; got {protocol}"
        )
    candidates = tuple(PROTOCOLS.values()) if protocol == "auto" else (PROTOCOLS[protocol],)
    url = address.url.rstrip("/")
    path = next((p.path for p in PROTOCOLS.values() if url.endswith(p.path)), None)
    if path is not None:
        url = url.removesuffix(path)
        candidates = tuple(p for p in candidates if p.path == path)
        if not candidates:
            raise ConfigError(f"{address.url} is not an address of protocol {protocol}")
    return Address(url, address.api_key, address.timeout), candidates


def _model_name(address: Address) -> str | None:
    """The server's name for its model, if it has one."""
    try:
        return str(_request(address, "/v1/models")["data"][0]["id"])
    except (HttpStatusError, AnswerShapeError, KeyError, IndexError, TypeError):
        return None


def _find_protocol(
    address: Address, candidates: Sequence[Protocol], text: str, model: dict[str, Any]
) -> Protocol:
    """The first protocol that the server answers."""
    reasons = []
    for protocol in candidates:
        try:
            _ask(address, protocol, [text], model)
        except (HttpStatusError, AnswerShapeError) as error:
            if isinstance(error, HttpStatusError) and error.status not in _OTHER_PROTOCOL:
                raise
            reasons.append(f"{protocol.name}: {error}")
        else:
            return protocol
    tried = "\n  ".join(reasons)
    raise ServerError(f"{address.url} speaks no protocol that hafrm knows. Tried:\n  {tried}")


def _ask(
    address: Address, protocol: Protocol, texts: Sequence[str], model: dict[str, Any]
) -> list[float]:
    answer = _request(address, protocol.path, protocol.request(texts, model))
    try:
        rewards = protocol.rewards(answer)
    except AnswerShapeError as error:
        raise AnswerShapeError(f"{address.url}{protocol.path}: {error}") from error
    if len(rewards) != len(texts):
        raise AnswerShapeError(
            f"{address.url}{protocol.path} gives {len(rewards)} rewards for {len(texts)} texts"
        )
    return rewards


def _request(address: Address, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer to a POST of `body`, or to a GET without one.

    Raises HttpStatusError for an error code, AnswerShapeError for no JSON, ServerError for no answer.
    """
    url = address.url + path
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if address.api_key is not None:
        headers["Authorization"] = f"Bearer {address.api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)  # noqa: S310 - Address checks the scheme
    try:
        with urllib.request.urlopen(request, timeout=address.timeout) as answer:  # noqa: S310
            content = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            body_text = _shorten(error.read())
        why = _EXPLANATIONS.get(error.code, error.reason)
        details = f" | {body_text}" if body_text else ""
        raise HttpStatusError(f"{url} answers {error.code}: {why}{details}", error.code) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise ServerError(
                f"{url} gave no answer within {address.timeout:g} s; raise --timeout, or look at its log"
            ) from error
        raise ServerError(f"{url} cannot be reached: {reason}; is the server up?") from error
    try:
        return json.loads(content)
    except ValueError as error:
        raise AnswerShapeError(f"{url} does not answer JSON: {_shorten(content)}") from error


def _shorten(content: bytes) -> str:
    return " ".join(content.decode("utf-8", "replace").split())[:300]


def _relative(expected: float, got: float) -> float:
    return abs(got - expected) / max(1.0, abs(expected))


def _rank(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference  # max() would pass over NaN


def _suspicion(expected: Sequence[float], got: Sequence[float], tolerance: float) -> str:
    """The known mistake of servers that the rewards look like."""
    pairs = list(zip(expected, got, strict=True))
    if all(_relative(e, g) <= tolerance for e, g in pairs):
        return ""
    if all(g == 1.0 for g in got):
        return "every reward is 1: a softmax over one label (SGLang's /v1/classify does that)"
    if all(abs(g - 1.0 / (1.0 + math.exp(-max(-700.0, e)))) <= tolerance for e, g in pairs):
        return "these are sigmoids of the rewards: the server's problem_type is not regression"
    if len(got) > 2 and len(set(got)) == 1:
        return "every conversation gets the same reward: the text is cut, or read at a pad"
    return ""
