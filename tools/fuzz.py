"""Feed mutated files to every reader: a result or one of hafrm's errors, within 2 s and 1 GiB.

    python tools/fuzz.py [--inputs 100000] [--seed 0] [--only json] [--number 17]

Files are changed at random (bytes, cuts, repeats, hostile pieces; in JSON also whole values) and read as
a user would: preference rows, recipes, run folders, chat templates, and reward directories, which are
loaded and scored. Any outcome but a result or a HafrmError is a fault, and so is an error of over 4,000
characters. Prints a table, and the first fault of each kind; --number repeats that input of a target.
"""

import argparse
import gzip
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("src", "tests")]

# ruff: noqa: E402 - an import takes longer than an input may
import pyarrow as pa
import pyarrow.parquet as pq
import transformers

from hafrm import RewardModel, read_preferences
from hafrm.atomic import write_manifest
from hafrm.data.chat_template import PAPER_TEMPLATES, PLAIN_TEMPLATE
from hafrm.data.encoding import Encoder
from hafrm.errors import HafrmError
from hafrm.preferences import Group, Message
from hafrm.recipe_file import load_recipe
from hafrm.report.run_files import read_material
from hafrm.run_folder import RunFolder
from hafrm.scoring.loading import load_any_tokenizer
from support.tiny_rlhf import write_reward

SECONDS, BYTES, LENGTH = 2.0, 2**30, 4000
TEMPLATE_PIECES = rb"""{{
%}
{% for i in range(10**9) %}x{% endfor %}
{% for i in range(99999) %}{% for j in range(99999) %}{{ loop.index }}{% endfor %}{% endfor %}
{% for a in messages * 99999 %}{% for b in messages * 99999 %}{% endfor %}{% endfor %}
{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}
{% include 'x' %}
{% set messages = [] %}
{{ raise_exception('no') }}
{{ strftime_now('%Y') }}
{{ 'a' * 10**10 }}
{{ '%2000000000d' % 1 }}
{{ messages[9].content }}
{{ messages | tojson }}
{{ x.y.z }}
{{ 1 // 0 }}
{{ '' ~ 10**99999 }}""".split(b"\n")
PIECES = [
    b"\0",
    b"\n",
    b"\r",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"9" * 5000,
    b"x" * 100_000,
]
PIECES += [
    b"[" * 300,
    b'{"a":' * 300,
    b"(" * 300,
    b"&a [*a]",
    b"!!python/object:os.system x",
    b"<<: *x",
]
PIECES += [
    b'"',
    b",",
    b"'''",
    b'"\\ud800"',
    b"NaN",
    b"1e999",
    b"-Infinity",
    b"-1",
    b"1.5",
    b"/dev/zero",
]
PIECES += [b"null", b"../", *TEMPLATE_PIECES]
VALUES = json.loads(
    r"""[null, true, -1, 0, 1.5, 1000000000, 1e30, 1e999, NaN, "", "x", "NaN", "\ud800", "../x", [], {},
    [null], [[[]]], ["a", 1], {"role": "user"}, {"a": {"b": [1]}}, "{{ 1 // 0 }}"]"""
)
ROWS = r"""{"prompt": "p0", "chosen": "sun", "rejected": "moon", "margin": 0.5, "weight": 2.0, "id": "a"}
{"prompt": "p0", "chosen": "sun", "rejected": "moon", "label": "tie", "system": "Be brief.", "split": "a"}
{"prompt": [{"role": "user", "content": "p0"}], "chosen": "a", "rejected": "b", "votes": {"chosen": 3}}
{"chosen": [{"role": "user", "content": "p0"}, {"role": "assistant", "content": "a"}], "rejected":
 [{"role": "user", "content": "p0"}, {"role": "assistant", "content": "b"}]}
{"prompt": "p0", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}
{"prompt": "p0", "responses": ["a", "b"], "scores": [1.0, 0.5]}
{"chosen": "\n\nHuman: p0\n\nAssistant: a", "rejected": "\n\nHuman: p0\n\nAssistant: b"}"""
ROWS = re.split(r"\n(?=\{)", ROWS)
RECIPE = """model: {path: base, revision: main}
data: {train: [a.jsonl, "b.jsonl#limit=3"], validation_fraction: 0.1, max_length: 64, weights: [1, 2]}
method: {name: haf, alpha: 0.2}
lora: {rank: 4, targets: [q_proj]}
training: {epochs: 2, batch_size: 4, learning_rate: 1e-4, warmup_fraction: 0.1}
"""
DIGESTS = {"data": {"a.jsonl": "sha256:0"}, "inputs": {"model.path base/config.json": "sha256:1"}}
Read = Callable[[], object]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A few random changes of bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in "ab")
        match rng.randrange(6):
            case 0 if data:
                data[min(at, len(data) - 1)] = rng.randrange(256)
            case 1:
                del data[at : min(end, at + 40)]
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[at : min(end, at + 400)] * rng.choice((1, 3))
            case _:
                data[at:at] = rng.choice(PIECES)
    return bytes(data)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The same JSON with one value, somewhere in it, replaced or left out."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy: Any = value.copy()
    copy[key] = mutate_json(value[key], rng)
    if rng.random() < 0.1:
        del copy[key]
    return copy


def mutate_file(file: Path, rng: random.Random) -> None:
    """Change a file: half of the time as JSON or a template where it is one, else its bytes."""
    content = file.read_bytes()
    # of safetensors the header: eight bytes of length, then JSON
    start, end = 0, len(content)
    if file.suffix == ".safetensors":
        start, end = 8, 8 + int.from_bytes(content[:8], "little")
    head = content[start:end]
    if file.suffix == ".jinja" and rng.random() < 0.5:
        at = rng.choice([match.end() for match in re.finditer(rb"%}|}}|^", head)])
        head = head[:at] + rng.choice(TEMPLATE_PIECES) + head[at:]
    elif file.suffix in (".json", ".safetensors") and rng.random() < 0.5:
        head = json.dumps(mutate_json(json.loads(head), rng)).encode()
    else:
        head = mutate(head, rng)
    length = len(head).to_bytes(8, "little") if start else b""
    file.write_bytes((mutate(length, rng) if rng.random() < 0.1 else length) + head + content[end:])


def rows(kind: str, folder: Path, rng: random.Random) -> Read:
    """A mutated data file of preference rows."""
    path, row = folder / f"rows.{kind}", rng.choice(ROWS)
    table = [json.loads(row.replace("p0", f"p{i}")) for i in range(rng.choice((1, 3, 6)))]
    if kind == "parquet":
        columns = {
            name: [str(r.get(name, "")) for r in table] for name in ("prompt", "chosen", "rejected")
        }
        when = [rng.choice((0, 2**62))] * len(table)  # a date that Python has not
        pq.write_table(pa.table({**columns, "when": pa.array(when, pa.timestamp("us"))}), path)
        content = path.read_bytes()
    elif kind == "csv":
        lines = [f'p{i},"a\n{i}",b,{rng.choice(("a", "tie", ""))},1' for i in range(len(table))]
        content = "\n".join(["prompt,chosen,rejected,label,weight", *lines]).encode()
    else:
        table = [mutate_json(r, rng) if rng.random() < 0.3 else r for r in table]
        text = json.dumps(table) if kind == "json" else "\n".join(map(json.dumps, table))
        content = text.encode()
    if kind.endswith("gz"):
        content = gzip.compress(mutate(content, rng) if rng.random() < 0.5 else content, 1)
    path.write_bytes(mutate(content, rng) if rng.random() < 0.6 else content)
    choice = "" if rng.random() < 0.9 else mutate(b"#split=a&limit=3", rng).decode("latin1")
    return lambda: read_preferences([f"{path}{choice}"], max_bad_fraction=1.0)


def recipe(folder: Path, rng: random.Random) -> Read:
    """A mutated recipe or override."""
    path, changes = folder / rng.choice(("recipe.yaml", "recipe.json")), list[str]()
    shutil.copy(path.name, path)
    if rng.random() < 0.3:
        changes = [mutate(b"training.learning_rate=1e-3", rng).decode("latin1")]
    else:
        mutate_file(path, rng)
    return lambda: load_recipe(path, changes)


def run_folder(folder: Path, rng: random.Random) -> Read:
    """A run folder with one mutated file, opened as a resume would, then reported."""
    run = shutil.copytree("run", folder / "run")
    mutate_file(
        rng.choice(sorted(p for p in run.rglob("*") if p.is_file() and p.name != ".lock")), rng
    )

    def read() -> None:
        opened = RunFolder.open(run)
        load_recipe(opened.recipe_path)
        with opened.lock():
            opened.latest_checkpoint()
            opened.record_provenance(seed=0, **DIGESTS)
        read_material([run])

    return read


def reward(names: tuple[str, ...], folder: Path, rng: random.Random) -> Read:
    """A reward directory with one mutated file, loaded and scored."""
    path = shutil.copytree("reward", folder / "model")
    mutate_file(path / rng.choice(names), rng)
    return lambda: RewardModel.from_pretrained(path).score("Say sun.", ["sun", "moon"])


def template(folder: Path, rng: random.Random) -> Read:
    """A mutated chat template, with which a group is encoded, as in training or as it is."""
    (file := folder / "template.jinja").write_text(
        rng.choice([PLAIN_TEMPLATE, *PAPER_TEMPLATES.values()])
    )
    mutate_file(file, rng)
    tokenizer, close = load_any_tokenizer("reward"), rng.random() < 0.5
    tokenizer.chat_template = file.read_text(errors="replace")
    group = Group("g", (Message("user", "Say sun."),), ("sun", "moon"))
    return lambda: Encoder(tokenizer, close=close).encode([group])


TARGETS: dict[str, tuple[Callable[[Path, random.Random], Read], int]] = {  # name: (writer, percent)
    **{f"rows, {kind}": (partial(rows, kind), 20) for kind in ("json", "jsonl")},
    **{f"rows, {kind}": (partial(rows, kind), 11) for kind in ("jsonl.gz", "csv", "parquet")},
    "recipe": (recipe, 11),
    "run folder": (run_folder, 3),
    "chat template": (template, 4),
    "weights": (partial(reward, ("model.safetensors",)), 3),
    "config": (partial(reward, ("config.json",)), 3),
    "tokenizer": (partial(reward, ("tokenizer.json", "tokenizer_config.json")), 3),
}


class TooLongError(BaseException):
    """The reader did not end in time; no reader catches this."""


def stop(*_: object) -> None:
    """The handler of both timers."""
    raise TooLongError


def outcome(read: Read) -> tuple[str, str]:
    """What became of one input: "result", "error", or a fault and its place."""
    timers = {
        signal.ITIMER_PROF: SECONDS,
        signal.ITIMER_REAL: 10 * SECONDS,
    }  # the CPU's time, and waiting
    try:
        for timer, seconds in timers.items():
            signal.setitimer(timer, seconds)
        read()
    except HafrmError as error:
        return ("error", "") if len(str(error)) <= LENGTH else ("long error", str(error)[:80])
    except BaseException as error:  # what this looks for; a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return type(error).__name__, traceback.format_exc(limit=-4)[-3000:]
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
    return "result", ""


def fuzz(target: str, numbers: range, seed: int) -> tuple[Counter[str], list[str]]:
    """Outcomes of a target's inputs, and the first fault of each kind, in the current folder."""
    counts, examples = Counter[str](), dict[str, str]()
    for number in numbers:
        shutil.rmtree("input", ignore_errors=True)
        Path("input").mkdir()
        read = TARGETS[target][0](Path("input"), random.Random(f"{seed} {target} {number}"))
        name, place = outcome(read)
        counts[name] += 1
        if name not in ("result", "error"):
            at = [line for line in place.split("\n") if line.startswith("  File")][-1:]
            examples.setdefault(f"{name} {at}", f"{target} {number}: {name}\n{place}")
    return counts, list(examples.values())


def prepare() -> None:
    """Write what is mutated into the current folder, and set the handler of the timers."""
    logging.disable()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, stop)
    write_reward(Path())
    RewardModel.from_pretrained("reward").score("Say sun.", ["sun"])  # imports the rest
    Path("recipe.yaml").write_text(RECIPE)
    Path("recipe.json").write_text(load_recipe("recipe.yaml").model_dump_json())
    run = RunFolder.create("run", RECIPE)
    run.record_provenance(seed=0, **DIGESTS)
    for kind in ("train", "validation"):
        run.append_metrics({"step": 2, "kind": kind, "loss": 0.5})
    run.checkpoint_path(2).mkdir(parents=True)
    (run.checkpoint_path(2) / "state.json").write_text('{"step": 2}')
    write_manifest(run.checkpoint_path(2))


def main() -> None:
    """Print a table and the faults; exits with 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    (
        parser.add_argument("--inputs", type=int, default=100_000),
        parser.add_argument("--seed", type=int),
    )
    parser.add_argument("--only", choices=TARGETS), parser.add_argument("--number", type=int)
    args = parser.parse_args()
    os.chdir(folder := tempfile.mkdtemp(prefix="hafrm-fuzz-"))
    prepare()
    num_faults = 0
    print(
        "| files | inputs | result | clear error | faults | inputs/s |\n|---|---|---|---|---|---|"
    )
    for target in [args.only] if args.only else TARGETS:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))
        num = args.inputs * TARGETS[target][1] // 100
        numbers = range(num) if args.number is None else range(args.number, args.number + 1)
        began = time.perf_counter()
        counts, examples = fuzz(target, numbers, args.seed or 0)
        speed = len(numbers) / (time.perf_counter() - began)
        faults = len(numbers) - counts["result"] - counts["error"]
        num_faults += faults
        cells = (target, len(numbers), counts["result"], counts["error"], faults, f"{speed:.0f}")
        print("|", " | ".join(map(str, cells)), "|", *(f"\n{e}\n" for e in examples), flush=True)
    print(f"files of the last input: {folder}")
    sys.exit(bool(num_faults))


if __name__ == "__main__":
    main()
