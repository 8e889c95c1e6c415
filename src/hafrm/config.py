"""Recipes read, checked, explained and written: strict YAML in, one frozen `Recipe` out.

A recipe is valid, or refused with all its problems in one message, each with its place. Relative
paths stay as written and mean the current directory, as in a shell; `~` is expanded. The schema is
`hafrm.recipe`, or another root of sections that a verb brings (`load_as`). Nothing here imports torch or
touches the file system, but to read the recipe.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hafrm.drafts import Draft, Writer, shown
from hafrm.errors import ConfigError
from hafrm.recipe import Recipe, Section

__all__ = [
    "Key",
    "Recipe",
    "build_as",
    "build_recipe",
    "describe",
    "dump_recipe",
    "load_as",
    "load_recipe",
]

Root = TypeVar("Root", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `section.key=value` overrides applied in their order.

    Raises ConfigError with every problem of file and overrides, and where each of them stands.
    """
    return load_as(Recipe, path, overrides)


def build_recipe(values: Mapping[str, Any], name: str = "the recipe") -> Recipe:
    """The recipe of plain nested values; raises ConfigError as `load_recipe` does."""
    return build_as(Recipe, values, name)


def load_as(root: type[Root], path: str | Path, overrides: Sequence[str] = ()) -> Root:
    """As `load_recipe`, for a recipe of another kind: `root` is a section of sections."""
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the recipe {path}: {reason}") from error
    draft = Draft()
    try:
        draft.read(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for assignment in overrides:
        draft.override(assignment)
    return _checked(root, draft, str(path))


def build_as(
    root: type[Root],
    values: Mapping[str, Any],
    name: str = "the recipe",
    overrides: Sequence[str] = (),
) -> Root:
    """As `build_recipe`, for a recipe of another kind, with overrides applied in their order."""
    draft = Draft()
    draft.values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for assignment in overrides:
        draft.override(assignment)
    return _checked(root, draft, name)


def dump_recipe(recipe: Section) -> str:
    """YAML with every key written out; `load_recipe` (or `load_as`) reads back an equal recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=Writer, sort_keys=False, allow_unicode=True)


class Key(NamedTuple):
    """One key of a recipe, in words."""

    name: str
    """Dotted, such as training.batch_size."""
    allowed: str
    default: str
    """As one would write it; "required" when there is none."""
    meaning: str


def describe(root: type[Section] = Recipe) -> tuple[Key, ...]:
    """Every key that a recipe may hold, in the order of the schema."""
    return tuple(
        Key(
            f"{section}.{name}",
            _allowed(info),
            "required" if info.is_required() else json.dumps(info.default),
            " ".join((info.description or "").split()),
        )
        for section, kind in _sections(root).items()
        for name, info in kind.model_fields.items()
    )


def _sections(root: type[Section]) -> dict[str, type[Section]]:
    kinds = {}
    for name, info in root.model_fields.items():
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


def _checked(root: type[Root], draft: Draft, name: str) -> Root:
    # a section whose keys are all commented out reads as null
    optional = {k for k, info in root.model_fields.items() if NoneType in get_args(info.annotation)}
    values = {k: {} if v is None and k not in optional else v for k, v in draft.values.items()}
    problems, recipe = draft.problems, None
    try:
        recipe = root.model_validate(values)
    except ValidationError as error:
        seen = set()  # one wrong value can fail several checks of its key
        for details in error.errors(include_url=False):
            if len(details["loc"]) < 2 or details["loc"][:2] not in seen:
                problems += _explain(root, details, draft.where)
            seen.add(details["loc"][:2])
    if recipe is not None and not problems:
        return recipe
    unique = list(dict.fromkeys(problems))
    count = "a problem" if len(unique) == 1 else f"{len(unique)} problems"
    raise ConfigError("\n  - ".join([f"{name} has {count}:", *unique]))


def _explain(root: type[Section], error: ErrorDetails, where: Mapping[str, str]) -> Iterator[str]:
    """One of pydantic's findings in plain words, with its place and the way out."""
    location, value = error["loc"], error["input"]
    key = ".".join(str(part) for part in location[:2])
    head = f"{key} ({where[key]})" if key in where else key
    known = next((k for k in describe(root) if k.name == key), None)
    if error["type"] == "value_error":  # our own rules say it all, a line for each problem
        yield from str(error["ctx"]["error"]).split("\n")
    elif error["type"] == "extra_forbidden":
        yield f"{head}: unknown {'key' if len(location) > 1 else 'section'}{_suggestion(root, location)}"
    elif known is None:  # a whole section is missing, or is no mapping
        fields = _sections(root)[key].model_fields if key else root.model_fields
        needed = [name for name, info in fields.items() if info.is_required()] or list(fields)
        got = "missing" if error["type"] == "missing" else f"got {shown(value)}"
        yield f"{head or 'the recipe'}: {got}; needed: keys and values, with {', '.join(needed)}"
    elif error["type"] == "missing" and len(location) == 2:
        yield f"{head}: missing; needed: {known.allowed}. {known.meaning}"
    else:
        quote = ""
        if error["type"] == "string_type" and isinstance(value, int | float):
            quote = " (as text it needs quotes)"
        yield f"{head}: got {shown(value)}; allowed: {known.allowed}{quote}. {known.meaning}"


def _suggestion(root: type[Section], location: tuple[int | str, ...]) -> str:
    """The known keys most like the unknown one, or else all keys of its section."""
    name, section = str(location[-1]).lower(), str(location[0]) if len(location) > 1 else None
    sections = _sections(root)
    if section is None:
        near = difflib.get_close_matches(name, sections, 1)
        if near:
            return f"; did you mean {near[0]}?"
    scores = {}
    for key in describe(root):
        home, leaf = key.name.split(".")
        scores[key.name] = _likeness(name, leaf) + 0.1 * (home == section)
    best = max(scores.values())
    if best >= 0.65:
        near = [key for key, score in scores.items() if score == best]
        return f"; did you mean {' or '.join(near)}?"
    known = sections if section is None else sections[section].model_fields
    return f"; known here: {', '.join(known)}"


def _likeness(name: str, leaf: str) -> float:
    initials = "".join(word[0] for word in leaf.split("_"))
    if name == initials or leaf in name:  # lr, num_train_epochs
        return 0.8 + len(leaf) / 1000
    return difflib.SequenceMatcher(None, name, leaf).ratio()
