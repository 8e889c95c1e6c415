"""Serve one model in several ways, and ask over HTTP: speed, equality, faults, and a soak.

    python benchmarks/serving.py speed  --data ... --tokenizer ... --openrlhf CHECKOUT
    python benchmarks/serving.py equal  --data preferences.jsonl --tokenizer tokenizer.json --shape tiny
    python benchmarks/serving.py faults --data preferences.jsonl --tokenizer tokenizer.json --shape tiny
    python benchmarks/serving.py soak   --data ... --tokenizer ... --shape tiny --minutes 20

`speed`: one item a request, 16 in a list as OpenRLHF sends them, 8 candidates of a prompt, by the same
clients: hafrm's server by OpenRLHF's protocol and by its own, OpenRLHF's own server (its serve_rm.py from
a checkout, whose handler runs the model on a padded batch in the event loop; in float32, and with packages
that only training needs replaced by nothing), and plain transformers in a loop without a server. The
servers are processes of their own and take turns; the best of `--repeats` counts.
`equal`: every client asks for all items in an order of its own, by protocols drawn at random, and all
answers are compared with what `hafrm score` writes. `faults`: what a server must stand, with each outcome.
"""

import argparse
import asyncio
import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx2
import numpy as np
import psutil
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from workload import SHAPES, build_model, config_of, load_tokenizer

from hafrm.bulk.bulk_job import score_files
from hafrm.data.encoding import Encoder
from hafrm.data.reader import read_preferences
from hafrm.engine.model import new_reward_head
from hafrm.preferences import Group

LENGTH = 2048
PLAIN, THEIRS = "plain transformers, no server", "OpenRLHF's"
Talk = tuple[list[dict[str, str]], list[str], list[str]]
"""A prompt's messages, its responses, and each conversation rendered."""


def build(folder: Path, args: argparse.Namespace) -> Encoder:
    """A stock reward model of random weights, as a directory."""
    encoder = Encoder(load_tokenizer(args.tokenizer), max_length=LENGTH)
    encoder.export_tokenizer(folder)
    config = config_of(args.shape, encoder)
    config.num_labels, config.problem_type = 1, "regression"
    model = build_model(
        AutoModelForSequenceClassification, config, torch.float32, torch.device("cpu")
    )
    fresh = new_reward_head(config.hidden_size, torch.Generator().manual_seed(0))
    model.score.weight.data.copy_(fresh.weight)
    model.save_pretrained(folder)
    return encoder


def talks_of(data: str, encoder: Encoder, num: int, candidates: int) -> list[Talk]:
    """Prompts with `candidates` responses each: its own two and others of the file.

    Without those of which a response merges with the template where the whole text is tokenised: rendered
    text and messages are two inputs there, with two scores.
    """
    draw = random.Random(0)
    groups = [g for g in read_preferences([data]).groups if len(g.responses) == 2]
    draw.shuffle(groups)
    pool = sorted({text for group in groups for text in group.responses})
    talks: list[Talk] = []
    for group in groups:
        texts = list(dict.fromkeys([*group.responses, *draw.sample(pool, candidates)]))[:candidates]
        prompt = [m._asdict() for m in group.prompt]
        rendered = [
            str(
                encoder.tokenizer.apply_chat_template(
                    [*prompt, {"role": "assistant", "content": text}], tokenize=False
                )
            )
            for text in texts
        ]
        encoded, _ = encoder.encode([Group(group.id, group.prompt, tuple(texts))])
        apart = [[*g.prompt_ids, *ids] for g in encoded for ids in g.response_ids]
        whole = encoder.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if max(map(len, rendered)) < 3 * LENGTH and apart == whole:
            talks.append((prompt, texts, rendered))
        if len(talks) == num:
            break
    return talks


class PaddedBatches:
    """What a loop of plain transformers does: tokenize, pad, one forward."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.inference_mode()
    def score(self, queries: Sequence[str]) -> list[float]:
        options = {"padding": True, "add_special_tokens": False, "return_tensors": "pt"}
        batch = self.tokenizer(list(queries), **options)
        keys = {name: batch[name] for name in ("input_ids", "attention_mask")}
        keys["position_ids"] = (keys["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return [float(reward) for reward in self.model(**keys, use_cache=False).logits[:, 0]]


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that OpenRLHF imports and its server does not use."""

    names = "deepspeed", "flash_attn", "pylatexenc", "ray"

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        is_absent = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module: Any) -> None:
        """There is nothing to run."""


def serve_openrlhf(checkout: Path, folder: Path, port: int) -> None:
    """OpenRLHF's server in this process; it offers half precision alone, which a CPU is slow in."""
    sys.path.insert(0, str(checkout))
    sys.meta_path.insert(0, _Absent())
    utils = importlib.import_module("openrlhf.utils.utils")
    utils.convert_to_torch_dtype = lambda _: torch.float32  # type: ignore[attr-defined]
    sys.argv = ["serve_rm", "--reward.model_name_or_path", str(folder), "--host", "127.0.0.1"]
    sys.argv += ["--port", str(port), "--ds.attn_implementation", "sdpa"]
    runpy.run_module("openrlhf.cli.serve_rm", run_name="__main__")


@contextlib.contextmanager
def running(command: Sequence[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server of its own process, once it is ready; ended by SIGTERM."""
    process = subprocess.Popen([sys.executable, *command, "--port", str(port)])
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx2.HTTPError):
                # OpenRLHF's has no such route
                if httpx2.get(f"http://127.0.0.1:{port}/ready").status_code in (200, 404):
                    break
            time.sleep(0.1)
            assert process.poll() is None
        yield process
    finally:
        process.terminate()
        process.wait(60)


def hafrm_serve(folder: Path, port: int) -> Any:
    return running(["-m", "hafrm", "serve", str(folder)], port)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


Ask = Callable[[httpx2.AsyncClient], Awaitable[list[float]]]


async def ask_all(url: str, asks: Sequence[Ask], clients: int) -> tuple[list[list[float]], Any]:
    """All answers, and the seconds that each took."""
    todo = iter(list(enumerate(asks)))
    answers: list[list[float]] = [[]] * len(asks)
    seconds = np.zeros(len(asks))

    async def work() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
            for k, ask in todo:
                start = time.perf_counter()
                answers[k] = await ask(client)
                seconds[k] = time.perf_counter() - start

    await asyncio.gather(*(work() for _ in range(clients)))
    return answers, seconds


def post(path: str, body: dict[str, Any], read: Callable[[Any], list[float]]) -> Ask:
    async def ask(client: httpx2.AsyncClient) -> list[float]:
        answer = await client.post(path, json=body)
        return read(answer.raise_for_status().json())

    return ask


def by_openrlhf(texts: Sequence[str]) -> Ask:
    return post("/get_reward", {"query": texts}, lambda answer: answer["rewards"])


def by_groups(talks: Sequence[Talk]) -> Ask:
    groups = [{"prompt": prompt, "responses": responses} for prompt, responses, _ in talks]
    rewards = lambda answer: [r for group in answer["groups"] for r in group["reward"]]  # noqa: E731
    return post("/score", {"groups": groups}, rewards)


def by_vllm(texts: Sequence[str]) -> Ask:
    body = {"input": texts, "use_activation": False}
    return post("/classify", body, lambda answer: [row["probs"][0] for row in answer["data"]])


def by_sglang(texts: Sequence[str]) -> Ask:
    return post("/classify", {"text": texts}, lambda rows: [row["embedding"][0] for row in rows])


def speed(folder: Path, talks: list[Talk], args: argparse.Namespace) -> None:
    """A table: items per second and latencies, with as many threads on each side as there are cores."""
    cores = os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(cores)  # of the servers
    torch.set_num_threads(cores)
    singles = [(prompt, responses[:1], texts[:1]) for prompt, responses, texts in talks]
    num = max(4, len(talks) // args.candidates)
    work: dict[str, list[list[Talk]]] = {  # the talks of each request
        "1 item a request": [[talk] for talk in singles],
        "16 items a request": [singles[i : i + 16] for i in range(0, len(singles), 16)],
        f"{args.candidates} candidates of a prompt": [[talk] for talk in talks[:num]],
    }
    rows: dict[tuple[str, str], tuple[float, Any]] = {}
    scores: dict[tuple[str, str], Any] = {}

    def note(task: str, name: str, answers: list[list[float]], seconds: Any, total: float) -> None:
        scores[task, name] = np.concatenate([np.array(own) for own in answers])
        rate = len(scores[task, name]) / total
        rows[task, name] = max(
            rows.get((task, name), (0.0, None)), (rate, seconds), key=lambda r: r[0]
        )

    ours, theirs = free_port(), free_port()
    plain = PaddedBatches(folder)
    command = [__file__, "openrlhf", "--folder", str(folder), "--openrlhf", str(args.openrlhf)]
    with hafrm_serve(folder, ours), running(command, theirs):
        for _, (task, requests) in product(range(args.repeats), work.items()):
            texts = [[text for _, _, own in talks for text in own] for talks in requests]
            asks = [by_openrlhf(own) for own in texts]
            answers, times = [], [time.perf_counter()]
            for own in texts:
                answers.append(plain.score(own))
                times.append(time.perf_counter())
            note(task, PLAIN, answers, np.diff(times), times[-1] - times[0])
            for name, port, own_asks in (
                (THEIRS, theirs, asks),
                ("hafrm, /get_reward", ours, asks),
                ("hafrm, /score", ours, [by_groups(talks) for talks in requests]),
            ):
                start = time.perf_counter()
                run = ask_all(f"http://127.0.0.1:{port}", own_asks, args.clients)
                note(task, name, *asyncio.run(run), time.perf_counter() - start)
    print(f"\n{args.shape}, {args.clients} clients, {cores} threads on each side")
    print("| work | server | items/s | of OpenRLHF's | p50 ms | p99 ms | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for (task, name), (rate, seconds) in rows.items():
        p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
        base, gap = rows[task, THEIRS][0], np.abs(scores[task, name] - scores[task, PLAIN]).max()
        cells = task, name, f"{rate:.1f}", f"{rate / base:.2f}", f"{p50:.0f}", f"{p99:.0f}"
        print("|", " | ".join(cells), f"| {gap:.1e} |")


def equal(folder: Path, talks: list[Talk], args: argparse.Namespace) -> None:
    """How far answers under load are from what `hafrm score` writes."""
    items = [(p, r, t) for p, rs, ts in talks for r, t in zip(rs, ts, strict=True)][: args.items]
    source = folder.parent / "items.jsonl"
    source.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r, _ in items))
    score_files(folder, [str(source)], folder.parent / "scored")
    lines = (folder.parent / "scored" / "items.jsonl").read_text().splitlines()
    expected = np.array([json.loads(line)["reward"] for line in lines])
    asks, places = [], []
    for client in range(args.clients):
        draw = random.Random(client)
        order = draw.sample(range(len(items)), int(len(items) * args.fraction))
        while order:
            own, order = order[: (size := draw.choice([1, 1, 4, 16]))], order[size:]
            texts = [items[k][2] for k in own]
            kind = draw.choice([by_openrlhf, by_vllm, by_sglang, None])
            asks.append(
                by_groups([(items[k][0], [items[k][1]], []) for k in own])
                if kind is None
                else kind(texts)
            )
            places.append(own)
    mixed = list(zip(asks, places, strict=True))
    random.Random(0).shuffle(mixed)
    port = free_port()
    with hafrm_serve(folder, port):
        start = time.perf_counter()
        run = ask_all(f"http://127.0.0.1:{port}", [ask for ask, _ in mixed], args.clients)
        answers, seconds = asyncio.run(run)
        took = time.perf_counter() - start
    got = np.concatenate([np.array(a) for a in answers])
    wanted = expected[np.concatenate([np.array(own) for _, own in mixed])]
    print(f"{len(got)} answers in {len(mixed)} requests of {args.clients} clients, {took:.0f} s")
    print(f"largest difference to hafrm score: {np.abs(got - wanted).max():.1e}")
    print(f"equal to the bit: {(got.astype(np.float32) == wanted.astype(np.float32)).mean():.1%}")
    print("p50 and p99: {:.0f} and {:.0f} ms".format(*np.quantile(seconds, [0.5, 0.99]) * 1000))


def fuzz(http: httpx2.Client, talks: list[Talk], num: int) -> dict[int, int]:
    """How many malformed bodies got which status."""
    draw, right, statuses = random.Random(0), {"query": talks[0][2]}, dict[int, int]()
    names = ["query", "input", "text", "groups", "prompt", "response", "messages", "x"]
    values = [None, 1, -1.5, "", [], {}, ["x"], [[]], right["query"], talks[0][0]]
    for _ in range(num):
        wrong = {name: draw.choice(values) for name in draw.sample(names, draw.randrange(4))}
        body = bytearray(json.dumps(right | wrong if draw.random() < 0.5 else wrong).encode())
        for _ in range(draw.randrange(3)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        cut = len(body) if draw.random() < 0.5 else draw.randrange(1, len(body))
        path = draw.choice(["/get_reward", "/score", "/classify", "/reward", "/v1/score"])
        status = http.post(path, content=bytes(body[:cut])).status_code
        statuses[status] = statuses.get(status, 0) + 1
    return statuses


def drip(port: int, beside: Callable[[], None]) -> str:
    """When the server closed 200 connections, half of which drip headers, half a body, a byte a second."""
    starts = (b"X-Slow: ", b"Content-Length: 999\r\n\r\n{")
    loris = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
    for k, own in enumerate(loris):
        own.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\n" + starts[k % 2])
    beside()
    start, closed = time.perf_counter(), list[float]()
    while loris and time.perf_counter() - start < 90:
        time.sleep(1)
        for own in list(loris):
            own.setblocking(False)
            try:
                own.send(b"y")
                gone = own.recv(4096) is not None  # the end, or an answer: 408
            except BlockingIOError:
                gone = False  # still open
            except OSError:
                gone = True
            if gone:
                closed.append(time.perf_counter() - start)
                own.close()
                loris.remove(own)
    last = f"the last after {max(closed):.1f} s" if closed else ""
    return f"{len(closed)} of 200 closed or answered 408, {last}"


def kill_clients(url: str, texts: list[str]) -> None:
    """Four clients that ask for everything, killed while the server scores."""
    script = (
        "import sys, httpx2, json; body = json.load(sys.stdin)\n"
        "while True: httpx2.post(sys.argv[1] + '/get_reward', json=body, timeout=600)"
    )
    vandals = []
    for _ in range(4):
        vandal = subprocess.Popen([sys.executable, "-c", script, url], stdin=subprocess.PIPE)
        assert vandal.stdin is not None
        vandal.stdin.write(json.dumps({"query": texts}).encode())
        vandal.stdin.close()
        vandals.append(vandal)
    time.sleep(4)
    for vandal in vandals:
        vandal.kill()
        vandal.wait()
    time.sleep(1)


async def signal_under_load(
    url: str, asks: list[Ask], process: subprocess.Popen[bytes], number: int
) -> str:
    """Send a signal while 16 clients ask on; count the answers, and the requests that a client had sent in
    whole 50 ms before it and that got none."""
    answered, refused, lost, sent_at = [], [], [], [float("inf")]

    async def work(own: list[Ask]) -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            for ask in own:
                start = time.perf_counter()
                try:
                    await ask(client)
                    answered.append(time.perf_counter())
                except httpx2.HTTPError:
                    (lost if start < sent_at[0] - 0.05 else refused).append(start)
                    if len(refused) > 64:
                        return

    task = asyncio.gather(*(work(asks[k::16] * 50) for k in range(16)))
    await asyncio.sleep(2)
    sent_at[0] = time.perf_counter()
    process.send_signal(number)
    await asyncio.wait_for(task, 120)
    after = sum(at > sent_at[0] for at in answered)
    code = process.wait(60)
    return (
        f"{len(answered)} answered, {after} of them after the signal; {len(lost)} accepted before it "
        f"without an answer; later ones: connection refused ({len(refused)}); exit code {code}"
    )


def faults(folder: Path, talks: list[Talk], args: argparse.Namespace) -> None:
    """Each fault and its outcome, and whether a right request after it has its right answer."""
    port, texts = free_port(), [text for talk in talks for text in talk[2]]
    url, right = f"http://127.0.0.1:{port}", {"query": talks[0][2]}
    asks = [by_openrlhf(own) for _, _, own in talks]
    with httpx2.Client(base_url=url, timeout=60) as http:

        def answer() -> Any:
            return http.post("/get_reward", json=right).json()["rewards"]

        def tell(what: str, outcome: object) -> None:
            same = np.abs(np.subtract(answer(), expected)).max() < 1e-6
            print(f"| {what} | {outcome} | {'right' if same else 'WRONG'} |", flush=True)

        print("| fault | outcome | a right request after it |\n|---|---|---|")
        with hafrm_serve(folder, port) as process:
            expected = answer()
            tell(f"{args.fuzz} malformed bodies", fuzz(http, talks, args.fuzz))
            big = json.dumps({"query": ["x" * 10_000_000]}).encode()
            start = time.perf_counter()
            status = http.post("/get_reward", content=big).status_code
            tell("a text of 10 MB", f"{status} in {time.perf_counter() - start:.1f} s")
            status = http.post("/get_reward", content=big * 2).status_code
            tell("a body of 20 MB", status)
            outcome = drip(port, lambda: tell("200 slow connections open", "served beside them"))
            tell("they drip on", outcome)
            kill_clients(url, texts)
            lines = http.get("/metrics").text.splitlines()
            waiting = next(line for line in lines if line.startswith("hafrm_waiting_tokens"))
            tell("kill -9 of 4 clients with all items asked", f"{waiting} a second later")
            outcome = asyncio.run(signal_under_load(url, asks, process, signal.SIGKILL))
        with hafrm_serve(folder, port) as process:
            tell("kill -9 of the server under load, and a new start", outcome)
            outcome = asyncio.run(signal_under_load(url, asks, process, signal.SIGTERM))
        print(f"| SIGTERM under load | {outcome} | |")


def soak(folder: Path, talks: list[Talk], args: argparse.Namespace) -> None:
    """Memory of the server, minute by minute, under mixed requests, `--pause` seconds between rounds."""
    port = free_port()
    asks = [by_openrlhf(texts) for _, _, texts in talks]
    asks += [by_groups([talk]) for talk in talks]
    with hafrm_serve(folder, port) as process:
        server, start, num = psutil.Process(process.pid), time.perf_counter(), 0
        for minute in range(1, int(args.minutes) + 1):
            while time.perf_counter() - start < 60 * minute:
                answers, _ = asyncio.run(ask_all(f"http://127.0.0.1:{port}", asks, args.clients))
                num += sum(map(len, answers))
                time.sleep(args.pause)
            memory = server.memory_info().rss / 2**20
            print(f"minute {minute}: {num} items, {memory:.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "equal", "faults", "soak", "openrlhf"])
    parser.add_argument("--data", help="preference pairs, as hafrm reads them")
    parser.add_argument("--tokenizer", type=Path, help="a model directory, or a tokenizer.json")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--items", type=int, default=1000, help="of equal")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="of the items, that a client asks for"
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--fuzz", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between rounds of soak")
    parser.add_argument("--openrlhf", type=Path, help="a checkout, for speed")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.what == "openrlhf":
        serve_openrlhf(args.openrlhf, args.folder, args.port)
        return
    if args.what == "speed" and args.openrlhf is None:
        parser.error("speed needs --openrlhf, a checkout of OpenRLHF")
    runs = {"speed": speed, "equal": equal, "faults": faults, "soak": soak}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        encoder = build(folder, args)
        runs[args.what](folder, talks_of(args.data, encoder, args.prompts, args.candidates), args)


if __name__ == "__main__":
    main()
