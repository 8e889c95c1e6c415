"""Replay golden scores on a running reward server, anybody's, in the ways in which servers go wrong.

A check is one function, with what went wrong for whom, and its entry in `CHECKS` with what fixes it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.errors import DataError, ServerError
from hafrm.export.plain_model import GoldenLine, PlainModel, read_golden
from hafrm.results import Table, columns
from hafrm.run_folder import hide_secrets
from hafrm.serving.protocols import OtherProtocolError, Protocol, ServerClient

SERVER_TOLERANCE = 1.5e-2
"""Relative to max(1, |reward|): servers run bfloat16. vLLM's own tests of reward models allow this."""
_BATCH_SIZE, _AT_ONCE = 8, 32
Replies = tuple[Sequence[str], Sequence[float], Sequence[float]]
"""Conversations, the rewards that a server gave them, and those expected."""


def relative_differences(got: Sequence[float], expected: Sequence[float]) -> NDArray[np.float64]:
    """How far rewards are from the expected ones, relative to max(1, |expected|)."""
    wanted = np.asarray(expected, np.float64)
    return np.asarray(np.abs(got - wanted) / np.maximum(1.0, np.abs(wanted)))


@dataclass(frozen=True)
class ServerCheck:
    """The outcome of one way of asking."""

    name: str
    outcome: str  # pass, fail, refused (by the server), or not checked
    difference: float | None  # the largest, relative to max(1, |reward|)
    observed: str
    fix: str  # empty unless it failed or was refused


@dataclass(frozen=True)
class ServerReplay:
    """How a server's rewards compare with the golden ones."""

    ok: bool
    url: str
    protocol: str
    num: int  # conversations
    tolerance: float
    checks: tuple[ServerCheck, ...]

    @property
    def difference(self) -> float:
        """The largest of all checks; NaN where a reward is none."""
        return float(np.max([c.difference for c in self.checks if c.difference is not None]))

    def tables(self) -> tuple[Table, ...]:
        """Every check, with the fix of those that fail."""
        rows = tuple(
            (c.name, c.outcome, "" if c.difference is None else f"{c.difference:.2g}", c.observed)
            for c in self.checks
        )
        notes = [f"{c.name}: {c.fix}" for c in self.checks if c.fix]
        verdict = f"the server {'gives' if self.ok else 'does NOT give'} the exported scores"
        what = f"{self.num} golden scores by {self.protocol}, tolerated {self.tolerance:g}"
        heads = columns("asked | outcome | difference | observed")
        return (Table(f"{self.url}: {what}", heads, rows, (*notes, verdict)),)


class _NotCheckedError(Exception):
    """A check that does not apply, and why."""


@dataclass(frozen=True)
class _Asked:
    """A server, the protocol that it speaks, and what it is asked about."""

    client: ServerClient
    protocol: Protocol
    lines: Sequence[GoldenLine]
    directory: Path | None  # with the weights of the golden scores
    url: str
    api_key: str | None

    @property
    def texts(self) -> list[str]:
        return [str(line.text) for line in self.lines]

    @property
    def expected(self) -> list[float]:
        return [line.reward for line in self.lines]

    @cached_property
    def alone(self) -> list[float]:
        return [self.rewards([text])[0] for text in self.texts]

    @cached_property
    def plain(self) -> PlainModel:
        if self.directory is None:
            raise _NotCheckedError("--golden must be an exported directory, whose weights score it")
        return PlainModel(self.directory)

    def rewards(self, inputs: Any) -> list[float]:
        size = len(inputs) if self.protocol.is_list else 1
        parts = (inputs[i : i + size] for i in range(0, len(inputs), size))
        return [r for part in parts for r in self.client.rewards(self.protocol, part)]


def _in_batches(asked: _Asked) -> Replies:
    # servers differ in batching (sglang#2427)
    texts = asked.texts
    batches = (texts[i : i + _BATCH_SIZE] for i in range(0, len(texts), _BATCH_SIZE))
    return texts, [reward for batch in batches for reward in asked.rewards(batch)], asked.expected


def _at_once(asked: _Asked) -> Replies:
    # pooling under load may give other numbers (vllm#51187, vllm#55612)
    order = [k % len(asked.lines) for k in range(max(_AT_ONCE, len(asked.lines)))]
    texts = [asked.texts[k] for k in order]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        got = list(pool.map(lambda text: asked.rewards([text])[0], texts))
    return texts, got, [asked.expected[k] for k in order]


def _token_ids(asked: _Asked) -> Replies:
    lines = [line for line in asked.lines if line.input_ids]
    if asked.protocol.ids is None or not lines:
        raise _NotCheckedError("the protocol, or the golden file, has no token ids")
    got = [asked.rewards([list(line.input_ids or ())])[0] for line in lines]
    return [str(line.text) for line in lines], got, [line.reward for line in lines]


def _messages(asked: _Asked) -> Replies:
    # a server renders them with a template of its own (swift#8475)
    lines = [line for line in asked.lines if line.messages]
    if "messages" not in asked.protocol.request.model_fields or not lines:
        raise _NotCheckedError("the protocol, or the golden file, has no messages")
    bodies = [{**asked.protocol.options, "messages": list(line.messages)} for line in lines]
    got = [asked.client.read(asked.protocol, body, 1)[0] for body in bodies]
    return [str(line.text) for line in lines], got, [line.reward for line in lines]


def _long(asked: _Asked, num_tokens: int) -> Replies:
    # LAST pooling is wrong where the prefill is cut in chunks (vllm#48831, vllm#48901)
    limit = asked.plain.text_config.get("max_position_embeddings") or 2**20
    talks = [[m for m in line.messages if m["role"] != "system"] for line in asked.lines]
    talk = min(filter(None, talks), key=lambda turns: len(str(turns)), default=[])
    if not talk or limit <= num_tokens:
        raise _NotCheckedError(f"the model takes {limit} tokens" if talk else "no golden messages")
    text, repeats = "", num_tokens // len(asked.plain.ids(asked.plain.render(talk)))
    while len(asked.plain.ids(text)) <= num_tokens:
        repeats += 1
        text = asked.plain.render(talk * repeats)
    return [text], asked.rewards([text]), asked.plain.score([text]).tolist()


def _without_key(asked: _Asked) -> Replies:
    if asked.api_key is None:
        raise _NotCheckedError("no --api-key was given")
    try:
        ServerClient(asked.url).rewards(asked.protocol, asked.texts[:1])
    except ServerError as error:
        if "answers 401" in str(error) or "answers 403" in str(error):
            return [], [], []
        raise
    return ["it answers without the key"], [np.nan], [0.0]


CHECKS: dict[str, tuple[Callable[[_Asked], Replies], str]] = {
    "alone": (
        lambda asked: (asked.texts, asked.alone, asked.expected),
        "serve the exported directory itself, with one label and no activation (1 everywhere is a "
        "softmax, between 0 and 1 a sigmoid)",
    ),
    "in batches of 8": (_in_batches, "vLLM: VLLM_BATCH_INVARIANT=1, or --max-num-seqs 1"),
    "32 at once": (
        _at_once,
        "vLLM: VLLM_BATCH_INVARIANT=1, or --max-num-seqs 1; SGLang: --max-running-requests 1",
    ),
    "asked again": (
        lambda asked: (asked.texts, [asked.rewards([t])[0] for t in asked.texts], asked.alone),
        "vLLM: --no-enable-prefix-caching; SGLang: --disable-radix-cache",
    ),
    "token ids": (
        _token_ids,
        "the server adds tokens to ids, or reads another vocabulary: send text",
    ),
    "messages": (_messages, "vLLM: --chat-template DIR/chat_template.jinja; or send rendered text"),
    **{
        f"over {n:,} tokens": (
            partial(_long, num_tokens=n),
            "vLLM: --no-enable-chunked-prefill, or --max-num-batched-tokens above the longest input, "
            "--max-model-len; SGLang: --chunked-prefill-size -1, --context-length",
        )
        for n in (2048, 8192)
    },
    "without the key": (
        _without_key,
        "start it with a key; where that guards /v1 alone, let a proxy guard the other routes",
    ),
}
"""How a server is asked, and what to change where it answers otherwise."""


def verify_server(
    url: str, golden: Path, *, api_key: str | None = None, tolerance: float = SERVER_TOLERANCE
) -> ServerReplay:
    """Send every golden conversation to a server in all ways of `CHECKS`, and compare the rewards.

    A `url` that ends in a protocol's path tries no other path. Raises DataError for a golden file without
    rendered texts, ServerError for a server without answers.
    """
    lines = read_golden(golden)
    if any(line.text is None for line in lines):
        raise DataError(f"{golden} has lines without rendered `text`; `hafrm export` writes it")
    client = ServerClient(url, api_key)
    protocol = client.find_protocol([str(lines[0].text)])
    directory = golden if (golden / "config.json").is_file() else None
    asked = _Asked(client, protocol, lines, directory, url, api_key)
    checks = tuple(_run_check(name, asked, tolerance) for name in CHECKS)
    ok = all(check.outcome != "fail" for check in checks)
    return ServerReplay(ok, hide_secrets(url), protocol.name, len(lines), tolerance, checks)


def _run_check(name: str, asked: _Asked, tolerance: float) -> ServerCheck:
    check, fix = CHECKS[name]
    try:
        texts, *replies = check(asked)
    except _NotCheckedError as reason:
        return ServerCheck(name, "not checked", None, str(reason), "")
    except OtherProtocolError as error:
        return ServerCheck(name, "refused", None, str(error), fix)
    if not texts:
        return ServerCheck(name, "pass", None, "refused, as it should be", "")
    got, expected = replies
    differences = relative_differences(got, expected)
    worst = int(np.argmax(differences))  # NaN is the largest
    difference = float(differences[worst])
    if difference <= tolerance:  # False for NaN
        return ServerCheck(name, "pass", difference, f"{len(texts)} rewards", "")
    observed = f"{got[worst]:.5g} instead of {expected[worst]:.5g}: …{texts[worst][-60:]}"
    return ServerCheck(name, "fail", difference, observed, fix)
