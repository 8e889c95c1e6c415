"""Named sets -> numbered rows in our columns: opened, filtered, split, and kept apart by prompt.

"set:hh-helpful" is read from the hub, "set:hh-helpful=path" from a file or folder of one's own in the
published form. A set has parts (train, validation, test); rows of an earlier part whose prompt is in a
later one too are left out, so that no part leaks into another. What is left out, for this or by the
set's own filter, is counted by reason. The sets are in `hafrm.data.catalogue`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hafrm.data.catalogue import WHOLE, NamedSet
from hafrm.data.files import Numbered, find_files, read_file
from hafrm.data.hub import read_hub
from hafrm.data.mixing import normalised_key
from hafrm.data.published import LeftOut, OurRow
from hafrm.data.rows import ParsedRow, parse_row
from hafrm.data.values import Refusal, RefusedError, show
from hafrm.errors import DataError


def check_part(named: NamedSet, path: str | None, part: str | None) -> None:
    """Raises `DataError` for a part that the set does not have, or one that must be named and is not."""
    options = " or ".join(f"'#split={name}'" for name in named.parts)
    if part is not None and part not in named.parts:
        raise DataError(f"set:{named.name} has no part {part!r}; write {options} behind it")
    one_part = path is not None and not named.in_one_piece and Path(path).is_file()
    if part is None and len(named.parts) > 1 and not one_part:
        raise DataError(f"set:{named.name} has several parts; write {options} behind it")


def read_set(
    named: NamedSet, path: str | None, part: str | None, left_out: Counter[str]
) -> Numbered:
    """(row number, row in our columns or `Refusal`) of one part of a set, from `path` or the hub.

    `left_out` counts the rows that are not used, by reason.
    """
    part = part or (named.parts[0] if len(named.parts) == 1 else None)
    if path is not None and Path(path).is_file() and not named.in_one_piece:
        rows = _converted(named, read_file(Path(path)), left_out)
        yield from ((number, _tagged(row, part)) for number, row in rows)
        return
    assert part is not None
    by_part = _parts(named, path, part, left_out)
    later = named.parts[named.parts.index(part) + 1 :]
    held = {key for other in later for _, row in by_part.get(other, []) if (key := _prompt(row))}
    for number, row in by_part.get(part, []):
        if held and _prompt(row) in held:
            left_out["prompt is in a held-out part"] += 1
        else:
            yield number, _tagged(row, part)


def _parts(
    named: NamedSet, path: str | None, part: str, left_out: Counter[str]
) -> dict[str, list[tuple[int, object]]]:
    """The wanted part and the later ones, as far as they are there; only the wanted one is counted."""
    if named.in_one_piece:
        return _divided(named, list(_converted(named, _open(named, path, WHOLE), left_out)))
    found = {part: list(_converted(named, _open(named, path, part), left_out))}
    for other in named.parts[named.parts.index(part) + 1 :]:
        if path is None or _files(named, Path(path), other):
            rows = _open(named, path, other)
            found[other] = list(_converted(named, rows, Counter()))
    return found


def _divided(
    named: NamedSet, rows: list[tuple[int, object]]
) -> dict[str, list[tuple[int, object]]]:
    """The rows of a set in one piece by part: the first share, or what their `split` says."""
    if named.test_share:
        good = [number for number, row in rows if not isinstance(row, Refusal)]
        test = set(good[: int(named.test_share * len(good))])
        return {
            "test": [(number, row) for number, row in rows if number in test],
            "train": [(number, row) for number, row in rows if number not in test],
        }
    by_part: dict[str, list[tuple[int, object]]] = {name: [] for name in named.parts}
    for number, row in rows:
        split = row.get("split") if isinstance(row, dict) else None
        by_part[split or named.parts[0]].append((number, row))
    return by_part


def _open(named: NamedSet, path: str | None, part: str) -> Numbered:
    if path is not None:
        files = [Path(path)] if Path(path).is_file() else _files(named, Path(path), part)
        if not files:
            called = f" called like {part}" if part else ""
            raise DataError(
                f"{path}: no such file, or no file{called} in it (for set:{named.name})"
            )
        return _renumbered(files)
    if part not in named.hub:
        raise DataError(
            f"set:{named.name} is not on the hub; get it from {named.home} and write "
            f"set:{named.name}=path"
        )
    return read_hub(named.hub[part])


def _renumbered(files: list[Path]) -> Numbered:
    """The rows of several files, counted through; of one file, as they are numbered there."""
    start = 0
    for file in files:
        number = -1
        for number, row in read_file(file):
            yield start + number, row
        start += number + 1


def _files(named: NamedSet, folder: Path, part: str) -> list[Path]:
    """The files of a part in a folder: a download of the hub's repository, or files of those names."""
    where = named.hub.get(part)
    patterns = []
    if where is not None:
        name = Path(where.file).name if where.file else where.split
        within = f"*{where.folder}/" if where.folder else ""
        patterns = [f"{within}*{name}*", *([f"{within}*"] if part == WHOLE else []), f"*{name}*"]
    return find_files(folder, [*patterns, f"*{part}*"])


def _converted(
    named: NamedSet, rows: Numbered, left_out: Counter[str]
) -> Iterator[tuple[int, Any]]:
    """The rows in our columns, without those that the set's filter leaves out."""
    for number, row in rows:
        ours = row if isinstance(row, Refusal) else _convert(named, row)
        if isinstance(ours, LeftOut):
            left_out[ours.reason] += 1
        else:
            yield number, ours


def _convert(named: NamedSet, row: object) -> OurRow | LeftOut | Refusal:
    if not isinstance(row, dict):
        return Refusal("unreadable row", f"expected an object with named columns, got {show(row)}")
    absent = [column for column in named.columns if column not in row]
    if absent:
        return Refusal("missing column", f"no `{'`, `'.join(absent)}`")
    try:
        return named.read_row(row)
    except RefusedError as refused:
        return refused.refusal


def _tagged(row: object, part: str | None) -> object:
    return {**row, "split": part} if isinstance(row, dict) and part else row


def _prompt(row: object) -> str | None:
    parsed = None if isinstance(row, Refusal) else parse_row(row)
    return normalised_key(parsed.prompt) if isinstance(parsed, ParsedRow) else None
