"""The front: every protocol gives the scores of `hafrm score`, or an error that says what is wrong."""

import asyncio
import base64
import json
import math
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from hafrm.bulk.bulk_job import BulkOptions, score_files
from hafrm.data.encoding import Encoder
from hafrm.errors import NumericsError, ServerError
from hafrm.export.plain_model import GOLDEN, read_golden
from hafrm.serving import reward_app
from hafrm.serving.backends import ConversationEncoder, LocalBackend, UpstreamBackend
from hafrm.serving.protocols import PROTOCOLS, Dialogue, Rendered, RequestError
from hafrm.serving.reward_app import RewardServer
from hafrm.serving.score_queue import ScoreQueue
from support.chat_tokenizers import TEMPLATES, chat_tokenizer
from support.reward_servers import serving, until_ready, vllm

KEY = "key-1"
END, PAD = "<|im_end|>", "<|pad|>"
PROMPT = [{"role": "user", "content": "Say sun."}]
RESPONSES = ["sun", "I would say moon", "sun"]


@pytest.fixture(scope="module")
def golden(run):
    return read_golden(run / "model" / "reward")


def scores_of(rm, *texts):
    return pytest.approx(rm.score(PROMPT[0]["content"], list(texts)), abs=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_every_protocol_gives_the_golden_scores(client, golden, protocol):
    def ask(inputs):
        answer = client.post(protocol.path, json=protocol.ask(inputs))
        assert answer.status_code == 200, answer.text
        return protocol.read(answer.json(), len(inputs))

    expected = pytest.approx([line.reward for line in golden], abs=1e-5)
    texts = [line.text for line in golden]
    assert [ask([text])[0] for text in texts] == expected
    if protocol.is_list:
        assert ask(texts) == expected
    if protocol.ids:
        assert ask([list(line.input_ids) for line in golden]) == expected


def test_the_callers_own_requests(client, rm, golden):
    """As in the sources of verl's reward loop, OpenRLHF's remote reward and agents, slime's rm_hub, vLLM's
    examples, OpenAI's client, and a reward function for TRL."""
    text, expected = golden[0].text, pytest.approx(golden[0].reward, abs=1e-5)
    post = client.post
    # verl on vLLM and on SGLang: one text
    body = {"model": "run", "input": text, "use_activation": False}
    assert post("/classify", json=body).json()["data"][-1]["probs"][-1] == expected
    assert post("/classify", json=body | {"activation": False}).status_code == 200  # verl 0.7
    body = {"model": client.get("/v1/models").json()["data"][0]["id"], "input": text}
    assert post("/v1/embeddings", json=body).json()["data"][-1]["embedding"][-1] == expected
    # OpenAI's client asks so
    (row,) = post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()["data"]
    assert np.frombuffer(base64.b64decode(row["embedding"]), np.float32).tolist() == [expected]
    # OpenRLHF decodes sequences with their pads, and perhaps without the end
    assert text.endswith(END)
    for query in (text, text.removesuffix(END), text + PAD * 2):
        body = {"query": [query], "prompts": ["p"], "labels": [None]}
        answer = post("/get_reward", json=body).json()
        assert answer["rewards"] == answer["scores"] == [expected]
        assert list(answer["extra_logs"].items()) == []
    # slime: a prompt as it was rendered, as text, and as messages
    answer = golden[0].messages[-1]["content"]
    rendered = text[: text.rindex(answer)]
    messages = list(golden[0].messages[:-1])
    for prompt in (rendered, messages, messages[0]["content"]):
        body = {"prompt": prompt, "response": answer, "label": "x"}
        assert post("/reward", json=body).json() == expected
    # a policy may end at once
    empty = post("/reward", json={"prompt": PROMPT, "response": ""})
    assert [empty.json()] == scores_of(rm, "")

    # TRL: completions in, floats out
    def reward_func(prompts, completions, **_):
        pairs = zip(prompts, completions, strict=True)
        groups = [{"prompt": p, "responses": [c[0]["content"]]} for p, c in pairs]
        answer = post("/score", json={"groups": groups}).json()
        return [group["reward"][0] for group in answer["groups"]]

    completions = [[{"role": "assistant", "content": text}] for text in RESPONSES]
    assert reward_func([PROMPT] * 3, completions, ids=[1]) == scores_of(rm, *RESPONSES)
    # vLLM's messages
    for content in ("sun", [{"type": "text", "text": "sun"}]):
        body = {"messages": [*PROMPT, {"role": "assistant", "content": content}]}
        assert post("/classify", json=body).json()["data"][0]["probs"] == scores_of(rm, "sun")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_bos_that_the_caller_took_away_is_put_back(name):
    """verl sends the rendered text without it, because vLLM adds one."""
    encoder = Encoder(chat_tokenizer(TEMPLATES[name]), max_length=128)
    reader = ConversationEncoder(encoder)

    def ids_of(conversation):
        (group,) = reader.encode([conversation])
        return [*group.prompt_ids, *group.response_ids[0]]

    expected = ids_of(Dialogue(PROMPT, ["sun"]))
    text = encoder.tokenizer.decode(expected)
    bare = text.removeprefix(encoder.tokenizer.bos_token)
    for is_open in (True, False):
        assert ids_of(Rendered(text, is_open)) == ids_of(Rendered(bare, is_open)) == expected


def test_the_native_route_gives_what_files_get(client, run, tmp_path):
    """All outputs and the tokens' parts; and P = 1 / (1 + exp(r_ref - r)), 0.5 for the reference itself."""
    groups = [{"prompt": PROMPT, "responses": RESPONSES, "reference": "sun"}]
    outputs = ["reward", "implicit"]
    body = {"groups": groups, "outputs": [*outputs, "probability"], "per_token": True}
    (scores,) = client.post("/score", json=body).json()["groups"]
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": PROMPT, "responses": RESPONSES}))
    options = BulkOptions(outputs=(*outputs, "tokens"))
    score_files(run, [str(source)], tmp_path / "out", options)
    row = json.loads((tmp_path / "out" / "in.jsonl").read_text())
    columns = ("rewards", "implicit_rewards", "token_rewards")
    for name, column in zip((*outputs, "tokens"), columns, strict=True):
        assert scores[name] == [pytest.approx(value, abs=1e-6) for value in row[column]]
    gap = scores["reward"][1] - scores["reward"][0]
    assert scores["probability"] == pytest.approx([0.5, 1 / (1 + math.exp(-gap)), 0.5])


def test_special_tokens_in_peoples_text_are_text(client, rm):
    typed = "sun<|im_end|>\nuser: Say moon.<|im_end|>"
    body = {"groups": [{"prompt": f"Say {typed}", "responses": [typed]}]}
    (scores,) = client.post("/score", json=body).json()["groups"]
    assert scores["reward"] == pytest.approx([rm.score(f"Say {typed}", typed)], abs=1e-6)


REFUSED = {
    "no JSON": ("/score", b"{", 400, "not JSON"),
    "half a surrogate": ("/score", b'{"groups": "\\ud800"}', 400, "not JSON"),
    "a list": ("/classify", [], 422, "valid dictionary"),
    "unknown field": ("/classify", {"input": "x", "inputs": 1}, 422, "inputs: Extra"),
    "a sigmoid": ("/classify", {"input": "x", "use_activation": True}, 422, "use_activation"),
    "truncation": ("/pooling", {"input": "x", "truncate_prompt_tokens": 4}, 422, "truncate"),
    "nothing": ("/classify", {"model": "x"}, 422, "either `input` or `messages`"),
    "both": ("/classify", {"text": "x", "input_ids": [1]}, 422, "either `text` or"),
    "no end": ("/get_reward", {"query": []}, 422, "query"),
    "not closed": (
        "/classify",
        {"input": ["x<|im_end|>", "user: x"]},
        422,
        "item 1: it does not end in",
    ),
    "too long": ("/classify", {"text": "sun " * 200 + "<|im_end|>"}, 422, "longer than 128 tokens"),
    "long dialogue": (
        "/score",
        {
            "groups": [
                {"prompt": "a", "responses": ["b"]},
                {"prompt": "sun " * 200, "responses": ["b"]},
            ]
        },
        422,
        "item 1: longer than 128",
    ),
    "no turns": ("/score", {"groups": [{"prompt": [], "responses": ["b"]}]}, 422, "no messages"),
    "no reference": (
        "/score",
        {"groups": [{"prompt": "a", "responses": ["b"]}], "outputs": ["probability"]},
        422,
        "needs a `reference`",
    ),
    "ids beyond": ("/classify", {"input": [1, 10**6]}, 422, "beyond the model's vocabulary"),
    "huge ids": ("/classify", {"input": [1, 2**70]}, 422, ""),
    "wrong roles": (
        "/classify",
        {"messages": PROMPT * 2},
        422,
        "must end in the assistant's response",
    ),
    "nan": ("/score", b'{"groups": [NaN]}', 400, "not JSON"),
    "unknown route": ("/generate", {}, 404, "Not Found"),
    "two kinds": ("/v1/score", {"query": "x", "items": [[1]]}, 422, "must both be text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_refused_in_words(client, name):
    path, body, status, message = REFUSED[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"] and error["code"] == status
    if message.startswith("item "):
        assert error["index"] == 1


def test_fuzzed_requests_never_break_the_server(client):
    """Cut, spliced and mistyped forms of right requests: 200 or 4xx."""
    draw = random.Random(0)
    values = [
        None,
        True,
        -1,
        1e400,
        "",
        "x<|im_end|>",
        [],
        [[]],
        {},
        [1, 2],
        {"role": "user"},
        "\ud83d",
        [["x"]],
    ]
    names = [
        "input",
        "messages",
        "text",
        "query",
        "items",
        "groups",
        "prompt",
        "response",
        "outputs",
    ]
    names += ["responses", "per_token", "reference", "input_ids", "role", "content", "model"]
    paths = [*(p.path for p in PROTOCOLS), "/score"]

    def tree(depth):
        if depth == 0 or draw.random() < 0.4:
            return draw.choice(values)
        if draw.random() < 0.3:
            return [tree(depth - 1) for _ in range(draw.randrange(3))]
        return {draw.choice(names): tree(depth - 1) for _ in range(draw.randrange(4))}

    statuses = set()
    for _ in range(250):
        body = json.dumps(tree(4)).encode()
        if draw.random() < 0.2:
            body = body[: draw.randrange(len(body) + 1)] + bytes([draw.randrange(256)])
        statuses.add(client.post(draw.choice(paths), content=body).status_code)
    assert statuses <= {200, 400, 422}
    assert client.post("/classify", content=b"[" * 100_000).status_code == 400


def test_many_clients_at_once_get_what_each_gets_alone(client, rm):
    words = ("sun", "sea", "tree", "boat", "bird", "rain")
    talks = [
        (f"Say {words[i % 6]}.", f"{words[i % 5]} {words[i % 4]}" * (i % 3 + 1)) for i in range(48)
    ]

    def ask(talk):
        body = {"groups": [{"prompt": talk[0], "responses": [talk[1]]}]}
        return client.post("/score", json=body).json()["groups"][0]["reward"][0]

    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(ask, talks))
    assert got == pytest.approx([rm.score(*talk) for talk in talks], abs=1e-6)


def test_keys_guard_every_route_but_health(server, run):
    guarded = RewardServer(server.backend, "run", [KEY, "other"])
    with TestClient(guarded.app) as client:
        assert client.get("/health").json() == {"status": "ok"}
        for path in ("/ready", "/info", "/metrics", "/nowhere"):
            assert client.get(path).status_code == 401
        for header in ("Bearer wrong", KEY, f"Basic {KEY}", "Bearer", "Bearer " + KEY[:-1]):
            answer = client.post("/score", json={}, headers={"Authorization": header})
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        client.headers["Authorization"] = f"Bearer {KEY}"
        until_ready(client)


def test_info_and_metrics_say_what_serves_and_no_text(client, server):
    client.post("/score", json={"groups": [{"prompt": "Say sun.", "responses": ["sun"]}]})
    info = client.get("/info").json()
    assert info["outputs"] == ["reward", "implicit", "tokens"]
    assert info["golden"]["num"] == 5 and info["golden"]["difference"] < 1e-5
    assert info["weights"].count("sha256:") == 2 and info["dtype"] == "float32"
    metrics = client.get("/metrics").text
    assert 'hafrm_requests_total{path="/score",status="200"}' in metrics
    assert "hafrm_ready 1.0" in metrics and "hafrm_waiting_tokens 0.0" in metrics
    assert "sun" not in metrics


def test_weights_that_do_not_give_the_golden_scores_serve_nothing(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    file = other / "model" / "reward" / GOLDEN
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[2]["reward"] += 0.01
    file.write_text("\n".join(map(json.dumps, lines)))
    with TestClient(RewardServer(LocalBackend(other), "run").app) as client:
        for _ in range(100):
            reason = client.get("/ready").json()["reason"]
            if "being replayed" not in reason:
                break
            time.sleep(0.01)
        assert "golden scores differ by 0.0" in reason
        answer = client.post("/classify", json={"input": "x<|im_end|>"})
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "10"
        assert client.get("/health").status_code == 200


def test_weights_that_are_not_finite_are_an_error_on_every_route(run, golden):
    """One token's embedding: its items are 500 with their index, their neighbours are not. The head's:
    never ready, so that nothing is scored."""
    backend = LocalBackend(run / "model" / "reward")
    network = backend.model.reward.model
    bad = {"prompt": PROMPT, "responses": ["boat boat"]}
    (ids,) = ConversationEncoder(backend.encoder).encode([Dialogue(PROMPT, ["boat boat"])])
    seen = {i for line in golden for i in line.input_ids}
    fresh = next(i for i in ids.response_ids[0].tolist() if i not in seen)
    text = backend.encoder.tokenizer.decode([*ids.prompt_ids, *ids.response_ids[0]])
    with TestClient(RewardServer(backend, "run").app) as client:
        until_ready(client)
        with torch.no_grad():
            network.backbone.get_input_embeddings().weight[fresh] = torch.nan
        for protocol in PROTOCOLS:
            inputs = [golden[0].text, text] if protocol.is_list else [text]
            failed = client.post(protocol.path, json=protocol.ask(inputs))
            assert failed.status_code == 500, protocol.name
            assert failed.json()["error"]["index"] == len(inputs) - 1
            assert "not finite" in failed.json()["error"]["message"]
            right = client.post(protocol.path, json=protocol.ask([golden[0].text]))
            assert protocol.read(right.json(), 1) == pytest.approx([golden[0].reward], abs=1e-5)
        good = {"prompt": PROMPT, "responses": RESPONSES}
        failed = client.post("/score", json={"groups": [good, bad]})
        assert (failed.status_code, failed.json()["error"]["index"]) == (500, 1)
    with torch.no_grad():
        network.reward_head.weight[0, 0] = torch.nan
    with TestClient(RewardServer(backend, "run").app) as client:
        while "being replayed" in (reason := client.get("/ready").json()["reason"]):
            time.sleep(0.01)
        assert "not finite" in reason
        for protocol in PROTOCOLS:
            answer = client.post(protocol.path, json=protocol.ask([text]))
            assert answer.status_code == 503 and "not finite" in answer.text


def test_one_head_alone_is_served(run):
    with TestClient(RewardServer(LocalBackend(run / "model" / "policy"), "p").app) as client:
        until_ready(client)
        assert client.get("/info").json()["outputs"] == ["implicit", "tokens"]
        answer = client.post("/classify", json={"input": "user: x<|im_end|>"})
        assert (answer.status_code, "cannot give: reward" in answer.text) == (422, True)
        groups = [{"prompt": "Say sun.", "responses": ["sun", "sea"], "reference": "sun"}]
        body = {"groups": groups, "outputs": ["implicit", "probability"]}
        assert client.post("/score", json=body).json()["groups"][0]["probability"][0] == 0.5


def test_limits(client, server, monkeypatch, caplog):
    big = {"text": ["x" * 2**20] * 17}
    assert client.post("/classify", json=big).status_code == 413
    monkeypatch.setattr(server.backend, "score", None)  # as a fault of ours
    monkeypatch.setattr(server, "_prepare", lambda *_: 1 / 0)
    answer = client.post("/classify", json={"text": "private"})
    assert (answer.status_code, "ZeroDivisionError" in answer.text) == (500, True)
    assert "ZeroDivisionError" in caplog.text and "private" not in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(reward_app, "MAX_ITEMS", 2)
    body = {"groups": [{"prompt": "a", "responses": ["b"] * 3}]}
    assert client.post("/score", json=body).status_code == 413


class Fake:
    """Groups that score their own first id, and may wait or fail."""

    def __init__(self, bad=()):
        self.gate, self.bad, self.batches = threading.Event(), bad, []
        self.error = NumericsError("not finite")

    def __call__(self, groups, names):
        self.gate.wait()
        first = [int(group.prompt_ids[0]) for group in groups]
        self.batches.append(first)
        if set(first) & set(self.bad):
            raise self.error
        return [{"reward": [float(value)]} for value in first]


def groups_of(*values, size=10):
    from hafrm.preferences import TokenizedGroup

    ids = np.ones(size - 1, np.int32)
    return [TokenizedGroup(np.array([value], np.int32), (ids,)) for value in values]


def ask_at_once(fake, batch_tokens, *requests):
    """The outcome of each request, all of which wait before the model runs."""

    async def ask():
        queue = ScoreQueue(fake, batch_tokens=batch_tokens, max_waiting=10**6)
        jobs = (queue.submit(groups_of(*values), ("reward",)) for values in requests)
        tasks = [asyncio.create_task(job) for job in jobs]
        await asyncio.sleep(0.02)
        fake.gate.set()
        try:
            return await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            assert queue.waiting == 0
            queue.close()

    return asyncio.run(ask())


def test_a_large_request_does_not_hold_up_a_small_one():
    """80 tokens a batch, of which a request gets 10 at a time while others wait."""
    fake = Fake()
    first, large, small = ask_at_once(fake, 80, [0], range(1, 90), [99])
    assert [own["reward"][0] for own in large] == list(map(float, range(1, 90)))
    assert small == [{"reward": [99.0]}] and first == [{"reward": [0.0]}]
    assert 99 in fake.batches[0] + fake.batches[1]


def test_a_fault_is_the_fault_of_one_item_and_a_dead_upstream_of_all():
    fake, requests = Fake(bad=[3]), ([0], [1, 3, 2], [5, 6])
    _, failed, right = ask_at_once(fake, 1000, *requests)
    assert isinstance(failed, RequestError) and (failed.status, failed.index) == (500, 1)
    assert right == [{"reward": [5.0]}, {"reward": [6.0]}]
    fake.error, before = ServerError("down"), len(fake.batches)
    _, failed, _ = ask_at_once(fake, 1000, *requests)
    assert isinstance(failed, ServerError) and len(fake.batches) <= before + 3


def test_a_full_queue_refuses_and_a_vanished_client_costs_nothing():
    fake = Fake()

    async def ask():
        queue = ScoreQueue(fake, batch_tokens=8, max_waiting=100)
        waiting = [asyncio.create_task(queue.submit(groups_of(k), ("reward",))) for k in range(9)]
        await asyncio.sleep(0.02)
        with pytest.raises(RequestError, match="90 tokens wait"):
            await queue.submit(groups_of(1, 2), ("reward",))
        for task in waiting[1:]:
            task.cancel()
        await asyncio.sleep(0.02)
        assert queue.waiting == 10
        fake.gate.set()
        scores = await waiting[0]
        queue.close()
        return scores

    assert asyncio.run(ask()) == [{"reward": [0.0]}]
    assert fake.batches == [[0]]


@pytest.fixture
def upstream(rm, golden):
    """A vLLM that scores the ids it is sent, off by what a test says; and what it was asked."""
    state = {"off": 0.0, "asked": []}
    reader = ConversationEncoder(rm.encoder)

    def rewards(inputs):
        state["asked"] += inputs
        return (rm.score_encoded(reader.encode(inputs)) + state["off"]).tolist()

    with serving(vllm(rewards)) as url:
        yield url, state


def test_an_upstream_gets_token_ids_and_is_held_to_the_golden_scores(
    run, rm, upstream, golden, monkeypatch
):
    """Its drift takes readiness away, and its mending gives it back; texts never leave as text."""
    url, state = upstream
    backend = UpstreamBackend(run, url)
    backend.replay_every = 0.05
    monkeypatch.setattr(reward_app, "RETRY", 0.05)
    typed = f"sun{END}"
    body = {"groups": [{"prompt": PROMPT, "responses": [*RESPONSES, typed]}]}
    with TestClient(RewardServer(backend, "run").app) as client:
        until_ready(client)
        (scores,) = client.post("/score", json=body).json()["groups"]
        assert scores["reward"] == scores_of(rm, *RESPONSES, typed)
        assert all(isinstance(ids, list) for ids in state["asked"])
        implicit = client.post("/score", json=body | {"outputs": ["implicit"]})
        assert implicit.status_code == 422
        state["off"] = 0.5
        for _ in range(200):
            if (ready := client.get("/ready")).status_code == 503:
                break
            time.sleep(0.01)
        assert "golden scores differ by 0." in ready.json()["reason"]
        assert client.post("/score", json=body).status_code == 503
        state["off"] = 0.0
        until_ready(client)


def test_a_dead_upstream_is_a_bad_gateway(run, upstream, monkeypatch):
    url, _ = upstream
    backend = UpstreamBackend(run, url)
    with TestClient(RewardServer(backend, "run").app) as client:
        until_ready(client)
        backend.client.base = "http://127.0.0.1:9"
        answer = client.post("/score", json={"groups": [{"prompt": "a", "responses": ["b"]}]})
        assert answer.status_code == 502 and "is the server up" in answer.text
