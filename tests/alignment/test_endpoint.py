"""Endpoints that are busy, broken, slow, wrong or absent; against a server on this machine."""

import socket
import threading
import time
from email.utils import formatdate

import pytest

from endpoint_for_tests import fails, says, serving
from hafrm.alignment import endpoint as module
from hafrm.alignment.endpoint import Endpoint, EndpointOptions, require_some
from hafrm.alignment.replies import Reply, retry_after
from hafrm.alignment.reply_cache import ReplyCache
from hafrm.errors import CheckpointError, ConfigError, ServerError
from hafrm.preferences import Message


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)


def conversation(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def connect(fake, cache=None, **options) -> Endpoint:
    return Endpoint(EndpointOptions(**{"url": fake.url, "timeout": 5.0, **options}), cache)


def texts(replies: list[Reply]) -> list[str]:
    return [reply.choices[0].text for reply in replies]


def content(body) -> str:
    return body["messages"][-1]["content"]


def test_replies_come_in_the_order_asked_with_settings_and_several_at_a_time():
    def answer(body):
        time.sleep(0.05 if content(body) == "0" else 0.01)
        return says(f"re {content(body)}", "other")

    with serving(answer) as fake:
        asked = [conversation(str(i)) for i in range(8)]
        replies = connect(fake, concurrency=4, request={"top_p": None, "seed": 3}).ask(
            asked, {"temperature": 0.0, "top_p": 1.0}
        )
        assert texts(replies) == [f"re {i}" for i in range(8)]
        assert [len(reply.choices) for reply in replies] == [2] * 8
        assert 2 <= fake.most_at_once <= 4
        body = dict(fake.asked[0], messages=None)
        assert body == {"model": "m", "messages": None, "temperature": 0.0, "seed": 3}


def test_a_rate_limit_is_waited_out_by_everybody_and_counts_as_no_failure():
    """The first of three requests is turned away for 0.3 s; no request arrives before that is over."""
    times, lock = [], threading.Lock()

    def answer(_):
        with lock:
            times.append(time.monotonic())
            first = len(times) == 1
        return fails(429, retry_after="0.3") if first else says("ok")

    with serving(answer) as fake:
        asked = [conversation(str(i)) for i in range(3)]
        assert texts(connect(fake, concurrency=1, retries=0).ask(asked, {})) == ["ok"] * 3
    assert times[1] - times[0] >= 0.3
    assert len(times) == 4


def test_retry_after_may_be_a_date_and_may_ask_too_much():
    assert retry_after({"retry-after": "2"}) == 2.0
    assert retry_after(
        {"retry-after": formatdate(time.time() + 100, usegmt=True)}
    ) == pytest.approx(100, abs=2)
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None
    with (
        serving(lambda _: fails(429, retry_after="100000")) as fake,
        pytest.raises(ServerError, match="asks to wait 100000 s"),
    ):
        connect(fake).ask([conversation("a")], {})


@pytest.mark.parametrize(
    "broken",
    [
        fails(500),
        fails(503, retry_after="0"),
        fails(429),
        (200, {}, b"<html>welcome</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
        (200, {}, b'["x"]'),
    ],
)
def test_errors_of_the_server_and_nonsense_are_asked_again(broken):
    left = [broken, broken]
    with serving(lambda _: left.pop() if left else says("ok")) as fake:
        assert texts(connect(fake).ask([conversation("a")], {})) == ["ok"]
        assert len(fake.asked) == 3


def test_a_request_that_takes_too_long_is_asked_again():
    slow = [True]

    def answer(_):
        if slow and slow.pop():
            time.sleep(0.6)
        return says("ok")

    with serving(answer) as fake:
        assert texts(connect(fake, timeout=0.25).ask([conversation("a")], {})) == ["ok"]
        assert len(fake.asked) == 2


def test_what_never_works_ends_the_job_and_says_what_was_seen():
    with (
        serving(lambda _: fails(500, "out of cheese")) as fake,
        pytest.raises(ServerError, match=r"out of cheese.*3 times"),
    ):
        connect(fake, retries=2).ask([conversation("a"), conversation("b")], {})
    with serving(lambda _: fails(401, "who are you")) as fake:
        with pytest.raises(ServerError, match=r"status 401: .*who are you.*key"):
            connect(fake).ask([conversation("a")], {})
        assert len(fake.asked) == 1


def test_an_address_where_nobody_answers_is_given_up_soon():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match=r"cannot be used: Connection error.*3 times.*/v1"):
        Endpoint(EndpointOptions(url, "m", retries=50)).ask([conversation("a")], {})


def test_a_single_rejected_request_is_a_reply_and_all_of_them_an_error():
    def answer(body):
        return fails(400, "too long") if content(body) == "long" else says("ok")

    with serving(answer) as fake:
        found = connect(fake).ask([conversation("long"), conversation("a")], {})
        assert "too long" in (found[0].error or "")
        assert found[1].choices[0].text == "ok"
        require_some(found, fake.url)
        with pytest.raises(ServerError, match=r"rejects every request.*too long"):
            require_some(found[:1], fake.url)


def test_what_was_answered_is_not_asked_again_also_by_another_process(tmp_path):
    file = tmp_path / "cache" / "replies.sqlite"
    with serving(lambda body: says(content(body))) as fake:
        first = connect(fake, ReplyCache(file))
        first.ask([conversation("a")], {"temperature": 0.0})
        second = connect(fake, ReplyCache(file))
        assert texts(second.ask([conversation("a"), conversation("b")], {"temperature": 0.0})) == [
            "a",
            "b",
        ]
        assert len(fake.asked) == 2
        second.ask([conversation("a")], {"temperature": 1.0})
        second.ask([conversation("a")], {"temperature": 0.0}, repetition=(1,))
        assert len(fake.asked) == 4
    # Served from the disk, with the server gone.
    assert texts(second.ask([conversation("b")], {"temperature": 0.0})) == ["b"]


def test_a_job_that_fails_half_way_has_kept_what_was_answered(tmp_path):
    cache = ReplyCache(tmp_path / "replies.sqlite")
    broken = {"b"}

    def answer(body):
        return fails(500) if content(body) in broken else says("ok")

    with serving(answer) as fake:
        asked = [conversation(text) for text in "abc"]
        with pytest.raises(ServerError):
            connect(fake, cache, retries=0, concurrency=1).ask(asked, {})
        broken.clear()
        fake.asked.clear()
        assert texts(connect(fake, cache).ask(asked, {})) == ["ok"] * 3
        assert "a" not in [content(body) for body in fake.asked]


def test_a_cache_that_is_no_cache_is_refused_with_the_fix(tmp_path):
    (tmp_path / "replies.sqlite").write_text("this is no database, it is a letter. " * 50)
    with pytest.raises(CheckpointError, match="remove it"):
        ReplyCache(tmp_path / "replies.sqlite")


def test_the_only_model_is_found_and_several_must_be_named():
    with serving(lambda _: says("ok")) as fake:
        assert connect(fake).model == "m"
        fake.models = ["one", "two"]
        with pytest.raises(ServerError, match=r"2 models \(one, two\); name one"):
            _ = connect(fake).model
        assert connect(fake, model="two").model == "two"


def test_a_key_is_sent_to_the_endpoint_it_is_for(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "general")
    monkeypatch.setenv("HAFRM_JUDGE_KEY", "judge")
    with serving(lambda _: says("ok")) as fake:
        for names in (
            ("HAFRM_JUDGE_KEY", "OPENAI_API_KEY"),
            ("HAFRM_ENDPOINT_KEY", "OPENAI_API_KEY"),
        ):
            connect(fake, key_variables=names).ask([conversation("a")], {})
        assert fake.keys == ["Bearer judge", "Bearer general"]


def test_refusals_and_limits_are_told_from_answers():
    answers = [says("", refusal="I will not"), says("x", finish="content_filter")]
    answers += [says("half", finish="length"), says("whole")]
    with serving(lambda _: answers.pop(0)) as fake:
        found = connect(fake, concurrency=1).ask([conversation(c) for c in "abcd"], {})
    choices = [reply.choices[0] for reply in found]
    assert [choice.refused for choice in choices] == [True, True, False, False]
    assert [choice.ended for choice in choices] == [True, True, False, True]


def test_options_that_make_no_sense_and_a_missing_client_are_refused(monkeypatch):
    for wrong in ({"url": "localhost:8000"}, {"concurrency": 0}, {"timeout": 0.0}, {"retries": -1}):
        with pytest.raises(ConfigError):
            EndpointOptions(**{"url": "http://x/v1", **wrong})
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'hafrm\[judge\]'"):
        Endpoint(EndpointOptions("http://x/v1"))
