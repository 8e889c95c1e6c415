"""Golden scores asked of servers of every protocol: found by themselves, right, wrong, or a clear error."""

import base64
import json
import math
import time
from functools import partial

import numpy as np
import pytest

from hafrm.errors import DataError, ServerError
from hafrm.export.plain_model import read_golden
from hafrm.results import to_plain
from hafrm.scoring.reward_model import RewardModel
from hafrm.serving import protocols, server_checks
from hafrm.serving.backends import ConversationEncoder
from hafrm.serving.protocols import PROTOCOLS, Rendered
from hafrm.serving.server_checks import (
    CHECKS,
    half_tolerance,
    relative_differences,
    verify_server,
)
from support.reward_servers import openrlhf, pooling_only, serving, sglang, vllm

GOLDEN = {f"user: {k}</s>assistant: {'so ' * k}</s>": 1.5 * k - 4.0 for k in range(11)}
BUILDERS = {
    "vllm-classify": vllm,
    "vllm-pooling": pooling_only,
    "sglang-classify": sglang,
    "openrlhf": openrlhf,
}


@pytest.fixture
def golden(tmp_path):
    file = tmp_path / "golden_scores.jsonl"
    rows = [
        {"text": text, "reward": reward, "input_ids": [k + 1, 2]}
        for k, (text, reward) in enumerate(GOLDEN.items())
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def right(texts):
    rewards = list(GOLDEN.values())
    return [GOLDEN[text] if isinstance(text, str) else rewards[text[0] - 1] for text in texts]


SPOKEN = [protocol for protocol in PROTOCOLS if protocol.name in BUILDERS]


def check_of(replay, name):
    return next(check for check in replay.checks if check.name == name)


@pytest.mark.parametrize("protocol", SPOKEN, ids=lambda protocol: protocol.name)
def test_a_right_server_of_every_protocol_is_found_and_passes(golden, protocol):
    with serving(BUILDERS[protocol.name](right)) as url:
        for address in (url + "/", url + protocol.path):
            replay = verify_server(address, golden)
            assert (replay.protocol, replay.ok, replay.num) == (protocol.name, True, 11)
            assert replay.difference == 0.0
            outcomes = {check.outcome for check in replay.checks}
            assert len(replay.checks) == len(CHECKS) and "fail" not in outcomes


def test_the_largest_difference_is_told_with_its_conversation(golden):
    """Reward 11.0 comes back as 11.33; -4.0 as -3.97."""
    spread = np.std([line.reward for line in read_golden(golden)])

    def off(texts):
        return [{11.0: 11.33, -4.0: -3.97}.get(value, value) for value in right(texts)]

    with serving(vllm(off)) as url:
        replay = verify_server(url, golden, tolerance=0.015)
        assert not replay.ok
        assert replay.difference == pytest.approx(0.33 / spread)
        observed = check_of(replay, "alone").observed
        assert "11.33 instead of 11" in observed
        assert observed.endswith("so so so so so so so so so so </s>")
        assert "softmax" in "".join(replay.tables()[0].notes)
        assert verify_server(url, golden, tolerance=0.4 / spread).ok
        assert verify_server(url, golden).ok  # rounding: the rewards are far more spread than that


@pytest.mark.parametrize("mean", [0.0, 20.0, 400.0])
def test_a_limit_by_the_spread_does_not_grow_with_the_rewards(mean):
    """Spread 2.8: a sixth of it passes; the same answer to all, and all off by half of it, do not, whatever
    constant all rewards have in common."""
    rewards = mean + np.array([-2.8, 2.8] * 5)
    assert half_tolerance(2.8) == 0.25
    for got, passes in (
        (rewards + 2.8 / 6, True),
        (np.full(10, mean), False),
        (rewards + 1.4, False),
        (rewards + 4 * 2.8, False),
    ):
        assert (relative_differences(got, rewards, 2.8).max() <= 0.25) is np.bool_(passes)
    # rewards that are all alike: a quarter of their spread, or what vLLM tolerates
    assert (half_tolerance(0.6), half_tolerance(0.0)) == (0.15, 1.5e-2)


def test_a_server_that_scores_otherwise_in_a_batch_fails(golden):
    """SGLang#2427, reward-bench#137: each reward 0.5 higher when there are several."""
    with serving(openrlhf(lambda t: [value + 0.5 * (len(t) > 1) for value in right(t)])) as url:
        replay = verify_server(url, golden)
        assert not replay.ok
        assert check_of(replay, "alone").outcome == "pass"
        assert check_of(replay, "in batches of 8").outcome == "fail"
        assert "-3.5 instead of -4" in check_of(replay, "in batches of 8").observed


def test_a_server_that_refuses_some_conversation_sent_alone_is_not_verified(golden):
    """As vLLM with a small --max-model-len: no reward could be compared, and the first one is wrong."""
    first = next(iter(GOLDEN))
    answer = vllm(lambda texts: [12345.0] * len(texts))

    def picky(path, body):
        if any(text != first for text in body.get("input", ())):
            return 400, {"error": {"message": "the maximum context length is 16", "code": 400}}
        return answer(path, body)

    with serving(picky) as url:
        replay = verify_server(url, golden)
    assert not replay.ok and math.isnan(replay.difference)
    assert check_of(replay, "alone").outcome == "refused"


def test_what_is_no_number_fails(golden):
    with serving(vllm(lambda texts: [math.nan for _ in texts])) as url:
        replay = verify_server(url, golden)
        assert not replay.ok and math.isnan(replay.difference)
        assert to_plain(replay)["checks"][0]["difference"] is None


def test_long_texts_are_scored_by_plain_transformers_and_compared(exported, monkeypatch):
    """Over 64 of 128 tokens, as 2,048 and 8,192 stand for: a server that loses what it read of a long text
    (vllm#48831) fails there alone."""
    rm = RewardModel.from_pretrained(exported)
    reader = ConversationEncoder(rm.encoder)
    lost = {"cut": 10**6}

    def rewards(inputs):
        talks = [Rendered(text) if isinstance(text, str) else text for text in inputs]
        scores = rm.score_encoded(reader.encode(talks)).tolist()
        return [s + (len(i) > lost["cut"]) for s, i in zip(scores, inputs, strict=True)]

    checks = {
        "alone": CHECKS["alone"],
        "long": (partial(server_checks._long, num_tokens=64), "fix it"),
    }
    monkeypatch.setattr(server_checks, "CHECKS", checks)
    with serving(vllm(rewards)) as url:
        replay = verify_server(url, exported / "reward")
        assert check_of(replay, "long").outcome == "pass", replay
        lost["cut"] = max(len(line.text) for line in read_golden(exported / "reward"))
        replay = verify_server(url, exported / "reward")
        assert check_of(replay, "alone").outcome == "pass"
        assert (check_of(replay, "long").outcome, check_of(replay, "long").fix) == (
            "fail",
            "fix it",
        )


def test_only_the_protocols_of_a_path_are_tried_and_all_reasons_are_told(golden):
    with serving(openrlhf(right)) as url, pytest.raises(ServerError) as raised:
        verify_server(url + "/classify", golden)
    message = str(raised.value)
    assert "vllm-classify" in message and "sglang-classify" in message
    assert "openrlhf" not in message
    assert "answers 404 Not Found" in message


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (401, {"detail": "own words"}, "--api-key.*own words"),
        (422, {"detail": "own words"}, "no protocol that hafrm knows(.|\n)*own words"),
        (503, {}, "Service Unavailable"),
        (200, b"<html>", "does not answer JSON"),
        (200, {"rewards": [1.0, 2.0]}, "one reward for each of 1 texts"),
        (200, {"rewards": ["high"]}, "'high'"),
        (200, {"data": [{"index": 0, "data": [0.1, 0.2]}]}, "embeddings"),
    ],
)
def test_refusals_and_answers_of_another_shape_are_told(golden, status, answer, message):
    with serving(lambda *_: (status, answer)) as url, pytest.raises(ServerError, match=message):
        verify_server(url, golden)


def test_a_late_and_an_absent_server_are_told_apart(golden, monkeypatch):
    def late(path, body):
        time.sleep(0.3)
        return 200, {}

    with monkeypatch.context() as patch, serving(late) as url:
        patch.setattr(protocols, "TIMEOUT", 0.1)
        with pytest.raises(ServerError, match="timed out"):
            verify_server(url, golden)
    with pytest.raises(ServerError, match="is the server up"):
        verify_server("http://127.0.0.1:9", golden)


def test_the_key_is_sent_as_a_bearer_token(golden):
    inner = openrlhf(right)

    def guarded(path, body):
        is_allowed = path != "/get_reward" or body.get("_authorization") == "Bearer secret"
        return inner(path, body) if is_allowed else (401, {})

    with serving(guarded) as url:
        replay = verify_server(url, golden, api_key="secret")
        assert replay.ok and check_of(replay, "without the key").outcome == "pass"
        with pytest.raises(ServerError, match="401"):
            verify_server(url, golden)


def test_messages_without_text_are_refused(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "golden.jsonl"
    file.write_text(json.dumps({"messages": messages, "reward": 1.0}) + "\n")
    with pytest.raises(DataError, match="without rendered `text`"):
        verify_server("http://127.0.0.1:9", file)


def test_a_password_in_the_address_is_sent_and_not_shown(golden):
    keys, answer = [], vllm(right)

    def noted(path, body):
        keys.append(body.get("_authorization"))
        return answer(path, body)

    with serving(noted) as url:
        replay = verify_server(url.replace("://", "://me:p%40ss@"), golden)
    assert replay.ok
    assert set(keys[1:]) == {"Basic " + base64.b64encode(b"me:p@ss").decode()}
    assert "ss@" not in repr(replay)
    with pytest.raises(ServerError) as caught:
        verify_server("http://me:SECRET@127.0.0.1:9", golden)
    assert "SECRET" not in str(caught.value)
