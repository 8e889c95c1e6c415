"""Rows with the same prompt (and subset and split) become one group; until then, many are kept on disk."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hafrm.data.store import Lazy, Records, pack_comparisons, unpack_comparisons
from hafrm.preferences import Comparison, Group, Message, prompt_key


class GroupedRows:
    """The good rows of one source, as groups of one row each, until all are read."""

    def __init__(self) -> None:
        self._rows = Records()
        self._numbers = array("q")  # of each row in its source
        self._keys = array("Q")  # for each row, the digest of what makes rows one group

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, number: int, row: Group) -> None:
        # a comparison belongs to its own subset and split
        tags = [Message(tag, row.tags[tag]) for tag in ("subset", "split") if tag in row.tags]
        self._keys.append(int(prompt_key((*row.prompt, *tags)), 16))
        self._numbers.append(number)
        packed = [row.id, row.prompt, row.responses, pack_comparisons(row.comparisons), row.tags]
        self._rows.append(json.dumps(packed, ensure_ascii=False).encode())

    def groups(self, source: str) -> tuple[Sequence[Group], list[tuple[int, str]]]:
        """The groups in the order of their first rows, lazy unless small; and (row number, group's id) of
        every row that only repeats what earlier rows say."""
        _, first, owner, sizes = np.unique(
            np.array(self._keys), return_index=True, return_inverse=True, return_counts=True
        )
        order = np.argsort(first)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        rows = np.argsort(place[owner], kind="stable")  # group by group
        ends = np.cumsum(sizes[order])
        starts = ends - sizes[order]

        def draft(index: int) -> tuple[_Draft, list[int]]:
            own, *others = rows[starts[index] : ends[index]].tolist()
            drafted = _Draft(_unpack(self._rows[own]))
            return drafted, [i for i in others if not drafted.add(_unpack(self._rows[i]))]

        repeated = [
            (self._numbers[row], drafted.first.id)
            for index in np.flatnonzero(ends - starts > 1).tolist()
            for drafted, again in [draft(index)]
            for row in again
        ]
        groups = Lazy(lambda index: draft(index)[0].group(source), len(order))
        return list(groups) if self._rows.is_small else groups, repeated


@dataclass(slots=True)
class _Draft:
    """A group in the making, from its first row on."""

    first: Group
    tags: dict[str, str] = field(init=False)
    responses: dict[str, int] = field(default_factory=dict)
    comparisons: dict[tuple[int, int, bool], Comparison] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tags = self.first.tags
        self.add(self.first)

    def add(self, parsed: Group) -> bool:
        """Add what a row says; returns whether any of it is new."""
        assert parsed.prompt == self.first.prompt, "two prompts have the same digest"
        old_size = len(self.responses), len(self.comparisons)
        place = [self.responses.setdefault(text, len(self.responses)) for text in parsed.responses]
        for pair in parsed.comparisons:
            ends = place[pair.chosen], place[pair.rejected]
            # a tie is the same in both orders
            key = (min(ends), max(ends), True) if pair.tie else (*ends, False)
            self.comparisons.setdefault(key, replace(pair, chosen=ends[0], rejected=ends[1]))
        new = parsed is self.first or (len(self.responses), len(self.comparisons)) != old_size
        if new:  # the group's tags are those on which its rows agree
            self.tags = {t: text for t, text in self.tags.items() if parsed.tags.get(t) == text}
        return new

    def group(self, source: str) -> Group:
        responses, comparisons = tuple(self.responses), tuple(self.comparisons.values())
        return Group(self.first.id, self.first.prompt, responses, comparisons, source, self.tags)


def _unpack(record: bytes) -> Group:
    name, prompt, responses, pairs, tags = json.loads(record)
    messages = tuple(Message(role, content) for role, content in prompt)
    return Group(name, messages, tuple(responses), unpack_comparisons(pairs), tags=tags)
