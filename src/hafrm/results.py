"""Results on disk: frozen dataclasses to JSON and back, through pydantic.

JSON has no nan and no infinity: both are written as null, which a field of type `Real` reads as nan.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from hafrm.atomic import atomic_write
from hafrm.errors import CheckpointError

T = TypeVar("T")

Real = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float field that may be nan, for results that are read back."""


def to_plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, numbers of numpy and torch unpacked, nan as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, arrays and scalars
        return to_plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: type[T], value: Any) -> T:
    """The dataclass `kind` from what `to_plain` made of it; raises pydantic's ValidationError."""
    return TypeAdapter(kind).validate_python(value)


def write_result(path: Path, result: Any) -> None:
    """Write a result as JSON, complete or not at all; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_plain(result), indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(path, text + "\n")


def read_result(path: Path, kind: type[T]) -> T:
    """Read a result that `write_result` wrote; raises CheckpointError for any other file."""
    try:
        return from_plain(kind, json.loads(path.read_bytes()))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as {kind.__name__}: {reason}; make it again"
        ) from error
