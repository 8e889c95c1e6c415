"""Print how large and how plain this checkout is, as a Markdown table; needs hafrm's dependencies.

    python tools/measure.py             # --collect: also count what pytest collects; --list: names

- From data file to saved model: `hafrm train` runs HAF with a tiny model. A module counts if one of
  its functions, or a method that dataclass generates, runs after the data file is first opened and
  before `RUN/model` appears, in any process. In brackets: from the start of the command.
- Short functions: private, undecorated, used once in their module, body without docstring < 6 lines.
- Public names: of classes and functions at the top of a module. Module names: of files.
- Comments: without directives (noqa, type: ignore). Options: positional arguments included.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
DIRECTIVE = re.compile(r"#\s*(noqa|type:|pragma|fmt:|ruff:)")
VAGUE = ("found", "known", "given", "kept", "each")
# A sitecustomize module: Python imports it at the start of every process of the run.
TRACER = """
import atexit, os, sys, threading
src, out, child = os.environ["TRACE_SRC"], os.environ["TRACE_OUT"], "TRACE_CHILD" in os.environ
os.environ["TRACE_CHILD"], seen, early = "1", set(), set()
def profile(frame, event, _):
    code, name = frame.f_code, str(frame.f_globals.get("__name__"))
    if event == "call" and code.co_flags & 1:  # a function, not the body of a module or class
        if code.co_filename.startswith(src):
            seen.add(code.co_filename)
        elif code.co_filename == "<string>" and name.startswith("hafrm."):
            seen.add(sys.modules[name].__file__)
def audit(event, args):
    if event == "open" and str(args[0]).endswith("pairs.jsonl") and not early:
        early.update(seen), seen.clear()
    elif event == "os.rename" and str(args[1]).endswith("run/model"):
        threading.setprofile(None), sys.setprofile(None)
def write():
    for name, files in ("early", early), ("late", seen):
        open(f"{out}/{os.getpid()}.{name}", "w").write("\\n".join(file.removeprefix(src) for file in files))
if not child:
    sys.addaudithook(audit)
threading.setprofile(profile), sys.setprofile(profile), atexit.register(write)
"""
MODEL = """
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained("base")
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained("base")
"""
RECIPE = """
model: {path: base}
data: {train: pairs.jsonl, validation_fraction: 0.3, max_length: 128}
method: {name: haf}
training: {steps: 2, batch_size: 4, max_tokens: 512}
"""
COMMANDS = """
import hafrm.cli, sys, typer
modules = [vars(m) for n, m in sys.modules.items() if n.startswith("hafrm.cli")]
app = next(m["app"] for m in modules if isinstance(m.get("app"), typer.Typer))
print([len(c.params) for c in typer.main.get_command(app).commands.values()])
"""


def run(*words: str, folder: Path = ROOT, **variables: str) -> str:
    """The output of a Python command that sees this checkout."""
    env = {**os.environ, "PYTHONPATH": f"{folder}:{SRC}", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.check_output([sys.executable, *words], cwd=folder, env=env, text=True)


def modules_on_the_way(folder: Path) -> tuple[set[str], set[str]]:
    """Modules that run from the data file to the saved model, and before that."""
    run("-c", MODEL, folder=folder)
    (folder / "sitecustomize.py").write_text(TRACER)
    pairs = [{"prompt": f"{i} + 1?", "chosen": f"{i + 1}.", "rejected": "?"} for i in range(12)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "recipe.yaml").write_text(RECIPE)
    trace = {"TRACE_OUT": str(folder), "TRACE_SRC": f"{SRC}/", "HAFRM_CACHE": f"{folder}/cache"}
    run("-m", "hafrm", "train", "recipe.yaml", "--out", "run", folder=folder, **trace)
    logs = ([log.read_text() for log in folder.glob(p)] for p in ("*.late", "*.early"))
    return tuple(set("\n".join(texts).split()) for texts in logs)


def short_functions(tree: ast.Module, text: list[str]) -> list[str]:
    """Private functions of one module that are used once and have a body under 6 lines."""
    nodes = list(ast.walk(tree))
    uses = Counter(getattr(n, "id", getattr(n, "attr", "")) for n in nodes)
    names = []
    for node in (n for n in nodes if isinstance(n, ast.FunctionDef) and not n.decorator_list):
        start = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0].lineno
        size = sum(bool(line.strip()) for line in text[start - 1 : node.end_lineno])
        if re.match("_[^_]", node.name) and uses[node.name] == 1 and size < 6:
            names.append(node.name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--collect", "--list"):
        parser.add_argument(option, action="store_true")
    args = parser.parse_args()
    files, tests = (sorted((ROOT / folder).rglob("*.py")) for folder in ("src", "tests"))
    lines, test_lines = (sum(len(f.read_text().splitlines()) for f in g) for g in (files, tests))
    modules = Counter(f.stem for f in files if f.stem[0] != "_")
    comments, public, words, short = 0, Counter[str](), Counter[str](), []
    for file in files:
        tree, text = ast.parse(file.read_text()), file.read_text().splitlines()
        names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        public.update(name for name in names if name[0] != "_")
        short += short_functions(tree, text)
        for token in tokenize.generate_tokens(iter(f"{line}\n" for line in text).__next__):
            comments += token.type == tokenize.COMMENT and not DIRECTIVE.match(token.string)
            words[token.string] += token.type == tokenize.NAME
    with tempfile.TemporaryDirectory() as folder:
        way, early = modules_on_the_way(Path(folder))
    options = json.loads(run("-c", COMMANDS))
    listing = run("-m", "pytest", "--collect-only", "-qq") if args.collect else ""
    collected = sum(map(int, re.findall(r": (\d+)$", listing, re.M))) or "-"
    twice = [sorted(n for n, times in c.items() if times > 1) for c in (public, modules)]
    rows = {
        "source, lines / modules": f"{lines:,} / {len(files)}",
        "modules that run from data file to saved model": f"{len(way)} (command: {len(way | early)})",
        "short functions with one caller": len(short),
        "public names, module names that occur twice": f"{len(twice[0])}, {len(twice[1])}",
        "comments that say why, per 100 lines": f"{100 * comments / lines:.2f}",
        "tests, lines / collected": f"{test_lines:,} / {collected}",
        "verbs / options": f"{len(options)} / {sum(options)}",
        f"names {', '.join(VAGUE)}": ", ".join(str(words[v]) for v in VAGUE),
    }
    print("| measure | value |\n|---|---|")
    print(*(f"| {name} | {value} |" for name, value in rows.items()), sep="\n")
    if args.list:
        print(sorted(way), short, *twice, sep="\n\n")


if __name__ == "__main__":
    main()
