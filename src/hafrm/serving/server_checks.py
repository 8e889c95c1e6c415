"""Replay golden scores on any running reward server, in the ways in which servers go wrong.

A check is one function, with links to the known bugs, and its entry in `CHECKS`, with the fix.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.errors import DataError, ServerError
from hafrm.export.plain_model import GoldenLine, PlainModel, read_golden
from hafrm.results import Table, columns
from hafrm.run_folder import hide_secrets
from hafrm.serving.protocols import OtherProtocolError, Protocol, ServerClient

VLLM_TOLERANCE = 1.5e-2
"""What vLLM's own tests of reward models allow; tolerated for every server."""
Replies = tuple[Sequence[str], Sequence[float], Sequence[float]]
"""Conversations, the rewards that a server gave them, and those expected."""


def reward_spread(golden: Sequence[GoldenLine]) -> float:
    """The standard deviation of the golden rewards; 0 if there are none."""
    return float(np.std([line.reward for line in golden])) if golden else 0.0


def relative_differences(
    got: Sequence[float], expected: Sequence[float], spread: float
) -> NDArray[np.float64]:
    """How far rewards are from the expected ones, relative to max(1, spread); not relative to the rewards,
    because a model may add any constant to all of them."""
    return np.abs(np.subtract(got, expected, dtype=np.float64)) / max(1.0, spread)


def half_tolerance(spread: float) -> float:
    """The limit of `relative_differences` in half precision: a quarter of the spread.

    On SmolLM2-135M, 30 layers, bfloat16 is off by up to a fifth of the spread and float16 by a thirtieth; a
    second BOS by 0.4 of it, a missing or doubled EOS by 4 times and more.
    """
    return max(VLLM_TOLERANCE, min(1.0, spread) / 4)


@dataclass(frozen=True)
class ServerCheck:
    """The outcome of one way of asking."""

    name: str
    outcome: str  # pass, fail, refused (by the server), or not checked
    difference: float | None  # the largest of `relative_differences`
    tolerance: float
    observed: str
    fix: str  # empty unless it failed or was refused


@dataclass(frozen=True)
class ServerReplay:
    """How a server's rewards compare with the golden ones."""

    ok: bool
    url: str
    protocol: str
    num: int  # conversations
    checks: tuple[ServerCheck, ...]

    @property
    def difference(self) -> float:
        """The largest of all checks; NaN if some reward is NaN."""
        return float(
            np.max([c.difference for c in self.checks if c.difference is not None] or np.nan)
        )

    def tables(self) -> tuple[Table, ...]:
        """Every check, with the fix of those that fail."""
        rows = tuple(
            (c.name, c.outcome, f"{c.difference:.2g}", f"{c.tolerance:.2g}", c.observed)
            if c.difference is not None
            else (c.name, c.outcome, "", "", c.observed)
            for c in self.checks
        )
        notes = [f"{c.name}: {c.fix}" for c in self.checks if c.fix]
        verdict = f"the server {'gives' if self.ok else 'does NOT give'} the exported scores"
        what = f"{self.num} golden scores by {self.protocol}"
        heads = columns("asked | outcome | difference | tolerated | observed")
        return (Table(f"{self.url}: {what}", heads, rows, (*notes, verdict)),)


class _NotCheckedError(Exception):
    """A check does not apply, for this reason."""


@dataclass(frozen=True)
class _Asked:
    client: ServerClient
    protocol: Protocol
    lines: Sequence[GoldenLine]
    golden: Path

    @cached_property
    def plain(self) -> PlainModel:
        if not (self.golden / "config.json").is_file():
            raise _NotCheckedError("--golden must be an exported directory, whose weights score it")
        return PlainModel(self.golden)

    def rewards(self, inputs: Any) -> list[float]:
        size = len(inputs) if self.protocol.is_list else 1
        parts = (inputs[i : i + size] for i in range(0, len(inputs), size))
        return [r for part in parts for r in self.client.rewards(self.protocol, part)]


def _texts(asked: _Asked, size: int = 1, at_once: int = 1) -> Replies:
    # servers differ in batching (sglang#2427), and under load (vllm#51187, vllm#55612)
    lines = list(islice(cycle(asked.lines), max(at_once, len(asked.lines))))
    texts = [str(line.text) for line in lines]
    with ThreadPoolExecutor(at_once) as pool:
        parts = pool.map(asked.rewards, [texts[i : i + size] for i in range(0, len(texts), size)])
    return texts, [r for part in parts for r in part], [line.reward for line in lines]


def _other_form(asked: _Asked, form: str) -> Replies:
    # ids, to which a server must add none, or messages, which it renders with its template (swift#8475)
    lines = [line for line in asked.lines if getattr(line, form)]
    is_taken = asked.protocol.ids if form == "input_ids" else form in asked.protocol.takes
    if not is_taken or not lines:
        raise _NotCheckedError(f"the protocol, or the golden file, has no {form}")
    got = [asked.rewards([list(getattr(line, form))])[0] for line in lines]
    return [str(line.text) for line in lines], got, [line.reward for line in lines]


def _long(asked: _Asked, num_tokens: int) -> Replies:
    # LAST pooling is wrong if the prefill is split into chunks (vllm#48831, vllm#48901)
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
    if not asked.client.has_key:
        raise _NotCheckedError("no --api-key was given")
    try:
        ServerClient(asked.client.base).rewards(asked.protocol, [str(asked.lines[0].text)])
    except ServerError as error:
        if "answers 401" in str(error) or "answers 403" in str(error):
            return [], [], []
        raise
    return ["it answers without the key"], [np.nan], [0.0]


_LONG = (
    "vLLM: --no-enable-chunked-prefill, or --max-num-batched-tokens above the longest input, "
    "--max-model-len; SGLang: --chunked-prefill-size -1, --context-length"
)
_ALONE = "vLLM: VLLM_BATCH_INVARIANT=1, or --max-num-seqs 1; SGLang: --max-running-requests 1"
CHECKS: dict[str, tuple[Callable[[_Asked], Replies], str]] = {
    "alone": (
        _texts,
        "serve the exported directory itself, with one label and no activation (1 everywhere is a "
        "softmax, between 0 and 1 a sigmoid)",
    ),
    "in batches of 8": (partial(_texts, size=8), _ALONE),
    "32 at once": (partial(_texts, at_once=32), _ALONE),
    "asked again": (_texts, "vLLM: --no-enable-prefix-caching; SGLang: --disable-radix-cache"),
    "token ids": (
        partial(_other_form, form="input_ids"),
        "the server adds tokens to ids, or reads another vocabulary: send text",
    ),
    "messages": (
        partial(_other_form, form="messages"),
        "vLLM: --chat-template DIR/chat_template.jinja; or send rendered text",
    ),
    "over 2,048 tokens": (partial(_long, num_tokens=2048), _LONG),
    "over 8,192 tokens": (partial(_long, num_tokens=8192), _LONG),
    "without the key": (
        _without_key,
        "start it with a key; if that guards only /v1, let a proxy guard the other routes",
    ),
}
"""How a server is asked, and what to change if the check fails."""


def verify_server(
    url: str, golden: Path, *, api_key: str | None = None, tolerance: float | None = None
) -> ServerReplay:
    """Send every golden conversation to a server in all ways of `CHECKS`, and compare the rewards.

    The default tolerance is `half_tolerance` for conversations sent alone. For the other ways it is four
    times the difference of these, so that a server in float32 has a stricter limit.
    For a `url` that ends in a protocol's path, only that path is tried. Raises DataError for a golden file
    without rendered texts, ServerError for a server that does not answer.
    """
    lines = read_golden(golden)
    if any(line.text is None for line in lines):
        raise DataError(f"{golden} has lines without rendered `text`; `hafrm export` writes it")
    client = ServerClient(url, api_key)
    protocol = client.find_protocol([str(lines[0].text)])
    asked = _Asked(client, protocol, lines, golden)
    first, *names = CHECKS
    limit = half_tolerance(reward_spread(lines)) if tolerance is None else tolerance
    checks = [_run_check(first, asked, limit)]
    if tolerance is None and checks[0].difference is not None:
        limit = min(limit, max(VLLM_TOLERANCE, 4 * checks[0].difference))
    checks += [_run_check(name, asked, limit) for name in names]
    ok = checks[0].outcome == "pass" and all(check.outcome != "fail" for check in checks)
    return ServerReplay(ok, hide_secrets(url), protocol.name, len(lines), tuple(checks))


def _run_check(name: str, asked: _Asked, tolerance: float) -> ServerCheck:
    check, fix = CHECKS[name]
    try:
        texts, *replies = check(asked)
    except _NotCheckedError as reason:
        return ServerCheck(name, "not checked", None, tolerance, str(reason), "")
    except OtherProtocolError as error:
        return ServerCheck(name, "refused", None, tolerance, str(error), fix)
    if not texts:
        return ServerCheck(name, "pass", None, tolerance, "refused, as it should be", "")
    got, expected = replies
    differences = relative_differences(got, expected, reward_spread(asked.lines))
    worst = int(np.argmax(differences))  # NaN is the largest
    difference = float(differences[worst])
    if difference <= tolerance:  # False for NaN
        return ServerCheck(name, "pass", difference, tolerance, f"{len(texts)} rewards", "")
    observed = f"{got[worst]:.5g} instead of {expected[worst]:.5g}: …{texts[worst][-60:]}"
    return ServerCheck(name, "fail", difference, tolerance, observed, fix)
