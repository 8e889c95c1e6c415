"""A name means one thing: no public name and no module name occurs twice."""

import ast
from collections import Counter
from pathlib import Path

FILES = sorted((Path(__file__).resolve().parents[1] / "src/hafrm").rglob("*.py"))


def repeated(names: Counter[str]) -> list[str]:
    return sorted(name for name, times in names.items() if times > 1)


def test_no_public_class_or_function_has_the_name_of_another():
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = Counter[str]()
    for file in FILES:
        nodes = ast.parse(file.read_text(encoding="utf-8")).body
        names = {node.name for node in nodes if isinstance(node, definitions)}
        public.update(name for name in names if not name.startswith("_"))
    assert repeated(public) == []


def test_no_module_has_the_name_of_another():
    assert repeated(Counter(f.stem for f in FILES if not f.stem.startswith("_"))) == []
