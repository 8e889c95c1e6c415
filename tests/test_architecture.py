"""The layout of the code: sizes, directions of imports, docstrings, and the public names."""

import ast
from collections import Counter
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "hafrm"
MODULES = sorted(SRC.rglob("*.py"))
NAMES = {p: ".".join(p.relative_to(SRC.parent).with_suffix("").parts) for p in MODULES}
TREES = {p: ast.parse(p.read_text(encoding="utf-8")) for p in MODULES}

CORE = {
    *("errors", "atomic", "statistics", "results", "preferences", "recipe", "recipe_file"),
    *("run_folder", "process_pool", "progress", "tensor_files"),
}
"""The modules directly under hafrm: what a run is, on disk and in YAML, and nouns that all rooms use."""
FLOORS = (
    CORE,
    {"data", "engine"},
    {"scoring"},
    {"export", "bulk"},
    {"serving"},
    {"training"},
    {"evaluation"},
    {"benchmarks", "diagnostics"},
    {"study", "best_of_n"},
    {"rlhf"},
    {"report"},
    {"demo"},
    {"cli", "api", "__main__", "__init__"},
)
"""From the ground up: a room imports from its own floor or from floors below."""
APART = {("data", "engine"), ("engine", "data")}
"""Two rooms of one floor that do not know each other."""


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imports_of(tree: ast.Module) -> set[str]:
    """hafrm modules that a module imports when it is loaded or typed, not inside functions."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in set(NAMES.values())}


def test_a_module_is_at_most_400_lines_and_says_what_it_is_for():
    long = [n for p, n in NAMES.items() if len(p.read_text("utf-8").splitlines()) > 400]
    silent = [NAMES[p] for p, tree in TREES.items() if not ast.get_docstring(tree)]
    assert long == [] and silent == []


def test_a_function_is_at_most_60_lines():
    long = [
        f"{NAMES[path]}.{node.name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.body[0].lineno + 1 > 60
    ]
    assert long == []


def test_a_room_imports_only_from_its_floor_and_below():
    offenders = []
    for path, tree in TREES.items():
        room = room_of(NAMES[path])
        for imported in imports_of(tree):
            other = room_of(imported)
            if "__init__" in (other, room):
                continue
            if floor_of(other) > floor_of(room) or (room, other) in APART:
                offenders.append(f"{NAMES[path]} imports {imported}")
    assert offenders == []


def test_no_two_modules_import_each_other_by_any_way_round():
    edges = {NAMES[p]: imports_of(t) - {NAMES[p], "hafrm"} for p, t in TREES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_what_is_public_has_a_docstring():
    silent = [
        f"{NAMES[path]}.{node.name}"
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def repeated(names: Counter[str]) -> list[str]:
    return sorted(name for name, times in names.items() if times > 1)


def test_no_public_class_function_or_module_has_the_name_of_another():
    public = Counter[str]()
    for tree in TREES.values():
        names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        public.update(name for name in names if not name.startswith("_"))
    assert repeated(public) == []
    assert repeated(Counter(f.stem for f in MODULES if not f.stem.startswith("_"))) == []


def test_no_future_annotations_and_no_paths_of_a_machine():
    texts = {NAMES[path]: path.read_text(encoding="utf-8") for path in MODULES}
    # future annotations disable the shape checks
    banned = ("from __future__ import annotations", "/home/")
    assert [name for name, text in texts.items() if any(word in text for word in banned)] == []


def test_the_surface_and_the_ground_floor_load_no_torch():
    """By the imports at the top of each module that they load; functions may import what they need."""
    heavy = {"torch", "transformers", "datasets", "pandas"}
    files = {name.removesuffix(".__init__"): path for path, name in NAMES.items()}
    todo = ["hafrm.cli", "hafrm.recipe_file", "hafrm.run_folder", "hafrm.data.reader", "hafrm.api"]
    todo += ["hafrm.report.page", "hafrm.report.result_sections"]
    loaded: set[str] = set()
    while todo:
        name = todo.pop()
        if name in loaded or name.partition(".")[0] != "hafrm":
            assert name.partition(".")[0] not in heavy
            continue
        loaded.add(name)
        todo.append(name.rpartition(".")[0] or name)
        for node in TREES[files[name]].body if name in files else ():
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert "hafrm.statistics" in loaded and "hafrm.engine.layout" not in loaded


def test_the_public_names_are_these():
    import hafrm

    errors = ("Checkpoint", "Config", "Data", "Hafrm", "MemoryBudget", "Model", "Numerics")
    names = ["PolicyModel", "Recipe", "RewardModel", "evaluate", "load_recipe", "read_preferences"]
    assert sorted(hafrm.__all__) == sorted(
        [*(f"{e}Error" for e in (*errors, "Server", "Verification")), *names, "train"]
    )
    # verbs of the command line may have the name of what they call
    modules = {n.rsplit(".", 1)[-1] for n in NAMES.values() if not n.startswith("hafrm.cli")}
    for name in hafrm.__all__:
        assert getattr(hafrm, name).__doc__
        assert name not in modules
    with pytest.raises(AttributeError, match="no attribute 'Reward'"):
        _ = hafrm.Reward
