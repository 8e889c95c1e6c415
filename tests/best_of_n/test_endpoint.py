"""Endpoints that are busy, broken, slow, wrong or absent; against a server on this machine."""

import socket
import sys
import time

import pytest

from hafrm.best_of_n.endpoint import Endpoint, EndpointSection, Reply
from hafrm.errors import ConfigError, ServerError
from hafrm.preferences import Message
from support.chat_endpoint import fails, says, serving


def conversation(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


@pytest.fixture
def connect(tmp_path):
    """Endpoints that share one cache."""

    def make(fake, key_variable="HAFRM_ENDPOINT_KEY", **options):
        section = EndpointSection(timeout=5.0, **options)
        return Endpoint(fake.url, section, key_variable=key_variable, cache=tmp_path)

    return make


def texts(replies: list[Reply]) -> list[str]:
    return [reply.text for reply in replies]


def content(body) -> str:
    return body["messages"][-1]["content"]


def test_replies_come_in_the_order_asked_with_settings_and_several_at_a_time(connect):
    def answer(body):
        time.sleep(0.05 if content(body) == "0" else 0.01)
        return says(f"re {content(body)}")

    with serving(answer) as fake:
        asked = [conversation(str(i)) for i in range(8)]
        replies = connect(fake, concurrency=4, request={"top_p": None, "seed": 3}).ask(
            asked, {"temperature": 0.0, "top_p": 1.0}
        )
        assert texts(replies) == [f"re {i}" for i in range(8)]
        assert 2 <= fake.most_at_once <= 4
        body = dict(fake.asked[0], messages=None)
        assert body == {"model": "m", "messages": None, "temperature": 0.0, "seed": 3}


def test_an_interrupt_leaves_the_other_requests_unsent(connect):
    def interrupt(num_done, _):
        raise KeyboardInterrupt

    asked = [conversation(str(i)) for i in range(200)]
    with serving(lambda _: says("ok")) as fake:
        with pytest.raises(KeyboardInterrupt):
            connect(fake, concurrency=1).ask(asked, {}, on_progress=interrupt)
        assert len(fake.asked) < 100


def test_the_only_model_is_taken_and_several_must_be_named(connect):
    with serving(lambda _: says("ok")) as fake:
        assert connect(fake).model == "m"
        fake.models = ["one", "two"]
        with pytest.raises(ServerError, match=r"2 models \(one, two\); name one"):
            _ = connect(fake).model
        assert connect(fake, model="two").model == "two"


def test_a_key_is_sent_to_the_endpoint_it_is_for_and_is_not_cached(monkeypatch, connect, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "general")
    monkeypatch.setenv("HAFRM_JUDGE_KEY", "judge")
    with serving(lambda _: says("ok")) as fake:
        for name in ("HAFRM_JUDGE_KEY", "HAFRM_ENDPOINT_KEY"):
            connect(fake, name).ask([conversation(name)], {})
        assert fake.keys == ["Bearer judge", "Bearer general"]
    files = [f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()]
    assert files
    assert not any(b"general" in content for content in files)


def test_refusals_and_limits_are_distinguished_from_answers(connect):
    answers = [says("", refusal="I will not"), says("x", finish="content_filter")]
    answers += [says("half", finish="length"), says("whole")]
    with serving(lambda _: answers.pop(0)) as fake:
        replies = connect(fake, concurrency=1).ask([conversation(c) for c in "abcd"], {})
    assert [reply.refused for reply in replies] == [True, True, False, False]
    assert [reply.ended for reply in replies] == [True, True, False, True]


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>welcome</html>"),
        (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
        fails(401, "who are you"),
        fails(500, "out of cheese"),
    ],
)
def test_what_no_retry_can_fix_ends_the_job_and_is_shown(answer, connect):
    with serving(lambda _: answer) as fake:
        with pytest.raises(ServerError, match=r"cannot be used.*/v1.*key"):
            connect(fake, retries=0).ask([conversation("a")], {})
        assert len(fake.asked) == 1


def test_an_address_where_nobody_answers_is_an_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match=r"cannot be used: Connection error.*/v1"):
        Endpoint(url, EndpointSection(model="m", retries=0)).ask([conversation("a")], {})


def test_what_was_answered_is_not_asked_again_even_with_the_server_gone(connect):
    with serving(lambda body: says(content(body))) as fake:
        connect(fake).ask([conversation("a")], {"temperature": 0.0})
        second = connect(fake)
        replies = second.ask([conversation("a"), conversation("b")], {"temperature": 0.0})
        assert texts(replies) == ["a", "b"]
        assert len(fake.asked) == 2
        second.ask([conversation("a")], {"temperature": 1.0})
        second.ask([conversation("a")], {"temperature": 0.0}, repetition=(1,))
        assert len(fake.asked) == 4
    assert texts(second.ask([conversation("b")], {"temperature": 0.0})) == ["b"]


def test_a_missing_client_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'hafrm\[judge\]'"):
        Endpoint("http://x/v1")


def test_a_password_in_the_address_is_sent_and_neither_shown_nor_kept(tmp_path):
    def answer(body):
        echo = f"api_key={body['api_key']}"
        return says("ok") if content(body) == "a" else fails(400, echo)

    with serving(answer) as fake:
        url = fake.url.replace("://", "://me:SECRET@")
        section = EndpointSection(retries=0, request={"api_key": "SECRET"})
        endpoint = Endpoint(url, section, cache=tmp_path)
        replies = endpoint.ask([conversation("a"), conversation("b")], {})
        assert fake.asked[0]["api_key"] == "SECRET"
    assert replies[0] == Reply("ok")
    shown = [repr(replies), endpoint.url, repr(endpoint.cache_key({}))]
    with pytest.raises(ServerError) as caught:
        Endpoint(url, section, cache=tmp_path).ask([conversation("c")], {})
    assert "SECRET" not in "".join([*shown, str(caught.value)])
