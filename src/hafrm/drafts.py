"""A recipe's text on its way to values: strict YAML, overrides, and where each key was written.

YAML is read as 1.2 reads plain words, without anchors, aliases or tags. Problems are collected and not
raised, so that people see all of them at once. Knows no schema: `hafrm.config` checks the values.
"""

import json
import re
from typing import Any

import yaml

from hafrm.errors import ConfigError


def shown(value: Any) -> str:
    """A value as one writes it in a recipe, cut to a line."""
    return json.dumps(value, ensure_ascii=False, default=repr)[:80]


class Draft:
    """A recipe as plain values, with where each key was written and what is wrong so far."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        self.problems: list[str] = []

    def read(self, text: str) -> None:
        """Take over a recipe's text; raises ConfigError when it is not YAML of sections."""
        values = self._parse(text, "", "")
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"got {shown(values)}; needed: sections such as `data:`")
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


class Writer(yaml.SafeDumper):
    """Quotes what either reading of YAML would take for something else than text."""


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
for _tag, _pattern, _first in (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
Writer.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
