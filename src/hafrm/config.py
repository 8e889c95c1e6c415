"""Recipes read, checked, explained and written: strict YAML in, one frozen `Recipe` out.

A recipe is valid, or refused with all its problems in one message, each with its place. Relative
paths stay as written and mean the current directory, as in a shell; `~` is expanded. The schema is
`hafrm.recipe`. Nothing here imports torch or touches the file system, but to read the recipe.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hafrm.errors import ConfigError
from hafrm.recipe import Recipe, Section

__all__ = ["Key", "Recipe", "build_recipe", "describe", "dump_recipe", "load_recipe"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `section.key=value` overrides applied in their order.

    Raises ConfigError with every problem of file and overrides, and where each of them stands.
    """
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the recipe {path}: {reason}") from error
    draft = _Draft()
    try:
        draft.read(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for assignment in overrides:
        draft.override(assignment)
    return _checked(draft, str(path))


def build_recipe(values: Mapping[str, Any], name: str = "the recipe") -> Recipe:
    """The recipe of plain nested values; raises ConfigError as `load_recipe` does."""
    draft = _Draft()
    draft.values = dict(values)
    return _checked(draft, name)


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every key written out; `load_recipe` reads back an equal recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Writer, sort_keys=False, allow_unicode=True)


class Key(NamedTuple):
    """One key of a recipe, in words."""

    name: str
    """Dotted, such as training.batch_size."""
    allowed: str
    default: str
    """As one would write it; "required" when there is none."""
    meaning: str


def describe() -> tuple[Key, ...]:
    """Every key that a recipe may hold, in the order of the schema."""
    return tuple(
        Key(
            f"{section}.{name}",
            _allowed(info),
            "required" if info.is_required() else json.dumps(info.default),
            " ".join((info.description or "").split()),
        )
        for section, kind in _sections().items()
        for name, info in kind.model_fields.items()
    )


def _sections() -> dict[str, type[Section]]:
    kinds = {}
    for name, info in Recipe.model_fields.items():
        options = (info.annotation, *get_args(info.annotation))
        kinds[name] = next(k for k in options if isinstance(k, type) and issubclass(k, Section))
    return kinds


def _allowed(info: FieldInfo) -> str:
    """What a field takes, such as "whole number >= 1 or null"."""
    kind, null, _ = _words(info.annotation).partition(" or null")
    return _bounded(kind, info.metadata) + null


def _bounded(words: str, rules: Iterable[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [(sign, getattr(rule, name, None)) for rule in rules for name, sign in signs.items()]
    bounds = [f"{sign} {bound}" for sign, bound in found if bound is not None]
    return f"{words} {' and '.join(bounds)}" if bounds else words


def _words(kind: Any) -> str:
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if kind in plain:
        return plain[kind]
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(arguments)
    if get_origin(kind) is Annotated:
        return _bounded(_words(arguments[0]), arguments[1:])
    if get_origin(kind) is tuple and arguments[-1] is Ellipsis:
        return f"list of {_words(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"list of {len(arguments)} x {_words(arguments[0])}"
    options = [_words(option) for option in arguments if option is not NoneType]
    return " or ".join(options + ["null"] * (NoneType in arguments))


def _checked(draft: "_Draft", name: str) -> Recipe:
    # a section whose keys are all commented out reads as null
    values = {k: {} if v is None and k != "lora" else v for k, v in draft.values.items()}
    problems, recipe = draft.problems, None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        seen = set()  # one wrong value can fail several checks of its key
        for details in error.errors(include_url=False):
            if len(details["loc"]) < 2 or details["loc"][:2] not in seen:
                problems += _explain(details, draft.where)
            seen.add(details["loc"][:2])
    if recipe is not None and not problems:
        return recipe
    unique = list(dict.fromkeys(problems))
    count = "a problem" if len(unique) == 1 else f"{len(unique)} problems"
    raise ConfigError("\n  - ".join([f"{name} has {count}:", *unique]))


def _explain(error: ErrorDetails, where: Mapping[str, str]) -> Iterator[str]:
    """One of pydantic's findings in plain words, with its place and the way out."""
    location, value = error["loc"], error["input"]
    key = ".".join(str(part) for part in location[:2])
    head = f"{key} ({where[key]})" if key in where else key
    known = next((k for k in describe() if k.name == key), None)
    if error["type"] == "value_error":  # our own rules say it all, a line for each problem
        yield from str(error["ctx"]["error"]).split("\n")
    elif error["type"] == "extra_forbidden":
        yield f"{head}: unknown {'key' if len(location) > 1 else 'section'}{_suggestion(location)}"
    elif known is None:  # a whole section is missing, or is no mapping
        fields = _sections()[key].model_fields if key else Recipe.model_fields
        needed = [name for name, info in fields.items() if info.is_required()] or list(fields)
        got = "missing" if error["type"] == "missing" else f"got {_shown(value)}"
        yield f"{head or 'the recipe'}: {got}; needed: keys and values, with {', '.join(needed)}"
    elif error["type"] == "missing" and len(location) == 2:
        yield f"{head}: missing; needed: {known.allowed}. {known.meaning}"
    else:
        quote = ""
        if error["type"] == "string_type" and isinstance(value, int | float):
            quote = " (as text it needs quotes)"
        yield f"{head}: got {_shown(value)}; allowed: {known.allowed}{quote}. {known.meaning}"


def _shown(value: Any) -> str:
    """A value as one writes it in a recipe, cut to a line."""
    return json.dumps(value, ensure_ascii=False, default=repr)[:80]


def _suggestion(location: tuple[int | str, ...]) -> str:
    """The known keys most like the unknown one, or else all keys of its section."""
    name, section = str(location[-1]).lower(), str(location[0]) if len(location) > 1 else None
    if section is None:
        near = difflib.get_close_matches(name, _sections(), 1)
        if near:
            return f"; did you mean {near[0]}?"
    scores = {}
    for key in describe():
        home, leaf = key.name.split(".")
        scores[key.name] = _likeness(name, leaf) + 0.1 * (home == section)
    best = max(scores.values())
    if best >= 0.65:
        near = [key for key, score in scores.items() if score == best]
        return f"; did you mean {' or '.join(near)}?"
    known = _sections() if section is None else _sections()[section].model_fields
    return f"; known here: {', '.join(known)}"


def _likeness(name: str, leaf: str) -> float:
    initials = "".join(word[0] for word in leaf.split("_"))
    if name == initials or leaf in name:  # lr, num_train_epochs
        return 0.8 + len(leaf) / 1000
    return difflib.SequenceMatcher(None, name, leaf).ratio()


class _Draft:
    """A recipe as plain values, with where each key was written and what is wrong so far."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        self.problems: list[str] = []

    def read(self, text: str) -> None:
        """Take over a recipe's text; raises ConfigError when it is not YAML of sections."""
        values = self._parse(text, "", "")
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"got {_shown(values)}; needed: sections such as `data:`")
        self.values = values or {}

    def override(self, assignment: str) -> None:
        """Apply one section.key=value; what is wrong with it goes to `problems`."""
        key, equals, text = assignment.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names) or len(names) > 2:
            self.problems.append(
                f"override {assignment!r}: not of the form section.key=value, "
                "such as training.batch_size=32"
            )
            return
        origin = f"override {assignment!r}"
        try:
            value = self._parse(text, ".".join(names), origin)
        except ConfigError as error:
            self.problems.append(f"{origin}: {error}")
            return
        self.where[".".join(names)] = origin
        if len(names) == 1:
            self.values[names[0]] = value
            return
        if self.values.get(names[0]) is None:
            self.values[names[0]] = {}
            self.where.setdefault(names[0], origin)
        if isinstance(self.values[names[0]], dict):
            self.values[names[0]][names[1]] = value

    def _parse(self, text: str, key: str, origin: str) -> Any:
        loader = None
        try:
            loader = _Reader(text)
            node = loader.get_single_node()
            return None if node is None else self._plain(loader, node, key, origin)
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise ConfigError(
                f"not plain YAML{line}: {getattr(error, 'problem', error)}; "
                "a value with special characters needs quotes"
            ) from error
        finally:
            if loader is not None:
                loader.dispose()

    def _plain(self, loader: "_Reader", node: yaml.Node, key: str, origin: str) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(loader, item, key, origin) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        values = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            inner = f"{key}.{name}" if key else name
            place = origin or f"line {name_node.start_mark.line + 1}"
            if name in values:
                first = self.where[inner]
                self.problems.append(f"{inner} ({place}): written twice, first {first}; keep one")
            self.where[inner] = place
            values[name] = self._plain(loader, value_node, inner, origin)
        return values


class _Reader(yaml.SafeLoader):
    """YAML 1.2's reading of plain words, where PyYAML keeps 1.1's: 1e-5 is text, off is false."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise yaml.composer.ComposerError(
                None, None, "anchors, aliases and tags are not allowed", event.start_mark
            )
        return super().compose_node(parent, index)


class _Writer(yaml.SafeDumper):
    """Quotes what either reading of YAML would take for something else than text."""


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
for _tag, _pattern, _first in (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Writer.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
