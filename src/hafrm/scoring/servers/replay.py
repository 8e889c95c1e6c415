"""Golden scores asked of a running server: which protocol it speaks, and how far its rewards are off.

Every conversation is asked alone and again among others, since batching is where servers differ.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hafrm.errors import ConfigError, DataError, ServerError
from hafrm.scoring.golden_file import GoldenLine, read_golden
from hafrm.scoring.servers.http import Address, RefusedError, ShapeError, ask
from hafrm.scoring.servers.protocols import PROTOCOLS, Protocol

TOLERANCE = 1.5e-2
"""Relative to max(1, |reward|): servers run bfloat16; it is vLLM's own bar for reward models."""
_BATCH = 8
_ELSEWHERE = (400, 404, 405, 415, 422, 500, 501)
"""Codes that say that a server does not speak this protocol; others stop the search."""


@dataclass(frozen=True)
class ServerReplay:
    """What a server made of the golden conversations."""

    url: str
    protocol: str
    model: str | None
    """As the server names it; None where it does not."""
    num: int
    difference: float
    """The largest to a golden reward, relative to max(1, |reward|)."""
    batch_difference: float
    """The same between a text alone and among others."""
    worst: str
    """The end of the conversation that differs most."""
    expected: float
    got: float
    tolerance: float
    suspicion: str
    """What the differences look like; empty where nothing does."""

    @property
    def ok(self) -> bool:
        """Whether all rewards are the golden ones."""
        return self.difference <= self.tolerance and self.batch_difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; what is no number is null."""
        values = {"ok": self.ok, **asdict(self)}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def verify_server(
    address: Address,
    golden: Path,
    *,
    protocol: str = "auto",
    tolerance: float = TOLERANCE,
) -> ServerReplay:
    """Replay a golden file (or the one in an exported directory) against the server at `address`.

    `protocol` is one of PROTOCOLS or auto. Raises ServerError for a server that cannot be reached, refuses
    or answers otherwise than its protocol says, DataError for a golden file that cannot be used.
    """
    lines = read_golden(golden)
    texts = [_text(line, golden) for line in lines]
    bos = _habitual_bos(golden if golden.is_dir() else golden.parent)
    base, known = _split(address, protocol)
    model = _model_name(base)
    spoken = _find(base, known, texts[0], model)
    sent = [text.removeprefix(bos) for text in texts] if spoken.adds_bos else texts
    alone = [_ask(base, spoken, [text], model)[0] for text in sent]
    together = [
        reward
        for start in range(0, len(sent), _BATCH)
        for reward in _ask(base, spoken, sent[start : start + _BATCH], model)
    ]
    expected = [line.reward for line in lines]
    found = [_worse(*three) for three in zip(expected, alone, together, strict=True)]
    differences = [_relative(e, f) for e, f in zip(expected, found, strict=True)]
    worst = max(range(len(lines)), key=lambda k: _rank(differences[k]))
    return ServerReplay(
        url=address.url,
        protocol=spoken.name,
        model=model,
        num=len(lines),
        difference=differences[worst],
        batch_difference=max(
            (_relative(a, t) for a, t in zip(alone, together, strict=True)), key=_rank
        ),
        worst=texts[worst][-60:],
        expected=expected[worst],
        got=found[worst],
        tolerance=tolerance,
        suspicion=_suspicion(expected, alone, tolerance),
    )


def _text(line: GoldenLine, golden: Path) -> str:
    if line.text is not None:
        return line.text
    directory = golden if golden.is_dir() else golden.parent
    if not (directory / "tokenizer_config.json").is_file():
        raise DataError(
            f"{golden} has no rendered `text`, and there is no tokenizer beside it to render the messages "
            "with; give the golden file in its exported directory"
        )
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy, and only for old files

    assert line.messages is not None
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    return str(tokenizer.apply_chat_template(list(line.messages), tokenize=False))


def _habitual_bos(directory: Path) -> str:
    """The BOS that a server adds by itself because the tokenizer does; empty for hafrm's exports."""
    file = directory / "tokenizer_config.json"
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}") from error
    bos = config.get("bos_token") if config.get("add_bos_token") else None
    return str(bos["content"] if isinstance(bos, dict) else bos or "")


def _split(address: Address, protocol: str) -> tuple[Address, tuple[Protocol, ...]]:
    """The server's base address and the protocols to try: those of its path, where it names one."""
    if protocol != "auto" and protocol not in PROTOCOLS:
        raise ConfigError(
            f"--protocol must be auto or one of {', '.join(PROTOCOLS)}; got {protocol}"
        )
    known = tuple(PROTOCOLS.values()) if protocol == "auto" else (PROTOCOLS[protocol],)
    url = address.url.rstrip("/")
    path = next((p.path for p in PROTOCOLS.values() if url.endswith(p.path)), None)
    if path is not None:
        url = url.removesuffix(path)
        known = tuple(p for p in known if p.path == path)
        if not known:
            raise ConfigError(f"{address.url} is no address of protocol {protocol}")
    return Address(url, address.api_key, address.timeout), known


def _model_name(address: Address) -> str | None:
    """What the server calls its model, where it tells."""
    try:
        answer = ask(address, "/v1/models")
        return str(answer["data"][0]["id"])
    except (RefusedError, ShapeError, KeyError, IndexError, TypeError):
        return None


def _find(address: Address, known: Sequence[Protocol], text: str, model: str | None) -> Protocol:
    """The first protocol that the server answers to."""
    reasons = []
    for protocol in known:
        try:
            _ask(address, protocol, [text], model)
        except (RefusedError, ShapeError) as error:
            if isinstance(error, RefusedError) and error.status not in _ELSEWHERE:
                raise
            reasons.append(f"{protocol.name}: {error}")
        else:
            return protocol
    tried = "\n  ".join(reasons)
    raise ServerError(f"{address.url} speaks no protocol that hafrm knows. Tried:\n  {tried}")


def _ask(
    address: Address, protocol: Protocol, texts: Sequence[str], model: str | None
) -> list[float]:
    answer = ask(address, protocol.path, protocol.request(texts, model))
    try:
        rewards = protocol.rewards(answer)
    except ShapeError as error:
        raise ShapeError(f"{address.url}{protocol.path}: {error}") from error
    if len(rewards) != len(texts):
        raise ShapeError(
            f"{address.url}{protocol.path} gives {len(rewards)} rewards for {len(texts)} texts"
        )
    return rewards


def _relative(expected: float, got: float) -> float:
    return abs(got - expected) / max(1.0, abs(expected))


def _rank(difference: float) -> float:
    """NaN is the largest difference of all."""
    return math.inf if math.isnan(difference) else difference


def _worse(expected: float, first: float, second: float) -> float:
    return max((first, second), key=lambda got: _rank(_relative(expected, got)))


def _suspicion(expected: Sequence[float], got: Sequence[float], tolerance: float) -> str:
    """What is known to make servers differ, where the rewards have its mark."""
    if all(_relative(e, g) <= tolerance for e, g in zip(expected, got, strict=True)):
        return ""
    if all(g == 1.0 for g in got):
        return "every reward is 1: a softmax over one label (SGLang's /v1/classify does that)"
    if all(abs(g - _sigmoid(e)) <= tolerance for e, g in zip(expected, got, strict=True)):
        return (
            "these are sigmoids of the rewards: problem_type is not regression where it is served"
        )
    if len(got) > 2 and len(set(got)) == 1:
        return "every conversation gets the same reward: the text is cut, or read at a pad"
    return ""


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-min(700.0, max(-700.0, x))))
