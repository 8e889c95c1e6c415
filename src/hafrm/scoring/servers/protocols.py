"""How reward servers are asked and how they answer: one entry for each protocol.

Shapes as in vLLM's pooling entrypoints, SGLang's native /classify and OpenRLHF's serve_rm. The text is
the whole conversation as the exported template renders it, special tokens included; it must not get a
second BOS, nor a sigmoid.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hafrm.scoring.servers.http import ShapeError


@dataclass(frozen=True)
class Protocol:
    """One way to ask for rewards."""

    name: str
    path: str
    request: Callable[[Sequence[str], str | None], dict[str, Any]]
    """The body for rendered conversations and the model's name, if the server told one."""
    rewards: Callable[[Any], list[float]]
    """The rewards in an answer; raises ShapeError for another shape."""
    adds_bos: bool = False
    """Whether the server tokenises with added special tokens, whatever it is asked."""


def _vllm_request(texts: Sequence[str], model: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "input": list(texts),
        "use_activation": False,
        "add_special_tokens": False,
    }
    return body if model is None else {"model": model, **body}


def _vllm_pooling_request(texts: Sequence[str], model: str | None) -> dict[str, Any]:
    return {**_vllm_request(texts, model), "encoding_format": "float"}


def _sglang_request(texts: Sequence[str], model: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {"text": list(texts)}
    return body if model is None else {"model": model, **body}


def _openrlhf_request(texts: Sequence[str], _: str | None) -> dict[str, Any]:
    return {"query": list(texts), "prompts": [""] * len(texts), "labels": [""] * len(texts)}


def _vllm_rewards(answer: Any) -> list[float]:
    return [_single(row, "probs") for row in _rows(_get(answer, "data"))]


def _vllm_pooling_rewards(answer: Any) -> list[float]:
    return [_single(row, "data") for row in _rows(_get(answer, "data"))]


def _sglang_rewards(answer: Any) -> list[float]:
    rows = [answer] if isinstance(answer, Mapping) else answer
    return [_single(row, "embedding") for row in _rows(rows)]


def _openrlhf_rewards(answer: Any) -> list[float]:
    known = answer if isinstance(answer, Mapping) else {}
    values = known.get("rewards", known.get("scores"))
    if not isinstance(values, list):
        raise ShapeError("the answer has neither `rewards` nor `scores`")
    return [_number(value) for value in values]


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("vllm-classify", "/classify", _vllm_request, _vllm_rewards),
        Protocol("sglang-classify", "/classify", _sglang_request, _sglang_rewards, adds_bos=True),
        Protocol("vllm-pooling", "/pooling", _vllm_pooling_request, _vllm_pooling_rewards),
        Protocol("openrlhf", "/get_reward", _openrlhf_request, _openrlhf_rewards),
    )
}
"""By name, in the order in which a server is tried."""


def _get(answer: Any, key: str) -> Any:
    if not isinstance(answer, Mapping) or key not in answer:
        raise ShapeError(f"the answer has no `{key}`")
    return answer[key]


def _rows(rows: Any) -> list[Any]:
    """The rows of a list, in the order of their `index` where they have one."""
    if not isinstance(rows, list):
        raise ShapeError(f"the answer holds {type(rows).__name__} where a list should be")
    if all(isinstance(row, Mapping) and isinstance(row.get("index"), int) for row in rows):
        return sorted(rows, key=lambda row: row["index"])
    return rows


def _single(row: Any, key: str) -> float:
    value = _get(row, key)
    if isinstance(value, list) and len(value) > 1:
        raise ShapeError(
            f"`{key}` has {len(value)} numbers where a reward model gives one: the server embeds, or has "
            "several labels"
        )
    return _number(value)


def _number(value: Any) -> float:
    """A number, also out of a list of one."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ShapeError(f"the answer holds {value!r} where a reward should be")
    return float(value)
