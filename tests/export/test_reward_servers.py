"""Golden scores asked of servers of every protocol: found by themselves, right, wrong, or a clear error."""

import json
import math
import subprocess
import sys
import time

import pytest

from hafrm.errors import ConfigError, DataError, ServerError
from hafrm.export.reward_servers import PROTOCOLS, Address, verify_server
from hafrm.results import to_plain
from reward_servers import openrlhf, pooling_only, serving, sglang, vllm

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


def asked(url, golden, **options):
    return verify_server(Address(url, timeout=5.0), golden, **options)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_right_server_of_every_protocol_is_found_and_passes(golden, name):
    with serving(BUILDERS[name](right)) as url:
        found = asked(url, golden)
        assert (found.protocol, found.ok, found.num) == (name, True, 11)
        assert found.difference == found.batch_difference == 0.0
        assert found.model == ("rm" if name.startswith("vllm") else None)
        whole = asked(url + PROTOCOLS[name].path, golden, protocol=name)
        assert (whole.protocol, whole.ok) == (name, True)


def test_the_largest_difference_is_told_with_its_conversation(golden):
    """Reward 11.0 comes back as 11.33: 0.33 / 11 = 0.03; -4.0 as -3.97: 0.0075 is within 1.5e-2."""

    def off(texts):
        return [{11.0: 11.33, -4.0: -3.97}.get(value, value) for value in right(texts)]

    with serving(vllm(off)) as url:
        found = asked(url, golden)
        assert not found.ok
        assert found.difference == pytest.approx(0.03)
        assert (found.expected, found.got) == (11.0, pytest.approx(11.33))
        assert found.worst.endswith("so so so so so so so so so so </s>")
        assert asked(url, golden, tolerance=0.05).ok


def test_a_server_that_scores_otherwise_in_a_batch_fails(golden):
    """SGLang#2427, reward-bench#137: each reward 0.5 higher when there are several."""

    def crowded(texts):
        return [value + 0.5 * (len(texts) > 1) for value in right(texts)]

    with serving(openrlhf(crowded)) as url:
        found = asked(url, golden)
        assert not found.ok
        assert found.batch_difference == pytest.approx(0.5)


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
        found = asked(url, golden)
        assert not found.ok
        assert said in found.suspicion
        assert bool(found.suspicion) == bool(said)


def test_a_reward_that_is_no_number_is_the_largest_difference(golden):
    with serving(openrlhf(lambda texts: [math.nan for _ in texts])) as url:
        found = asked(url, golden)
        assert not found.ok
        assert math.isnan(found.difference)
        assert to_plain(found)["difference"] is None


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
        assert asked(url, golden).ok
    assert set(GOLDEN) == set(seen)
    with serving(vllm(lambda texts: right([t.removeprefix("<s>") for t in texts]))) as url:
        assert asked(url, golden).ok


def test_only_the_protocols_of_a_path_are_tried_and_all_reasons_are_told(golden):
    with serving(openrlhf(right)) as url:
        with pytest.raises(ServerError) as told:
            asked(url + "/classify", golden)
        assert "vllm-classify" in str(told.value)
        assert "sglang-classify" in str(told.value)
        assert "openrlhf" not in str(told.value)
        assert "answers 404: it has no such path" in str(told.value)
        with pytest.raises(ConfigError, match="not an address of protocol openrlhf"):
            asked(url + "/classify", golden, protocol="openrlhf")
        with pytest.raises(ConfigError, match="must be auto or one of"):
            asked(url, golden, protocol="grpc")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "wants an API key"),
        (403, "not accepted"),
        (422, "another protocol"),
        (429, "overloaded"),
        (503, "not ready"),
    ],
)
def test_refusals_are_told_with_what_to_do_and_the_servers_own_words(golden, status, said):
    with (
        serving(lambda *_: (status, {"detail": "own words"})) as url,
        pytest.raises(ServerError, match=said) as told,
    ):
        asked(url, golden)
    assert "own words" in str(told.value)


def test_a_late_an_absent_and_a_wrong_server_are_told_apart(golden):
    def late(path, body):
        time.sleep(0.5)
        return 200, {}

    with (
        serving(late) as url,
        pytest.raises(ServerError, match=r"no answer within 0\.1 s; raise --timeout"),
    ):
        verify_server(Address(url, timeout=0.1), golden)
    with pytest.raises(ServerError, match="cannot be reached"):
        asked("http://127.0.0.1:9", golden)
    with (
        serving(lambda *_: (200, b"<html>")) as url,
        pytest.raises(ServerError, match="does not answer JSON"),
    ):
        asked(url, golden)
    with pytest.raises(ConfigError, match="begins with http"):
        Address("ftp://here")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"rewards": "many"}, "neither `rewards` nor `scores`"),
        ({"rewards": [1.0, 2.0]}, "2 rewards for 1 texts"),
        ({"rewards": ["high"]}, "'high' instead of a reward"),
        (
            {"data": [{"index": 0, "data": [0.1, 0.2]}]},
            "has 2 numbers, but a reward model gives one",
        ),
        ({"data": {}}, "instead of a list"),
    ],
)
def test_answers_of_another_shape_are_described(golden, answer, said):
    with serving(lambda *_: (200, answer)) as url, pytest.raises(ServerError, match=said):
        asked(url, golden)


def test_the_key_is_sent_as_a_bearer_token(golden):
    inner = openrlhf(right)

    def guarded(path, body):
        known = body.get("_authorization") == "Bearer secret"
        return inner(path, body) if known or path != "/get_reward" else (401, {})

    with serving(guarded) as url:
        assert verify_server(Address(url, "secret", 5.0), golden).ok
        with pytest.raises(ServerError, match="401"):
            asked(url, golden)


def test_messages_without_text_or_tokenizer_are_refused(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "golden.jsonl"
    file.write_text(json.dumps({"messages": messages, "reward": 1.0}) + "\n")
    with pytest.raises(DataError, match="no tokenizer beside it"):
        asked("http://127.0.0.1:9", file)


def test_a_server_is_verified_without_torch():
    code = (
        "import sys, hafrm.export.reward_servers, hafrm.cli.verify;"
        "print({'torch', 'transformers'} & set(sys.modules) or '')"
    )
    command = [sys.executable, "-c", code]
    assert not subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
