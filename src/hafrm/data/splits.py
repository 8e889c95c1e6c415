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

from hafrm.atomic import atomic_write
from hafrm.errors import ConfigError, DataError
from hafrm.preferences import Comparison, Group, Message, prompt_key


def normalised_key(prompt: Sequence[Message]) -> str:
    """Digest of a prompt in lower case, with every run of white space as one blank."""
    return prompt_key([Message(m.role, " ".join(m.content.lower().split())) for m in prompt])


def split_by_prompt(
    groups: Sequence[Group], fraction: float, seed: int
) -> tuple[list[Group], list[Group]]:
    """(rest, held out), disjoint by prompt, each in the order of `groups`.

    `fraction` is met in expectation only, so that adding data never moves a prompt to the other side.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the held-out fraction must be at least 0 and below 1, got {fraction}")
    keys = [normalised_key(group.prompt) for group in groups]
    place = {key: _uniform(key, seed) for key in keys}
    if fraction == 0 or not groups:
        return list(groups), []
    if len(place) < 2:
        raise DataError(f"cannot hold out a part of {len(groups)} groups that share one prompt")
    held_out = {key for key, value in place.items() if value < fraction}
    # neither side may be empty: then the nearest prompt changes sides
    held_out = held_out or {min(place, key=place.__getitem__)}
    if len(held_out) == len(place):
        held_out.remove(max(place, key=place.__getitem__))
    sides: tuple[list[Group], list[Group]] = ([], [])
    for group, key in zip(groups, keys, strict=True):
        sides[key in held_out].append(group)
    return sides


def without_prompts(groups: Sequence[Group], held_out: Sequence[Group]) -> list[Group]:
    """The groups whose prompts are not among those of `held_out`, in their order."""
    keys = {normalised_key(group.prompt) for group in held_out}
    return [group for group in groups if normalised_key(group.prompt) not in keys]


def check_leakage(
    train: Sequence[Group], test: Sequence[Group], *, names: tuple[str, str] = ("train", "test")
) -> None:
    """Raise `DataError` when both have a prompt, with the number of such prompts and some of them."""
    seen = {normalised_key(group.prompt) for group in train}
    by_key = {normalised_key(group.prompt): group for group in reversed(test)}
    shared = [group for key, group in reversed(by_key.items()) if key in seen]
    if shared:
        examples = "\n".join(f"  {g.id}: {g.prompt[-1].content[:80]!r}" for g in shared[:3])
        raise DataError(
            f"{len(shared):,} of {len(by_key):,} prompts of {names[1]} are in {names[0]} too, such as\n"
            f"{examples}\nRemove them, or leave them out of training with data.shared_prompts=drop."
        )


def mix(
    sets: Sequence[Sequence[Group]],
    *,
    weights: Sequence[float] | None = None,
    cap: int | None = None,
    seed: int = 0,
) -> list[Group]:
    """All groups of all sets in their order, at most `cap` comparisons from each set.

    Which ones depends on `seed` and the groups, not on their order; the group that crosses the cap is
    trimmed. `weights` (one for each set) multiply the comparisons' own.
    """
    mixed: list[Group] = []
    for groups, factor in zip(sets, weights or [1.0] * len(sets), strict=True):
        for group in groups if cap is None else _cap(groups, cap, seed):
            weighed = (replace(pair, weight=pair.weight * factor) for pair in group.comparisons)
            mixed.append(group if factor == 1 else replace(group, comparisons=tuple(weighed)))
    return mixed


def _uniform(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cap(groups: Sequence[Group], cap: int, seed: int) -> list[Group]:
    order = sorted(
        range(len(groups)),
        key=lambda i: _uniform(f"{groups[i].id}:{prompt_key(groups[i].prompt)}", seed),
    )
    drawn, room = {}, cap
    for index in order:
        if room <= 0:
            break
        drawn[index] = _trim(groups[index], room, seed)
        room -= len(drawn[index].comparisons)
    return [drawn[index] for index in sorted(drawn)]


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
    """Write groups as JSON lines that `read_preferences` reads back alike; returns the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for group in groups for row in _rows(group)]
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, "".join(lines))
    return len(lines)


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
