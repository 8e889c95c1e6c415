"""Our reward models in the shapes in which RL engines ask: TRL, verl, OpenRLHF.

Each engine calls a plain function with text and wants plain numbers back. Prompts arrive as messages, or
as text that a chat template has rendered already; a response is neutralised as in training, so control
tokens that a policy writes are text to the reward model and start no new turn. A reward that is not finite
is an error here, since engines take it for a missing one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hafrm.errors import DataError
from hafrm.preferences import Group, Message, TokenizedGroup
from hafrm.rlhf.rewards import Conversation, Rewards, score_texts
from hafrm.scoring.reward_model import Scorer, as_messages

TrlReward = Callable[..., list[float]]
_PROBE = "probe"


def trl_reward(rewards: Rewards) -> TrlReward:
    """A reward function for TRL's GRPOTrainer and RLOOTrainer.

    They call it with `prompts` and `completions`, conversations or texts, the completions of a prompt one
    behind the other, and further columns by keyword.
    """

    def hafrm_reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        asked = [as_messages(prompt) for prompt in prompts]
        answers = [_content(completion) for completion in completions]
        return by_prompt(rewards, asked, answers)

    return hafrm_reward


def by_prompt(
    rewards: Rewards, prompts: Sequence[Conversation], responses: Sequence[str]
) -> list[float]:
    """One reward per (prompt, response), in their order; neighbours with one prompt share a layout."""
    starts = [
        i for i in range(len(prompts)) if i == 0 or tuple(prompts[i]) != tuple(prompts[i - 1])
    ]
    ends = [*starts[1:], len(prompts)]
    groups = [list(responses[a:b]) for a, b in zip(starts, ends, strict=True)]
    by_model = rewards.by_model([prompts[a] for a in starts], groups)
    return [float(value) for value in rewards.combine(by_model)]


def _content(completion: Any) -> str:
    """The text of a completion: TRL gives the assistant's message in a list, or text."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def verl_score(rewards: Rewards) -> Callable[..., dict[str, float]]:
    """A `custom_reward_function` for verl.

    verl hands over the response and no prompt, so each row's `extra_info` must hold it: "prompt", text or
    messages. Raises DataError where it does not.
    """

    def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, float]:
        del ground_truth
        prompt = (extra_info or {}).get("prompt")
        if prompt is None:
            raise DataError(
                f"a row of {data_source!r} has no extra_info.prompt, which the reward is for: write the "
                "prompt's messages there when you make the Parquet files"
            )
        # Parquet gives lists back as arrays.
        messages = as_messages(prompt if isinstance(prompt, str) else list(prompt))
        return {"score": by_prompt(rewards, [messages], [solution_str])[0]}

    return compute_score


def openrlhf_rewards(
    scorer: Scorer, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    """OpenRLHF's remote reward: {"rewards", "scores", "extra_logs"}, one number for each query.

    A query is the prompt and the response with all control tokens. Where the label is a JSON list of
    messages (from --data.label_key), that is the prompt, and tokenizers may differ. Else the prompt must
    have been rendered by the reward model's own chat template; DataError where it was not.
    """
    values = [
        _openrlhf_reward(scorer, query, prompt, label)
        for query, prompt, label in zip(queries, prompts, labels, strict=True)
    ]
    return {"rewards": values, "scores": values, "extra_logs": {"hafrm_reward": values}}


def _openrlhf_reward(scorer: Scorer, query: str, prompt: str, label: str) -> float:
    if not query.startswith(prompt):
        raise DataError(f"a query does not begin with its prompt: {query[:60]!r}, {prompt[:60]!r}")
    response = _without_controls(scorer, query[len(prompt) :])
    messages = _messages_of(label)
    if messages is not None:
        return float(score_texts(scorer, [messages], [[response]])[0])
    return float(scorer.score_encoded([_rendered(scorer, prompt, response)])[0])


def _without_controls(scorer: Scorer, text: str) -> str:
    """The response without the padding and EOS behind it."""
    tokenizer = scorer.encoder.tokenizer
    marks = [str(mark) for mark in (tokenizer.pad_token, tokenizer.eos_token) if mark]
    text = text.strip(" ")
    while mark := next((mark for mark in marks if text.endswith(mark)), None):
        text = text.removesuffix(mark)
    return text


def _messages_of(label: str) -> tuple[Message, ...] | None:
    """The conversation that a label holds, if it holds one."""
    try:
        value = json.loads(label)
    except ValueError:
        return None
    turns = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    return as_messages(value) if turns else None


def _rendered(scorer: Scorer, prompt: str, response: str) -> TokenizedGroup:
    """Ids of a prompt that the reward model's template wrote, and of a response behind it."""
    encoder = scorer.encoder
    question = (Message("user", _PROBE),)
    header = encoder.render(question, "\x01").rpartition("\x01")[0].rpartition(_PROBE)[2]
    if not prompt.rstrip().endswith(header.rstrip()):
        raise DataError(
            f"a prompt ends in {prompt[-40:]!r}, and the reward model's template writes {header!r} before "
            "an answer: use that template in OpenRLHF too, or give the messages as JSON in the label"
        )
    (asked,), _ = encoder.encode([Group(id="probe", prompt=question, responses=(response,))])
    # Blanks before an answer belong to the answer's first token.
    ids = encoder.tokenizer.backend_tokenizer.encode(
        prompt.rstrip(" ") if header.endswith(" ") else prompt, add_special_tokens=False
    ).ids
    return TokenizedGroup(np.array(ids, np.int32), asked.response_ids, id="query")
