"""How trainers ask for rewards: an entry per protocol, by which the server reads and `hafrm verify` asks.

Modelled on vLLM's pooling entrypoints, SGLang's native and scoring routes, OpenRLHF's serve_rm and slime's
remote reward. Fields that are not listed are refused, and so are options that would change the reward.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any, Literal, NamedTuple

import httpx2
import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, create_model
from pydantic_core import from_json
from scipy import special

from hafrm.errors import HafrmError, ServerError
from hafrm.recipe import Section
from hafrm.run_folder import hide_secrets
from hafrm.scoring.outputs import TOKENS, OutputScores

TIMEOUT = 60.0
"""Seconds for one answer."""


class Dialogue(NamedTuple):
    """A prompt (text or messages) and responses; `may_be_rendered`: a chat template may have run."""

    prompt: Any
    responses: Sequence[str]
    may_be_rendered: bool = False


class Rendered(NamedTuple):
    """A conversation as the chat template writes it; `open`: its end may be missing or repeated."""

    text: str
    open: bool = False


Conversation = Dialogue | Rendered | Sequence[int]
"""What is scored: messages, a rendered text, or token ids."""
Inputs = Sequence[str] | Sequence[Sequence[Any]]


class RequestError(HafrmError):
    """A request that gets no scores: the HTTP status of the answer, and the index of the faulty item."""

    def __init__(self, status: int, message: str, index: int | None = None) -> None:
        super().__init__(message if index is None else f"item {index}: {message}")
        self.status, self.index = status, index


def _text_of(content: Any) -> Any:
    """The text of OpenAI's list with a single text part; anything else as it is."""
    match content:
        case [{"type": "text", "text": str(text), **rest}] if not rest:
            return text
    return content


class Turn(Section):
    """One message."""

    role: str
    content: Annotated[str | None, BeforeValidator(_text_of)]


Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
IdLists = Annotated[list[Ids], Field(min_length=1)]
Messages = Annotated[list[Turn], Field(min_length=2)]


class ScoreGroup(Section):
    """A prompt and responses to it; `reference`: the response that `probability` compares them with."""

    prompt: str | list[Turn]
    responses: list[str] = Field(min_length=1)
    reference: str | None = None


class GroupsRequest(Section):
    """`POST /score`, the native route: any outputs, per token too."""

    model: str | None = None
    groups: list[ScoreGroup]
    outputs: list[Literal["reward", "implicit", "probability"]] = ["reward"]  # noqa: RUF012
    per_token: bool = False

    @property
    def names(self) -> list[str]:
        """The outputs, including TOKENS."""
        return [*self.outputs, *[TOKENS] * self.per_token]

    def conversations(self) -> list[Conversation]:
        """A dialogue for each group, with its reference last; ValueError if a reference is missing."""
        if "probability" in self.outputs and any(g.reference is None for g in self.groups):
            raise ValueError("`probability` needs a `reference` response in every group")
        return [
            Dialogue(g["prompt"], g["responses"] + [g["reference"]] * (g["reference"] is not None))
            for g in self.model_dump()["groups"]
        ]

    def answer(self, scores: Sequence[OutputScores], by: str) -> dict[str, Any]:
        """The outputs of each group; probabilities compare the scores named `by`."""
        rows = []
        for group, own in zip(self.groups, scores, strict=True):
            if "probability" in self.outputs:
                own["probability"] = special.expit(np.subtract(own[by], own[by][-1])).tolist()
            rows.append({name: own[name][: len(group.responses)] for name in self.names})
        return {"groups": rows}


@dataclass(frozen=True)
class Protocol:
    """One way to ask: requests hold conversations in `texts`, answers a `reward` in each of `rows`."""

    name: str
    path: str
    texts: str
    rows: str | None = None  # None: the answer itself is the list of rows
    reward: str | None = None  # None: each row is the reward
    ids: str | None = None  # the field for token ids; None: it takes none
    options: Mapping[str, Any] = field(default_factory=dict)  # what we send as well
    takes: Mapping[str, Any] = field(default_factory=dict)  # other fields that callers may send
    is_list: bool = True  # takes a list of conversations

    @cached_property
    def request(self) -> type[BaseModel]:
        """What a caller may send; null counts as absent."""
        inputs: dict[str, Any] = {self.texts: Text | Texts if self.is_list else str}
        if self.ids:
            inputs[self.ids] = inputs.get(self.ids, Ids) | Ids | IdLists
        inputs |= {"model": str, **self.takes}
        fields: Any = {name: (kind | None, None) for name, kind in inputs.items()}
        return create_model(self.name, __base__=Section, **fields)

    def ask(self, inputs: Inputs) -> dict[str, Any]:
        """The request for rendered texts, token ids, or one conversation's messages."""
        if isinstance(inputs[0][0], Mapping):
            return {**self.options, "messages": inputs[0]}
        key: Any = self.texts if isinstance(inputs[0], str) else self.ids
        return {**self.options, key: list(inputs) if self.is_list else inputs[0]}

    def conversations(self, sent: Mapping[str, Any]) -> list[Conversation]:
        """The conversations of a request; ValueError for fields that do not go together."""
        all_kinds = dict.fromkeys((self.texts, self.ids, "messages"))
        kinds = [kind for kind in all_kinds if kind in self.request.model_fields]
        if len(sent_kinds := sent.keys() & kinds) != 1:
            raise ValueError(f"give either {' or '.join(f'`{kind}`' for kind in kinds)}")
        items = sent[sent_kinds.pop()]
        if "messages" in sent:
            *prompt, last = items
            if last["role"] != "assistant" or last.get("content") is None:
                raise ValueError("`messages` must end in the assistant's response")
            return [Dialogue(prompt, [last["content"]])]
        if self.name == "slime":
            prompt = sent.get("prompt", "")
            return [Dialogue(prompt, [items], may_be_rendered=isinstance(prompt, str))]
        items = [items] if is_single(items) else items
        if self.name == "sglang-score":  # each item follows the query
            query = sent.get("query", "")
            if type(query) is not type(items[0]):
                raise ValueError("`query` and `items` must both be text, or both ids")
            items = [query + item for item in items]
        is_open = self.name == "openrlhf"
        return [Rendered(item, is_open) if isinstance(item, str) else item for item in items]

    def answer(self, scores: Sequence[OutputScores], sent: Mapping[str, Any]) -> Any:
        """What a server answers."""
        rows: list[Any] = [reward for own in scores for reward in own["reward"]]
        if self.reward is not None:
            write = _as_base64 if sent.get("encoding_format") == "base64" else list
            rows = [{"index": k, self.reward: write([reward])} for k, reward in enumerate(rows)]
        if self.rows is None:
            given = sent[self.texts if self.texts in sent else str(self.ids)]
            return rows[0] if is_single(given) else rows
        extra = {"scores": rows, "extra_logs": {}} if self.name == "openrlhf" else {}
        return {"object": "list", self.rows: rows, **extra}

    def read(self, answer: Any, num: int) -> list[float]:
        """The rewards in an answer to `num` conversations; ValueError or similar for another form."""
        rows = answer if self.rows is None else answer[self.rows]
        # SGLang answers a single text without a list
        rows = rows if isinstance(rows, list) else [rows]
        if self.reward is not None:
            rows = [row[self.reward] for row in sorted(rows, key=lambda row: row.get("index", 0))]
        # a number for each text, or a list of one
        rewards: list[float] = np.array(rows, np.float64).reshape(num).tolist()
        return rewards


def _as_base64(values: list[float]) -> str:
    """The values as base64, as OpenAI's client reads embeddings."""
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


def is_single(value: Any) -> bool:
    """Whether a text or ids were sent without a list around them."""
    return isinstance(value, str) or isinstance(value[0], int)


_RAW = {"use_activation": False, "add_special_tokens": False}
# a sigmoid is not a reward; nothing is cut; nothing is added to rendered text: the template wrote its BOS
_VLLM: dict[str, Any] = {"use_activation": Literal[False], "truncate_prompt_tokens": Literal[None]}
_VLLM |= {"messages": Messages, "encoding_format": Literal["float", "base64"]}
_VLLM |= {"activation": Literal[False], "task": Literal["classify"]}  # the former is older
_VLLM |= {"add_special_tokens": bool, "add_generation_prompt": Literal[False], "priority": int}
_VLLM |= dict.fromkeys(("truncation_side", "cache_salt", "user", "request_id"), str)
_SCORE: dict[str, Any] = {
    "query": str | list[int],
    "apply_softmax": Literal[False],
    "item_first": Literal[False],
}
_SCORE |= {"items": Texts | IdLists, "label_token_ids": Any}  # a reward has no labels
_SLIME: dict[str, Any] = {"prompt": str | list[Turn], "label": Any}
_RID: dict[str, Any] = {"rid": str}
_LISTS: dict[str, Any] = {"query": Texts, "prompts": list, "labels": list}
PROTOCOLS = (
    Protocol("vllm-classify", "/classify", "input", "data", "probs", "input", _RAW, _VLLM),
    Protocol("sglang-classify", "/classify", "text", None, "embedding", "input_ids", {}, _RID),
    Protocol("vllm-pooling", "/pooling", "input", "data", "data", "input", _RAW, _VLLM),
    Protocol("openrlhf", "/get_reward", "query", "rewards", None, None, {}, _LISTS),
    Protocol("embeddings", "/v1/embeddings", "input", "data", "embedding", "input", {}, _VLLM),
    Protocol("sglang-score", "/v1/score", "items", "scores", None, None, {"query": ""}, _SCORE),
    Protocol(
        "slime", "/reward", "response", None, None, None, {"prompt": ""}, _SLIME, is_list=False
    ),
)
"""In the order in which `hafrm verify` tries a server."""


class Asked(NamedTuple):
    """What a request asks: conversations, which outputs, and how the answer is written."""

    conversations: list[Conversation]
    outputs: tuple[str, ...]
    answer: Callable[[Sequence[OutputScores]], Any]


def read_request(path: str, body: bytes, by: str) -> Asked:
    """What a body asks; probabilities compare the scores named `by`. RequestError for another form."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    try:
        if path == "/score":
            groups = GroupsRequest.model_validate(value)
            names = (by if name == "probability" else name for name in groups.names)
            outputs = tuple(dict.fromkeys(names))
            return Asked(groups.conversations(), outputs, partial(groups.answer, by=by))
        fitting = [protocol for protocol in PROTOCOLS if protocol.path == path]
        keys = value.keys() if isinstance(value, dict) else ()
        # two protocols may share a path: take the one whose field is present
        protocol = next((p for p in fitting if {p.texts, p.ids} & {*keys}), fitting[0])
        sent = protocol.request.model_validate(value).model_dump(exclude_none=True)
        talks = protocol.conversations(sent)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(422, f"{where}: {first['msg']}") from error
    except ValueError as error:
        raise RequestError(422, str(error)) from error
    return Asked(talks, ("reward",), partial(protocol.answer, sent=sent))


class OtherProtocolError(ServerError):
    """The server does not know the path or the request, or its answer has another form."""


class ServerClient:
    """Sends requests to one server over connections that stay open, from any thread."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """`url` may end in a protocol's path, which is then the only one to try."""
        base = url.rstrip("/")
        self.path = next((p.path for p in PROTOCOLS if base.endswith(p.path)), "")
        self.base, self.has_key = base.removesuffix(self.path), api_key is not None
        keys = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(headers=keys, timeout=TIMEOUT)

    def rewards(self, protocol: Protocol, inputs: Inputs) -> list[float]:
        """The rewards of what `Protocol.ask` takes; OtherProtocolError if the answer has another form."""
        answer = self.request(protocol.path, {**self.model, **protocol.ask(inputs)})
        try:
            return protocol.read(answer, len(inputs))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise OtherProtocolError(
                f"{hide_secrets(self.base + protocol.path)} does not give one reward for each of "
                f"{len(inputs)} texts: {error!r}; it may return embeddings, or have several labels"
            ) from error

    @cached_property
    def model(self) -> dict[str, str]:
        """The model's name as a field of requests; only vLLM and SGLang name their model."""
        try:
            return {"model": str(self.request("/v1/models")["data"][0]["id"])}
        except (OtherProtocolError, KeyError, IndexError, TypeError):
            return {}

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer to a POST of `body`, or to a GET without one; ServerError without an answer."""
        method, url = "GET" if body is None else "POST", self.base + path
        shown, ask = hide_secrets(url), partial(self._http.request, method, url, json=body)
        try:
            try:
                answer = ask()
            except (httpx2.NetworkError, httpx2.RemoteProtocolError):  # lost: try again
                answer = ask()
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            why = hide_secrets(f"{type(error).__name__}: {error}")
            raise ServerError(f"{shown} gives no answer: {why}; is the server up?") from error
        if answer.is_error:
            code, details = answer.status_code, " ".join(answer.text.split())[:300]
            hint = " (it wants another --api-key)" if code in (401, 403) else ""
            # other codes, such as 401 and 503, have nothing to do with the protocol and end the search
            is_other = code in (400, 404, 405, 415, 422, 500, 501)
            kind = OtherProtocolError if is_other else ServerError
            raise kind(f"{shown} answers {code} {answer.reason_phrase}{hint} | {details}")
        try:
            return answer.json()
        except ValueError as error:
            raise OtherProtocolError(f"{shown} does not answer JSON: {error}") from error

    def find_protocol(self, inputs: Inputs) -> Protocol:
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
