"""Feed mutated files to every reader: a result or one of hafrm's errors, within 2 s and 1 GiB.

    python tools/fuzz.py [--inputs 100000] [--seed 0] [--only recipe]

Files are changed at random (bytes, cuts, repeats, hostile pieces; in JSON also whole values) and read as
a user would: preference rows, recipes, run folders, and reward directories, which are loaded and scored.
Any outcome but a result or a HafrmError is a fault; tracebacks are printed.
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
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not in a test's process
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("src", "tests")]


import pyarrow as pa
import pyarrow.parquet as pq

from hafrm import RewardModel, read_preferences
from hafrm.atomic import write_manifest
from hafrm.data.encoding import Encoder
from hafrm.errors import HafrmError
from hafrm.recipe_file import load_recipe
from hafrm.report.run_files import read_material
from hafrm.run_folder import RunFolder
from hafrm.scoring.loading import load_any_tokenizer
from support.tiny_rlhf import write_reward

SECONDS, MEMORY = 2.0, 2**30
TEMPLATE_PIECES = rb"""{{ ; %} ; {{ x.y.z }} ; {{ 1 // 0 }} ; {% include 'x' %}
 ; {% for i in range(10**9) %}x{% endfor %} ; {% macro m() %}{{ m() }}{% endmacro %}{{ m() }}
 ; {% for i in range(99999) %}{% for j in range(99999) %}{{ loop.index }}{% endfor %}{% endfor %}
 ; {% for a in messages * 99999 %}{% for b in messages * 99999 %}{% endfor %}{% endfor %}
 ; {{ raise_exception('no') }} ; {{ strftime_now('%Y') }} ; {{ messages[9].content }}
 ; {% set messages = [] %} ; {{ messages | tojson }}
 ; {{ 'a' * 10**10 }} ; {{ '%2000000000d' % 1 }} ; {{ '' ~ 10**99999 }}""".split(b" ; ")
PIECES = b"\0|\n|\r|\xff\xfe|\xed\xa0\x80|\xe2\x80\xa8|NaN|1e999|-Infinity|-1|1.5".split(b"|")
PIECES += (
    b"""null|../|&a [*a]|!!python/object:os.system x|<<: *x|"|,|'|"\\ud800"|/dev/zero""".split(b"|")
)
PIECES += [b"9" * 5000, b"x" * 100_000, b"[" * 300, b'{"a":' * 300, b"(" * 300, *TEMPLATE_PIECES]
VALUES = r"""null|true|-1|0|1.5|1000000000|1e30|1e999|NaN|""|"x"|"\ud800"|"../x"|[]|{}|[null]|[[[]]]
["a", 1]|{"role": "user"}|{"a": {"b": [1]}}|"{{ 1 // 0 }}"|[{"role": "user", "content": 1}]"""
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
data: {train: [a.jsonl, "b.jsonl#limit=3"], validation_fraction: 0.1, weights: [1, 2]}
method: {name: haf, alpha: 0.2}
lora: {rank: 4, targets: [q_proj]}
"""
DIGESTS = {"data": {"a.jsonl": "sha256:0"}, "inputs": {"model.path base/config.json": "sha256:1"}}
Read = Callable[[], object]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A few random changes of bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in "ab")
        copy, piece = data[at : min(end, at + 400)] * rng.choice((1, 3)), rng.choice(PIECES)
        changes = [(at + 1, rng.randbytes(1)), (min(end, at + 40), b""), (len(data), b"")]
        upto, new = rng.choice([*changes, (at, copy), (at, piece), (at, piece)])
        data[at:upto] = new
    return bytes(data)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The same JSON with one value, somewhere in it, replaced or left out."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return json.loads(rng.choice(re.split(r"[|\n]", VALUES)))
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy: Any = value.copy()
    copy[key] = mutate_json(value[key], rng)
    if rng.random() < 0.1:
        del copy[key]
    return copy


def mutate_file(file: Path, rng: random.Random) -> None:
    """Change a file: half of the time as JSON or a template where it is one, else its bytes."""
    content = file.read_bytes()
    if file.suffix == ".jinja" and rng.random() < 0.5:
        at = rng.choice([match.end() for match in re.finditer(rb"%}|}}|^", content)])
        content = content[:at] + rng.choice(TEMPLATE_PIECES) + content[at:]
    elif file.suffix == ".json" and rng.random() < 0.5:
        content = json.dumps(mutate_json(json.loads(content), rng)).encode()
    elif file.suffix == ".safetensors":  # its header: eight bytes of length, then JSON
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.dumps(mutate_json(json.loads(content[8:end]), rng)).encode()
        header = header if rng.random() < 0.5 else mutate(content[8:end], rng)
        content = len(header).to_bytes(8, "little") + header + content[end:]
    else:
        content = mutate(content, rng)
    file.write_bytes(content)


def rows(kind: str, folder: Path, rng: random.Random) -> Read:
    """A mutated data file of preference rows."""
    path, row = folder / f"rows.{kind}", rng.choice(ROWS)
    table = [json.loads(row.replace("p0", f"p{i}")) for i in range(rng.choice((1, 3, 6)))]
    if kind == "parquet":
        columns = {key: [str(row.get(key, "")) for row in table] for key in table[0]}
        when = [rng.choice((0, 2**62))] * len(table)  # a date that Python has not
        pq.write_table(pa.table({**columns, "when": pa.array(when, pa.timestamp("us"))}), path)
        content = path.read_bytes()
    elif kind == "csv":
        lines = [f'p{i},"a\n{i}",b,{rng.choice(("a", "tie", ""))},1' for i in range(len(table))]
        content = "\n".join(["prompt,chosen,rejected,label,weight", *lines]).encode()
    else:
        table = [mutate_json(r, rng) if rng.random() < 0.3 else r for r in table]
        content = ("\n".join(map(json.dumps, table)) if "l" in kind else json.dumps(table)).encode()
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
    mutate_file(rng.choice(sorted(p for p in run.rglob("*.*") if p.suffix)), rng)

    def read() -> None:
        opened = RunFolder.open(run)
        load_recipe(opened.recipe_path)
        with opened.lock():
            opened.latest_checkpoint()
            opened.record_provenance(seed=0, **DIGESTS)
        read_material([run])

    return read


def reward(names: tuple[str, ...], folder: Path, rng: random.Random) -> Read:
    """A reward directory with one mutated file, used as a base's tokenizer, then loaded and scored."""
    path = shutil.copytree("reward", folder / "model")
    mutate_file(path / rng.choice(names), rng)

    def read() -> None:
        Encoder(load_any_tokenizer(path))
        RewardModel.from_pretrained(path).score("Say sun.", ["sun", "moon"])

    return read


TARGETS: dict[str, tuple[Callable[..., Read], int]] = {  # name: (its writer, percent of all inputs)
    **{f"rows, {kind}": (partial(rows, kind), 20) for kind in ("json", "jsonl")},
    **{f"rows, {kind}": (partial(rows, kind), 13) for kind in ("jsonl.gz", "csv", "parquet")},
    "recipe": (recipe, 11),
    "run folder": (run_folder, 2),
    "chat template": (partial(reward, ("chat_template.jinja",)), 2),
    "weights": (partial(reward, ("model.safetensors",)), 2),
    "config": (partial(reward, ("config.json",)), 2),
    "tokenizer": (partial(reward, ("tokenizer.json", "tokenizer_config.json")), 2),
}


def fuzz(target: str, num: int, seed: int) -> Counter[str]:
    """How many of a target's inputs end in a "result", an "error" or which traceback; in this folder."""
    counts, before = Counter[str](), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    # a KeyboardInterrupt after so much of the CPU's time: no reader catches that
    signal.signal(signal.SIGPROF, signal.default_int_handler)
    for number in range(num):
        shutil.rmtree("input", ignore_errors=True)
        Path("input").mkdir()
        read = TARGETS[target][0](Path("input"), random.Random(f"{seed} {target} {number}"))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read()
            counts["result"] += 1
        except HafrmError:
            counts["error"] += 1
        except BaseException:  # noqa: BLE001 - a panic in Rust is no Exception
            counts[traceback.format_exc(limit=-4)[-3000:]] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_AS, before)
    return counts


def prepare() -> None:
    """Write what is mutated into the current folder."""
    write_reward(Path())
    RewardModel.from_pretrained("reward").score("Say sun.", ["sun"])  # imports the rest
    Path("recipe.yaml").write_text(RECIPE)
    Path("recipe.json").write_text(load_recipe("recipe.yaml").model_dump_json())
    run = RunFolder.create("run", RECIPE)
    run.record_provenance(seed=0, **DIGESTS)
    run.append_metrics({"step": 2, "kind": "train", "loss": 0.5})
    run.append_sample({"step": 2, "prompt": "p", "response": "r", "reward": 0.5, "kl": 0.1})
    run.checkpoint_path(2).mkdir(parents=True)
    (run.checkpoint_path(2) / "state.json").write_text('{"step": 2}')
    write_manifest(run.checkpoint_path(2))


def main() -> None:
    """Print a table and the faults; exits with 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    args = parser.parse_args()
    logging.disable()
    num_faults = 0
    with tempfile.TemporaryDirectory(prefix="hafrm-fuzz-") as folder:
        os.chdir(folder)
        prepare()
        print("| files | inputs | result | clear error | faults |\n|---|---|---|---|---|")
        for target in [args.only] if args.only else TARGETS:
            num = args.inputs * TARGETS[target][1] // 100
            counts = fuzz(target, num, args.seed)
            results, errors = counts.pop("result", 0), counts.pop("error", 0)
            row = f"| {target} | {num} | {results} | {errors} | {counts.total()} |"
            print(row, *counts, sep="\n", flush=True)
            num_faults += counts.total()
    sys.exit(bool(num_faults))


if __name__ == "__main__":
    main()
