"""The house keeps its budgets, its floors and its manners; this test is where they are enforced."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "hafrm"
MODULES = sorted(SRC.rglob("*.py"))
NAMES = {p: ".".join(p.relative_to(SRC.parent).with_suffix("").parts) for p in MODULES}
TREES = {p: ast.parse(p.read_text(encoding="utf-8")) for p in MODULES}

FLOORS = (
    {
        "errors",
        "intervals",
        "recipe",
        "config",
        "drafts",
        "atomic",
        "cache",
        "provenance",
        "runs",
    },
    {"data", "engine", "crew"},
    {"scoring"},
    {"training"},
    {"evaluation"},
    {"alignment"},
    {"reporting"},
    {"demo", "tables", "terminal"},
    {"cli", "__main__", "__init__"},
)
"""From the ground up: a room imports from its own floor or from floors below."""
APART = {("data", "engine"), ("engine", "data")}
"""Two rooms of one floor that do not know each other."""

every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: NAMES[p])


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
    found = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in set(NAMES.values())}


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@every_module
def test_a_module_is_at_most_300_lines_and_says_what_it_is_for(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    assert ast.get_docstring(TREES[path])


@every_module
def test_a_function_is_at_most_60_lines_with_6_parameters(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for function in functions_of(TREES[path]):
        assert function.end_lineno - function.lineno + 1 <= 60, function.name
        arguments = function.args
        count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
        count -= bool(arguments.args and arguments.args[0].arg in ("self", "cls", "ctx"))
        header = " ".join(lines[function.lineno - 2 : function.body[0].lineno])
        assert count <= 6 or "PLR0913" in header or "forward" in function.name, function.name


@every_module
def test_a_room_imports_only_from_its_floor_and_below(path):
    room = room_of(NAMES[path])
    for imported in imports_of(TREES[path]):
        other = room_of(imported)
        if other == "__init__" or (room == "__init__"):
            continue
        assert floor_of(other) <= floor_of(room), f"{NAMES[path]} imports {imported}"
        assert (room, other) not in APART, f"{NAMES[path]} imports {imported}"


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


@every_module
def test_what_is_public_has_a_docstring(path):
    public = (ast.FunctionDef, ast.ClassDef)
    for node in TREES[path].body:
        if isinstance(node, public) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@every_module
def test_no_future_annotations_and_no_paths_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert "from __future__ import annotations" not in text  # it disables the shape checks
    assert "/home/" not in text


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_surface_and_the_ground_floor_load_no_torch():
    heavy = "{'torch', 'transformers', 'datasets', 'scipy', 'pandas'} & set(sys.modules)"
    light = ["hafrm", "hafrm.cli", "hafrm.config", "hafrm.runs", "hafrm.data.readers"]
    light += ["hafrm.reporting.page", "hafrm.reporting.sections.summary"]
    for name in light:
        assert run(f"import sys, {name}; print({heavy} or '')") == "", name


def test_the_public_names_are_these():
    import hafrm

    assert sorted(hafrm.__all__) == [
        "CheckpointError",
        "Comparison",
        "ConfigError",
        "DataError",
        "Encoder",
        "FusedRewardModel",
        "Group",
        "HafrmError",
        "HybridModel",
        "ImplicitRewardModel",
        "Message",
        "ModelError",
        "NumericsError",
        "Recipe",
        "RewardModel",
        "load_recipe",
    ]
    modules = {name.rsplit(".", 1)[-1] for name in NAMES.values()}
    for name in hafrm.__all__:
        assert getattr(hafrm, name).__doc__
        assert name not in modules
    with pytest.raises(AttributeError, match="no attribute 'Reward'"):
        _ = hafrm.Reward
