"""Splitting, mixing and leakage of groups, by prompt.

A prompt is always on one side of a split, whatever else is in the data and in whatever order: its
side comes from a hash of its text. Prompts that differ only in case or white space count as one.
Groups are never copied into two sides and never changed, except that `mix` may trim and weigh them.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import replace

from hafrm.errors import ConfigError, DataError
from hafrm.preferences import Group, Message, prompt_key


def normalised_key(prompt: Sequence[Message]) -> str:
    """Digest of a prompt in lower case with every run of white space as one blank."""
    return prompt_key([Message(m.role, " ".join(m.content.lower().split())) for m in prompt])


def split_by_prompt(
    groups: Sequence[Group], fraction: float, seed: int
) -> tuple[list[Group], list[Group]]:
    """(rest, held out), disjoint by prompt, each in the order of `groups`.

    `fraction` of the prompts is held out on expectation, not exactly: adding data never moves a
    prompt to the other side. Only if all prompts fell on one side does the nearest one change it.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the held-out fraction must be at least 0 and below 1, got {fraction}")
    keys = [normalised_key(group.prompt) for group in groups]
    place = {key: _uniform(key, seed) for key in keys}
    if fraction == 0 or not groups:
        return list(groups), []
    if len(place) < 2:
        raise DataError(f"cannot hold out a part of {len(groups)} groups that share one prompt")
    held = {key for key, value in place.items() if value < fraction}
    held = held or {min(place, key=place.__getitem__)}
    if len(held) == len(place):
        held.remove(max(place, key=place.__getitem__))
    rest = [group for group, key in zip(groups, keys, strict=True) if key not in held]
    held_out = [group for group, key in zip(groups, keys, strict=True) if key in held]
    return rest, held_out


def without_prompts(groups: Sequence[Group], held: Sequence[Group]) -> list[Group]:
    """The groups whose prompts are not among those of `held`, in their order."""
    keys = {normalised_key(group.prompt) for group in held}
    return [group for group in groups if normalised_key(group.prompt) not in keys]


def check_leakage(
    train: Sequence[Group], test: Sequence[Group], *, names: tuple[str, str] = ("train", "test")
) -> None:
    """Raise `DataError` when a prompt is in both, naming how many there are and some of them."""
    seen = {normalised_key(group.prompt) for group in train}
    shared: dict[str, Group] = {}
    for group in test:
        key = normalised_key(group.prompt)
        if key in seen:
            shared.setdefault(key, group)
    if not shared:
        return
    total = len({normalised_key(group.prompt) for group in test})
    examples = "\n".join(
        f"  {group.id}: {group.prompt[-1].content[:80]!r}" for group in list(shared.values())[:3]
    )
    raise DataError(
        f"{len(shared):,} of {total:,} prompts of {names[1]} are in {names[0]} too, such as\n"
        f"{examples}\nTake them out of one of the two, split one set by prompt, or leave them out of "
        "training with data.shared_prompts=drop."
    )


def mix(
    sets: Sequence[Sequence[Group]],
    *,
    weights: Sequence[float] | None = None,
    cap: int | None = None,
    seed: int = 0,
) -> list[Group]:
    """All groups of all sets in their order, at most `cap` comparisons from each set.

    Which comparisons a cap keeps depends on `seed` and on the groups, not on their order; a group
    in the way of the cap is trimmed. `weights` (one for each set) multiply the comparisons'.
    """
    factors = [1.0] * len(sets) if weights is None else list(weights)
    if len(factors) != len(sets):
        raise ConfigError(f"{len(sets)} sets need {len(sets)} weights, got {len(factors)}")
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors):
        raise ConfigError(f"weights must be finite and not negative, got {factors}")
    if cap is not None and cap < 1:
        raise ConfigError(f"cap must be at least 1 comparison, got {cap}")
    mixed = []
    for groups, factor in zip(sets, factors, strict=True):
        kept = list(groups) if cap is None else _cap(groups, cap, seed)
        mixed += [_weigh(group, factor) for group in kept]
    return mixed


def uniform_weights(sets: Sequence[Sequence[Group]], cap: int | None = None) -> list[float]:
    """The weights with which every set counts as much as any other; 1 on average over comparisons.

    `cap` is that of `mix`. Ties, which are not trained on, do not count.
    """
    sizes = [sum(not c.tie for group in groups for c in group.comparisons) for groups in sets]
    sizes = [size if cap is None else min(size, cap) for size in sizes]
    share = sum(sizes) / max(1, sum(size > 0 for size in sizes))
    return [share / size if size else 1.0 for size in sizes]


def _uniform(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing else than the key and the seed."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _weigh(group: Group, factor: float) -> Group:
    if factor == 1:
        return group
    weighed = [replace(pair, weight=pair.weight * factor) for pair in group.comparisons]
    return replace(group, comparisons=tuple(weighed))


def _cap(groups: Sequence[Group], cap: int, seed: int) -> list[Group]:
    """Groups with `cap` comparisons in all, drawn by hash; whole but for the last one drawn."""
    order = sorted(
        range(len(groups)),
        key=lambda i: _uniform(f"{groups[i].id}:{prompt_key(groups[i].prompt)}", seed),
    )
    kept, left = {}, cap
    for index in order:
        if left <= 0:
            break
        kept[index] = _trim(groups[index], left, seed)
        left -= len(kept[index].comparisons)
    return [kept[index] for index in sorted(kept)]


def _trim(group: Group, size: int, seed: int) -> Group:
    """The group with at most `size` of its comparisons and without the responses left over."""
    if len(group.comparisons) <= size:
        return group
    drawn = random.Random(f"{seed}:{group.id}").sample(range(len(group.comparisons)), size)
    pairs = [group.comparisons[index] for index in sorted(drawn)]
    used = sorted({index for pair in pairs for index in (pair.chosen, pair.rejected)})
    new = {old: index for index, old in enumerate(used)}
    return replace(
        group,
        responses=tuple(group.responses[index] for index in used),
        comparisons=tuple(
            replace(pair, chosen=new[pair.chosen], rejected=new[pair.rejected]) for pair in pairs
        ),
    )
