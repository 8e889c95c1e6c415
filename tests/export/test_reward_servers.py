"""Golden scores asked of servers of every protocol: found by themselves, right, wrong, or a clear error."""

import json
import math
import subprocess
import sys
import time

import pytest

from hafrm.errors import ConfigError, DataError, ServerError
from hafrm.export import reward_servers
from hafrm.export.reward_servers import PROTOCOLS, verify_server
from hafrm.results import to_plain
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
    rows = [{"text": text, "reward": reward, "input_ids": [1]} for text, reward in GOLDEN.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def right(texts):
    return [GOLDEN[text] for text in texts]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_a_right_server_of_every_protocol_is_found_and_passes(golden, protocol):
    with serving(BUILDERS[protocol.name](right)) as url:
        for address in (url, url + "/", url + protocol.path):
            replay = verify_server(address, golden)
            assert (replay.protocol, replay.ok, replay.num) == (protocol.name, True, 11)
            assert replay.difference == replay.batch_difference == 0.0


def test_the_largest_difference_is_told_with_its_conversation(golden):
    """Reward 11.0 comes back as 11.33: 0.33 / 11 = 0.03; -4.0 as -3.97: 0.0075 is within 1.5e-2."""

    def off(texts):
        return [{11.0: 11.33, -4.0: -3.97}.get(value, value) for value in right(texts)]

    with serving(vllm(off)) as url:
        replay = verify_server(url, golden)
        assert not replay.ok
        assert replay.difference == pytest.approx(0.03)
        assert (replay.expected, replay.got) == (11.0, pytest.approx(11.33))
        assert replay.worst.endswith("so so so so so so so so so so </s>")
        assert verify_server(url, golden, tolerance=0.05).ok


def test_a_server_that_scores_otherwise_in_a_batch_fails(golden):
    """SGLang#2427, reward-bench#137: each reward 0.5 higher when there are several."""

    def crowded(texts):
        return [value + 0.5 * (len(texts) > 1) for value in right(texts)]

    with serving(openrlhf(crowded)) as url:
        replay = verify_server(url, golden)
        assert not replay.ok
        assert replay.batch_difference == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: 1.0 / (1.0 + math.exp(-r)), "sigmoids"),
        (lambda _: 1.0, "softmax over one label"),
        (lambda _: 0.25, "same reward"),
        (lambda r: r + 1.0, ""),
    ],
)
def test_well_known_mistakes_are_recognised(golden, change, said):
    with serving(vllm(lambda texts: [change(r) for r in right(texts)])) as url:
        replay = verify_server(url, golden)
        assert not replay.ok
        assert said in replay.suspicion
        assert bool(replay.suspicion) == bool(said)


def test_a_reward_that_is_no_number_is_the_largest_difference(golden):
    with serving(openrlhf(lambda texts: [math.nan for _ in texts])) as url:
        replay = verify_server(url, golden)
        assert not replay.ok
        assert math.isnan(replay.difference)
        assert to_plain(replay)["difference"] is None


def test_the_bos_that_a_server_adds_by_itself_is_not_sent(golden):
    """SGLang tokenises with special tokens: where the tokenizer adds a BOS, the text is sent without."""
    seen = []

    def listening(texts):
        seen.extend(texts)
        return right(["user" + text.removeprefix("user") for text in texts])

    config = {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    (golden.parent / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in golden.read_text().splitlines()]
    golden.write_text("".join(json.dumps(r | {"text": "<s>" + r["text"]}) + "\n" for r in rows))
    with serving(sglang(lambda texts: listening([t.removeprefix("<s>") for t in texts]))) as url:
        assert verify_server(url, golden).ok
    assert set(GOLDEN) == set(seen)
    with serving(vllm(lambda texts: right([t.removeprefix("<s>") for t in texts]))) as url:
        assert verify_server(url, golden).ok


def test_only_the_protocols_of_a_path_are_tried_and_all_reasons_are_told(golden):
    with serving(openrlhf(right)) as url, pytest.raises(ServerError) as raised:
        verify_server(url + "/classify", golden)
    assert "vllm-classify" in str(raised.value)
    assert "sglang-classify" in str(raised.value)
    assert "openrlhf" not in str(raised.value)
    assert "answers 404 Not Found" in str(raised.value)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "--api-key"), (422, "no protocol that hafrm knows"), (503, "Service Unavailable")],
)
def test_refusals_are_told_with_what_to_do_and_the_servers_own_words(golden, status, said):
    with (
        serving(lambda *_: (status, {"detail": "own words"})) as url,
        pytest.raises(ServerError, match=said) as raised,
    ):
        verify_server(url, golden)
    assert "own words" in str(raised.value)


def test_a_late_an_absent_and_a_wrong_server_are_told_apart(golden, monkeypatch):
    def late(path, body):
        time.sleep(0.5)
        return 200, {}

    with monkeypatch.context() as patch, serving(late) as url:
        patch.setattr(reward_servers, "TIMEOUT", 0.1)
        with pytest.raises(ServerError, match="timed out"):
            verify_server(url, golden)
    with pytest.raises(ServerError, match="is the server up"):
        verify_server("http://127.0.0.1:9", golden)
    with pytest.raises(ConfigError, match="begins with http"):
        verify_server("ftp://here", golden)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>", "does not answer JSON"),
        ({"rewards": 1.0}, "of another form"),
        ({"scores": [1.0]}, "of another form"),
        ({"rewards": [1.0, 2.0]}, "2 rewards for 1 texts"),
        ({"rewards": ["high"]}, "'high' instead of a reward"),
        ({"rewards": [True]}, "True instead of a reward"),
        (
            {"data": [{"index": 0, "data": [0.1, 0.2]}]},
            "gives 2 numbers for a text, but a reward model gives one",
        ),
        ({"data": {}}, "0 rewards for 1 texts"),
    ],
)
def test_answers_of_another_shape_are_described(golden, answer, said):
    with serving(lambda *_: (200, answer)) as url, pytest.raises(ServerError, match=said):
        verify_server(url, golden)


def test_the_key_is_sent_as_a_bearer_token(golden):
    inner = openrlhf(right)

    def guarded(path, body):
        known = body.get("_authorization") == "Bearer secret"
        return inner(path, body) if known or path != "/get_reward" else (401, {})

    with serving(guarded) as url:
        assert verify_server(url, golden, api_key="secret").ok
        with pytest.raises(ServerError, match="401"):
            verify_server(url, golden)


def test_messages_without_text_are_refused(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "golden.jsonl"
    file.write_text(json.dumps({"messages": messages, "reward": 1.0}) + "\n")
    with pytest.raises(DataError, match="without rendered `text`"):
        verify_server("http://127.0.0.1:9", file)


def test_a_server_is_verified_without_torch():
    code = (
        "import sys, hafrm.export.reward_servers, hafrm.cli.verify;"
        "print({'torch', 'transformers'} & set(sys.modules) or '')"
    )
    command = [sys.executable, "-c", code]
    assert not subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
