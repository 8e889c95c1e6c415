"""Groups split by prompt, mixed, checked for leakage, and written back to JSON lines.

A prompt's side of a split comes from a hash of its text, so other data and their order do not matter.
Prompts that differ only in case or white space count as one.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.atomic import atomic_file
from hafrm.data.store import Lazy, join, numbers_of, pick
from hafrm.errors import DataError
from hafrm.preferences import Comparison, Group, Message, prompt_key


def normalised_key(prompt: Sequence[Message]) -> str:
    """Digest of a prompt in lower case, with every run of white space as one blank."""
    return prompt_key([Message(m.role, " ".join(m.content.lower().split())) for m in prompt])


def prompt_keys(groups: Sequence[Group]) -> NDArray[np.uint64]:
    """`normalised_key` of each group's prompt, as numbers."""

    def number(group: Group) -> int:
        return int(normalised_key(group.prompt), 16)

    return numbers_of(groups, "prompt", number, np.uint64)


def split_by_prompt(
    groups: Sequence[Group], fraction: float, seed: int
) -> tuple[Sequence[Group], Sequence[Group]]:
    """(rest, held out), disjoint by prompt, each in the order of `groups`.

    `fraction` is met in expectation only, so that adding data never moves a prompt to the other side.
    """
    if fraction == 0 or not groups:
        return groups, []
    keys, owner = np.unique(prompt_keys(groups), return_inverse=True)
    if len(keys) < 2:
        raise DataError(f"cannot hold out a part of {len(groups)} groups that share one prompt")
    place = np.fromiter((_uniform(f"{key:016x}", seed) for key in keys.tolist()), np.float64)
    is_held_out = place < fraction
    # neither side may be empty: then the nearest prompt changes sides
    if not is_held_out.any():
        is_held_out[place.argmin()] = True
    elif is_held_out.all():
        is_held_out[place.argmax()] = False
    return pick(groups, ~is_held_out[owner]), pick(groups, is_held_out[owner])


def without_prompts(groups: Sequence[Group], held_out: Sequence[Group]) -> Sequence[Group]:
    """The groups whose prompts are not among those of `held_out`, in their order."""
    if not held_out:
        return groups
    return pick(groups, np.isin(prompt_keys(groups), prompt_keys(held_out), invert=True))


def check_leakage(
    train: Sequence[Group], test: Sequence[Group], *, names: tuple[str, str] = ("train", "test")
) -> None:
    """Raise `DataError` if both contain a prompt, with the number of such prompts and some examples."""
    if not test:
        return
    keys, first = np.unique(prompt_keys(test), return_index=True)
    shared = np.sort(first[np.isin(keys, prompt_keys(train))])
    if len(shared):
        some = [test[place] for place in shared[:3].tolist()]
        examples = "\n".join(f"  {g.id}: {g.prompt[-1].content[:80]!r}" for g in some)
        raise DataError(
            f"{len(shared):,} of {len(keys):,} prompts of {names[1]} are in {names[0]} too, such as\n"
            f"{examples}\nRemove them, or leave them out of training with data.shared_prompts=drop."
        )


def mix(
    sets: Sequence[Sequence[Group]],
    *,
    weights: Sequence[float] | None = None,
    cap: int | None = None,
    seed: int = 0,
) -> Sequence[Group]:
    """All groups of all sets in their order, at most `cap` comparisons from each set.

    Which ones depends on `seed` and the groups, not on their order; the group that crosses the cap is
    trimmed. `weights` (one for each set) multiply the comparisons' own weights.
    """
    capped = sets if cap is None else [_cap(groups, cap, seed) for groups in sets]
    factors = weights or [1.0] * len(sets)
    return join([_weigh(*pair) for pair in zip(capped, factors, strict=True)])


def _weigh(groups: Sequence[Group], factor: float) -> Sequence[Group]:
    def weigh(group: Group) -> Group:
        pairs = tuple(replace(pair, weight=pair.weight * factor) for pair in group.comparisons)
        return replace(group, comparisons=pairs)

    if factor == 1:
        return groups
    if isinstance(groups, Lazy):
        return Lazy(lambda number: weigh(groups[number]), len(groups))
    return [weigh(group) for group in groups]


def _uniform(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cap(groups: Sequence[Group], cap: int, seed: int) -> Sequence[Group]:
    place = [_uniform(f"{group.id}:{prompt_key(group.prompt)}", seed) for group in groups]
    room, drawn = cap, list[int]()
    for index in np.argsort(np.array(place), kind="stable").tolist():
        if room <= 0:
            break
        drawn.append(index)
        last, size = index, room
        room -= len(groups[index].comparisons)
    places = np.sort(np.array(drawn, np.int64))
    rest = pick(groups, places)
    if room >= 0:
        return rest
    middle = int(np.searchsorted(places, last))
    return join([rest[:middle], [_trim(groups[last], size, seed)], rest[middle + 1 :]])


def _trim(group: Group, size: int, seed: int) -> Group:
    """The group with at most `size` of its comparisons, and the responses that these need."""
    if len(group.comparisons) <= size:
        return group
    drawn = random.Random(f"{seed}:{group.id}").sample(range(len(group.comparisons)), size)
    pairs = [group.comparisons[index] for index in sorted(drawn)]
    used = sorted({index for pair in pairs for index in (pair.chosen, pair.rejected)})
    place = {old: new for new, old in enumerate(used)}
    moved = (replace(p, chosen=place[p.chosen], rejected=place[p.rejected]) for p in pairs)
    responses = tuple(group.responses[index] for index in used)
    return replace(group, responses=responses, comparisons=tuple(moved))


def write_groups(groups: Sequence[Group], file: Path) -> int:
    """Write groups as JSON lines that `read_preferences` reads back; returns the number of rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    num_rows = 0
    with atomic_file(file) as lines:
        for row in (row for group in groups for row in _rows(group)):
            lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            num_rows += 1
    return num_rows


def _rows(group: Group) -> Iterator[dict[str, Any]]:
    """One row for each comparison, and one for the responses that are in none."""
    base = {"id": group.id, "prompt": [message._asdict() for message in group.prompt]}
    for pair in group.comparisons:
        default = asdict(Comparison(pair.chosen, pair.rejected))
        extra = {name: v for name, v in asdict(pair).items() if v != default[name]}
        sides = {side: group.responses[getattr(pair, side)] for side in ("chosen", "rejected")}
        yield base | sides | extra | group.tags
    compared = {index for pair in group.comparisons for index in (pair.chosen, pair.rejected)}
    rest = [text for index, text in enumerate(group.responses) if index not in compared]
    if rest:
        yield base | {"responses": rest} | group.tags
    elif not group.responses:
        yield base | group.tags
