"""Recipe files: strict YAML 1.2 in, one frozen `Recipe` out; one error lists all problems and their places.

The schema is `hafrm.recipe`, or the root of another kind of recipe. Start reading at `load_as`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from hafrm.errors import ConfigError, did_you_mean
from hafrm.recipe import Recipe, Section, describe_keys, sections_of
from hafrm.run_folder import expand_user

Root = TypeVar("Root", bound=Section)

OTHER_VERBS = {"method": "hafrm train", "reward": "hafrm rlhf", "algorithm": "hafrm rlhf"}
"""Sections that only one kind of recipe has, and the verbs that take it."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `section.key=value` overrides applied in order.

    Raises ConfigError with every problem, and where each one is.
    """
    return load_as(Recipe, path, overrides)


def load_as(root: type[Root], path: str | Path, overrides: Sequence[str] = ()) -> Root:
    """Like `load_recipe`, for a recipe of another kind: `root` is a section of sections."""
    draft = _Draft({})
    try:
        values = draft.parse(expand_user(path).read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: got {_shown(values)}; needed: sections such as `data:`")
    draft.values = values or {}
    return _validated(root, draft, str(path), overrides)


def build_recipe(values: Mapping[str, Any], name: str = "the recipe") -> Recipe:
    """The recipe from plain nested values; raises ConfigError as `load_recipe` does."""
    return build_as(Recipe, values, name)


def build_as(
    root: type[Root],
    values: Mapping[str, Any],
    name: str = "the recipe",
    overrides: Sequence[str] = (),
) -> Root:
    """Like `build_recipe`, for a recipe of another kind, with overrides applied in order."""
    plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    return _validated(root, _Draft(plain), name, overrides)


def with_values(recipe: Root, changes: Mapping[str, Any], name: str = "the recipe") -> Root:
    """The recipe with `changes` (see `nested`); changing a key of a section that is null switches it on."""
    return build_as(type(recipe), nested(recipe.model_dump(mode="json"), changes), name)


def nested(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The nested values with changes to some keys ("training.seed") or whole sections ("method")."""
    for key, value in changes.items():
        section, dot, leaf = key.partition(".")
        old = values.get(section)
        rest = old if dot and isinstance(old, Mapping) else {}
        values[section] = {**rest, leaf: value} if dot else value
    return values


def dump_recipe(recipe: Section) -> str:
    """YAML with every key written out; `load_recipe` (or `load_as`) reads back an equal recipe."""
    lines = []
    for section, values in recipe.model_dump(mode="json").items():
        lines.append(f"{section}: null" if values is None else f"{section}:")
        lines += [f"  {key}: {_as_yaml(value)}" for key, value in (values or {}).items()]
    return "\n".join(lines) + "\n"


def _as_yaml(value: Any) -> str:
    # JSON is YAML too: a quoted "off" is text for every reader of YAML, 1.1 or 1.2
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "." not in text:
        return text.replace("e", ".0e")  # YAML 1.1 reads 1e-05 as text
    # JSON allows these characters in a string, YAML does not
    unprintable = "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"
    return re.sub(unprintable, lambda match: f"\\u{ord(match[0]):04x}", text)


class _Draft:
    """A recipe that is being read: its values, where each key was written, and the problems so far."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.places: dict[str, str] = {}
        self.problems: list[str] = []

    def parse(self, text: str, key: str = "", place: str = "") -> Any:
        try:
            node = YAML(typ="safe", pure=True).compose(text)
            return None if node is None else self._plain(node, key, place)
        except (YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", error)
            raise ConfigError(f"not plain YAML{line}: {problem}; are quotes missing?") from error

    def override(self, assignment: str) -> None:
        key, equals, text = assignment.partition("=")
        names = key.strip().split(".")
        place = f"override {assignment!r}"
        if not equals or not all(names) or len(names) > 2:
            self.problems.append(f"{place}: not of the form section.key=value")
            return
        try:
            value = self.parse(text, ".".join(names), place)
        except ConfigError as error:
            self.problems.append(f"{place}: {error}")
            return
        self.places[".".join(names)] = place
        if len(names) == 1:
            self.values[names[0]] = value
            return
        if self.values.get(names[0]) is None:
            self.values[names[0]] = {}
            self.places.setdefault(names[0], place)
        if isinstance(self.values[names[0]], dict):  # else validation reports the section itself
            self.values[names[0]][names[1]] = value

    def _plain(self, node: Node, key: str, place: str) -> Any:
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if node.anchor or ":" in kind or kind.startswith("!"):
            raise ConfigError("anchors, aliases and tags are not allowed")
        if isinstance(node, SequenceNode):
            return [self._plain(item, key, place) for item in node.value]
        if not isinstance(node, MappingNode):
            return _scalar(kind, str(node.value))
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            inner = f"{key}.{name}" if key else name
            here = place or f"line {name_node.start_mark.line + 1}"
            if name in values:
                first = self.places[inner]
                self.problems.append(f"{inner} ({here}): written twice, first {first}; keep one")
            self.places[inner] = here
            values[name] = self._plain(value_node, inner, place)
        return values


def _scalar(kind: str, text: str) -> Any:
    # dates, 0x1f and 1_0 stay text: a recipe has no use for them as numbers
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if len(text) > 400 and kind in ("int", "float"):
        return text  # longer than any number that Python accepts
    if kind == "int" and text.lstrip("+-").isdecimal():
        return int(text)
    if kind == "float" and "_" not in text and text[-1].isdecimal():
        return float(text)
    return text


def _validated(root: type[Root], draft: _Draft, name: str, overrides: Sequence[str]) -> Root:
    for assignment in overrides:
        draft.override(assignment)
    # a section whose keys are all commented out reads as null
    optional = {k for k, info in root.model_fields.items() if NoneType in get_args(info.annotation)}
    values = {k: {} if v is None and k not in optional else v for k, v in draft.values.items()}
    problems = draft.problems
    for section, verb in OTHER_VERBS.items():
        if section in values and section not in root.model_fields:
            raise ConfigError(f"{name} has the section `{section}`: it is a recipe for {verb}")
    try:
        recipe = root.model_validate(values)
        if not problems:
            return recipe
    except ValidationError as error:
        seen = set()  # one wrong value can fail several checks of its key
        for details in error.errors(include_url=False):
            if len(details["loc"]) < 2 or details["loc"][:2] not in seen:
                problems += _explain(root, details, draft.places)
            seen.add(details["loc"][:2])
    # a damaged file may have thousands of problems, or one of megabytes
    unique = [text if len(text) < 800 else f"{text[:800]}..." for text in dict.fromkeys(problems)]
    count = "a problem" if len(unique) == 1 else f"{len(unique)} problems"
    more = [f"and {len(unique) - 40} more"] * (len(unique) > 40)
    raise ConfigError("\n  - ".join([f"{name} has {count}:", *unique[:40], *more]))


def _explain(root: type[Section], error: ErrorDetails, places: Mapping[str, str]) -> Iterator[str]:
    location, value = error["loc"], error["input"]
    key = ".".join(str(part) for part in location[:2])
    head = f"{key} ({places[key]})" if key in places else key
    entry = describe_keys(root).get(key)
    if error["type"] == "value_error":  # our own rules are complete sentences, one line per problem
        yield from str(error["ctx"]["error"]).split("\n")
    elif error["type"] == "extra_forbidden":
        yield f"{head}: unknown {'key' if len(location) > 1 else 'section'}{_hint(root, location)}"
    elif entry is None:  # a whole section is missing, or is not a mapping
        fields = sections_of(root)[key].model_fields if key else root.model_fields
        needed = [name for name, info in fields.items() if info.is_required()] or list(fields)
        got = "missing" if error["type"] == "missing" else f"got {_shown(value)}"
        yield f"{head or 'the recipe'}: {got}; needed: keys and values, with {', '.join(needed)}"
    elif error["type"] == "missing" and len(location) == 2:
        yield f"{head}: missing; needed: {entry.allowed}. {entry.meaning}"
    else:
        number_as_text = error["type"] == "string_type" and isinstance(value, int | float)
        quote = " (as text it needs quotes)" if number_as_text else ""
        yield f"{head}: got {_shown(value)}; allowed: {entry.allowed}{quote}. {entry.meaning}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:80]


def _hint(root: type[Section], location: tuple[int | str, ...]) -> str:
    """The keys like an unknown one, here or in other sections, or else all keys of its section."""
    sections, name = sections_of(root), str(location[-1])
    allowed = list(sections[str(location[0])].model_fields if len(location) > 1 else sections)
    homes = {key.partition(".")[2]: key for key in describe_keys(root)}
    # the right key in the wrong section, or a mistyped key of this section
    hint = f"did you mean {homes[name]}? " if name in homes else did_you_mean(name, allowed)
    return f"; {hint}allowed here: {', '.join(allowed)}"
