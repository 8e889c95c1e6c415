"""How trainers ask for rewards, an entry for each protocol: the server reads it, `hafrm verify` asks by it.

After vLLM's pooling entrypoints, SGLang's native and scoring routes, OpenRLHF's serve_rm and slime's remote
reward. A field that is not listed is refused, and so is an option that would change the reward.
"""

import contextlib
import http
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import httpx2
import numpy as np
from pydantic import Field

from hafrm.errors import HafrmError, ServerError
from hafrm.recipe import Section
from hafrm.run_folder import hide_secrets

TIMEOUT = 60.0
"""Seconds for one answer."""
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
IdLists = Annotated[list[Ids], Field(min_length=1)]


class Dialogue(NamedTuple):
    """A prompt as text or messages, and responses to it; `may_be_rendered`: by a caller's chat template."""

    prompt: Any
    responses: Sequence[str]
    may_be_rendered: bool = False


class Rendered(NamedTuple):
    """A conversation as the chat template writes it; `open`: its end may be missing or repeated."""

    text: str
    open: bool = False


Conversation = Dialogue | Rendered | Sequence[int]
"""What is scored: messages, a rendered text, or token ids."""


class RequestError(HafrmError):
    """A request without scores: the status that answers it, and the item that it is about."""

    def __init__(
        self, status: int, message: str, index: int | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message if index is None else f"item {index}: {message}")
        self.status, self.index, self.retry_after = status, index, retry_after


class Turn(Section):
    """One message."""

    role: str
    content: str | None


class RewardRequest(Section):
    """What a caller may send; ValueError for fields that do not go together."""

    model: str | None = None

    def conversations(self) -> list[Conversation]:
        """One for each reward of the answer."""
        raise NotImplementedError


def is_one(value: Any) -> bool:
    """Whether a text or ids were sent without a list around them."""
    return isinstance(value, str) or isinstance(value[0], int)


def _conversations(first: Any, second: Any, names: str) -> list[Conversation]:
    """Of the one value that is given."""
    if (first is None) == (second is None):
        raise ValueError(f"give either {names}")
    value = second if first is None else first
    values = [value] if is_one(value) else value
    return [Rendered(item) if isinstance(item, str) else item for item in values]


class VllmRequest(RewardRequest):
    """`/classify` and `/pooling` of vLLM, and OpenAI's embeddings.

    Nothing is added to a rendered text, whatever `add_special_tokens` says: the template wrote its BOS.
    """

    input: Text | Ids | Texts | IdLists | None = None
    messages: Annotated[list[Turn], Field(min_length=2)] | None = None
    use_activation: Literal[False] | None = None  # a sigmoid is no reward
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: None = None
    encoding_format: Literal["float"] | None = None
    task: Literal["classify"] | None = None
    add_generation_prompt: Literal[False] | None = None
    truncation_side: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    user: str | None = None
    request_id: str | None = None

    def conversations(self) -> list[Conversation]:
        if self.messages is None or self.input is not None:
            return _conversations(self.input, self.messages, "`input` or `messages`")
        *prompt, last = (turn.model_dump() for turn in self.messages)
        if last["role"] != "assistant" or last["content"] is None:
            raise ValueError("`messages` must end in the assistant's response")
        return [Dialogue(prompt, [last["content"]])]


class SglangRequest(RewardRequest):
    """SGLang's native `/classify`."""

    text: Text | Texts | None = None
    input_ids: Ids | IdLists | None = None
    rid: str | None = None

    def conversations(self) -> list[Conversation]:
        return _conversations(self.text, self.input_ids, "`text` or `input_ids`")


class ScoreRequest(RewardRequest):
    """SGLang's `/v1/score`: each item follows the query, as text or as ids."""

    query: str | list[int] = ""
    items: Texts | IdLists
    label_token_ids: list[int] | None = None  # of a language model; a reward has no labels
    apply_softmax: Literal[False] | None = None
    item_first: Literal[False] | None = None

    def conversations(self) -> list[Conversation]:
        query: Any = self.query
        if isinstance(query, str) != isinstance(self.items[0], str):
            raise ValueError("`query` and `items` must both be text, or both ids")
        return _conversations([query + item for item in self.items], None, "")


class OpenRlhfRequest(RewardRequest):
    """OpenRLHF's remote reward: whole sequences as text, of which prompts and labels are parts."""

    query: Texts
    prompts: list[Any] | None = None
    labels: list[Any] | None = None

    def conversations(self) -> list[Conversation]:
        return [Rendered(text, open=True) for text in self.query]


class SlimeRequest(RewardRequest):
    """slime's `--rm-url`: one sample. A prompt that its chat template rendered holds control tokens."""

    prompt: str | list[Turn]
    response: str
    label: Any = None

    def conversations(self) -> list[Conversation]:
        prompt = self.model_dump()["prompt"]
        return [Dialogue(prompt, [self.response], may_be_rendered=isinstance(prompt, str))]


class ScoreGroup(Section):
    """A prompt and responses to it; `reference`: the response that `probability` compares them with."""

    prompt: str | list[Turn]
    responses: list[str] = Field(min_length=1)
    reference: str | None = None


class GroupsRequest(RewardRequest):
    """`POST /score`, the native route: any outputs, per token too."""

    groups: list[ScoreGroup]
    outputs: list[Literal["reward", "implicit", "fused", "probability"]] = ["reward"]  # noqa: RUF012
    per_token: bool = False

    def conversations(self) -> list[Conversation]:
        if "probability" in self.outputs and any(g.reference is None for g in self.groups):
            raise ValueError("`probability` needs a `reference` response in every group")
        return [
            Dialogue(
                g["prompt"], [*g["responses"], *[g["reference"]] * (g["reference"] is not None)]
            )
            for g in self.model_dump()["groups"]
        ]


@dataclass(frozen=True)
class Protocol:
    """One way to ask: a request holds conversations as `texts`, the answer `rows` with a `reward` each."""

    name: str
    path: str
    request: type[RewardRequest]
    texts: str
    rows: str | None  # None: the answer is the rows itself
    reward: str | None  # None: a row is the reward
    ids: str | None = None  # where token ids go; None: it takes none
    one: bool = False  # one conversation in a request, and its row the whole answer
    options: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, inputs: Sequence[str] | Sequence[Sequence[int]]) -> dict[str, Any]:
        """The request for rendered texts or token ids."""
        key = self.texts if isinstance(inputs[0], str) else self.ids
        assert key is not None
        return {**self.options, key: inputs[0] if self.one else list(inputs)}

    def answer(self, rewards: Sequence[float], request: RewardRequest) -> Any:
        """What a server answers."""
        rows: list[Any] = list(rewards)
        if self.reward is not None:
            rows = [{"index": k, self.reward: [reward]} for k, reward in enumerate(rewards)]
        if self.rows is None:
            value = getattr(request, self.texts) or getattr(request, str(self.ids))
            return rows[0] if self.one or is_one(value) else rows
        extra = {"scores": rows, "extra_logs": {}} if self.path == "/get_reward" else {}
        return {"object": "list", self.rows: rows, **extra}

    def read(self, answer: Any, num: int) -> list[float]:
        """The rewards in an answer to `num` conversations; ValueError and the like for another form."""
        rows = answer if self.rows is None else answer[self.rows]
        # SGLang answers a single text without a list
        rows = rows if isinstance(rows, list) else [rows]
        if self.reward is not None:
            rows = sorted(rows, key=lambda row: row.get("index", 0))
            rows = [row[self.reward] for row in rows]
        # a number for each text, or a list of one
        rewards: list[float] = np.array(rows, np.float64).reshape(num).tolist()
        return rewards


_RAW = {"use_activation": False, "add_special_tokens": False}
PROTOCOLS = (
    Protocol(
        "vllm-classify", "/classify", VllmRequest, "input", "data", "probs", "input", options=_RAW
    ),
    Protocol("sglang-classify", "/classify", SglangRequest, "text", None, "embedding", "input_ids"),
    Protocol(
        "vllm-pooling", "/pooling", VllmRequest, "input", "data", "data", "input", options=_RAW
    ),
    Protocol("openrlhf", "/get_reward", OpenRlhfRequest, "query", "rewards", None),
    Protocol("embeddings", "/v1/embeddings", VllmRequest, "input", "data", "embedding", "input"),
    Protocol(
        "sglang-score", "/v1/score", ScoreRequest, "items", "scores", None, options={"query": ""}
    ),
    Protocol(
        "slime", "/reward", SlimeRequest, "response", None, None, one=True, options={"prompt": ""}
    ),
)
"""In the order in which `hafrm verify` tries a server."""


class OtherProtocolError(ServerError):
    """The server does not know the path or the request, or its answer has another form."""


class ServerClient:
    """Requests to one server over connections that stay open, from any thread."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """`url` may end in a protocol's path, which is then the only one to try."""
        base = url.rstrip("/")
        self.path = next((p.path for p in PROTOCOLS if base.endswith(p.path)), "")
        self.base = base.removesuffix(self.path)
        keys = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(headers=keys, timeout=TIMEOUT)
        self._model: dict[str, str] | None = None

    def rewards(
        self, protocol: Protocol, inputs: Sequence[str] | Sequence[Sequence[int]]
    ) -> list[float]:
        """The rewards of rendered texts or token ids; OtherProtocolError for an answer of another form."""
        return self.read(protocol, {**self.model(), **protocol.ask(inputs)}, len(inputs))

    def read(self, protocol: Protocol, body: Mapping[str, Any], num: int) -> list[float]:
        """The rewards that the server answers to a request for `num` conversations."""
        answer = self.request(protocol.path, body)
        try:
            return protocol.read(answer, num)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise OtherProtocolError(
                f"{hide_secrets(self.base + protocol.path)} does not give one reward for each of {num} "
                f"texts: {error!r}; it may return embeddings, or have several labels"
            ) from error

    def model(self) -> dict[str, str]:
        """The model's name as requests give it; only vLLM and SGLang name theirs."""
        if self._model is None:
            try:
                self._model = {"model": str(self.request("/v1/models")["data"][0]["id"])}
            except (OtherProtocolError, KeyError, IndexError, TypeError):
                self._model = {}
        return self._model

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer to a POST of `body`, or to a GET without one; ServerError without an answer."""
        method, url = "GET" if body is None else "POST", self.base + path
        try:
            with contextlib.suppress(httpx2.NetworkError, httpx2.RemoteProtocolError):
                return self._read(self._http.request(method, url, json=body), url)
            return self._read(
                self._http.request(method, url, json=body), url
            )  # it was lost: once more
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            why = f"{type(error).__name__}: {error}; is the server up?"
            raise ServerError(hide_secrets(f"{url} gives no answer: {why}")) from error

    @staticmethod
    def _read(answer: httpx2.Response, url: str) -> Any:
        if answer.is_error:
            code, details = answer.status_code, " ".join(answer.text.split())[:300]
            hint = " (it wants another --api-key)" if code in (401, 403) else ""
            # other codes, such as 401 and 503, have nothing to do with the protocol and end the search
            is_other = code in (400, 404, 405, 415, 422, 500, 501)
            said = f"{url} answers {code} {http.HTTPStatus(code).phrase}{hint} | {details}"
            raise (OtherProtocolError if is_other else ServerError)(hide_secrets(said))
        try:
            return answer.json()
        except ValueError as error:
            raise OtherProtocolError(
                hide_secrets(f"{url} does not answer JSON: {error}")
            ) from error

    def find_protocol(self, inputs: Sequence[str] | Sequence[Sequence[int]]) -> Protocol:
        """The first protocol by which the server answers; ServerError with all reasons for none."""
        reasons = []
        for protocol in PROTOCOLS:
            if self.path in ("", protocol.path) and (protocol.ids or isinstance(inputs[0], str)):
                try:
                    self.rewards(protocol, inputs)
                except OtherProtocolError as error:
                    reasons.append(f"\n  {protocol.name}: {error}")
                else:
                    return protocol
        what = f"{hide_secrets(self.base)} speaks no protocol that hafrm knows. Tried:"
        raise ServerError(what + "".join(reasons))
