"""Sets that are kept on disk hold what the same sets hold in memory, in the same order and to the bit."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hafrm.data import store
from hafrm.data.describe import describe_data
from hafrm.data.encoding import Encoder
from hafrm.data.parse import parse_row
from hafrm.data.reader import PreferenceData, read_preferences
from hafrm.data.splits import (
    check_leakage,
    mix,
    normalised_key,
    split_by_prompt,
    without_prompts,
    write_groups,
)
from hafrm.data.store import Lazy
from hafrm.errors import DataError
from hafrm.preferences import Comparison, Group, TokenizedGroup
from support.chat_tokenizers import CHATML, chat_tokenizer


def rows(num_rows: int, seed: int) -> list[dict[str, Any]]:
    """Rows that repeat and contradict one another, of few prompts in several subsets."""
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for number in range(num_rows):
        chosen, rejected = draw.sample([f"answer {k} " + "é" * k for k in range(5)], 2)
        row: dict[str, Any] = {"prompt": draw.choice("abcdEe") + f"  {number % 7}"}
        row |= {"chosen": chosen, "rejected": rejected}
        row |= draw.choice([{}, {"tie": True}, {"margin": 0.1, "weight": 1 / 3}])
        row |= draw.choice([{}, {"votes": [3, 1, 2]}, {"id": f"own {number}"}])
        row |= draw.choice([{}, {"subset": "s"}, {"subset": "s", "split": "t"}, {"source": "x"}])
        made.append(row if draw.random() > 0.05 else row | {"chosen": " "})
    return made


def grouped_in_dictionaries(raw: Sequence[dict[str, Any]]) -> tuple[list[Group], list[int]]:
    """Groups, and the numbers of rows that repeat earlier ones, of whole prompts in dictionaries."""
    groups: dict[tuple[object, ...], Group] = {}
    repeated = []
    for number, row in enumerate(raw):
        parsed = parse_row(row)
        if not isinstance(parsed, Group):
            continue
        key = (parsed.prompt, parsed.tags.get("subset"), parsed.tags.get("split"))
        is_first = key not in groups
        old = groups.get(key, replace(parsed, id=parsed.id or f"memory-{number}", comparisons=()))
        texts = tuple(dict.fromkeys((*old.responses, *parsed.responses)))
        pairs = {_ends(pair): pair for pair in old.comparisons}
        for pair in parsed.comparisons:
            chosen, rejected = (
                texts.index(parsed.responses[i]) for i in (pair.chosen, pair.rejected)
            )
            moved = replace(pair, chosen=chosen, rejected=rejected)
            pairs.setdefault(_ends(moved), moved)
        if is_first or (texts, len(pairs)) != (old.responses, len(old.comparisons)):
            tags = {tag: text for tag, text in old.tags.items() if parsed.tags.get(tag) == text}
            own = {"responses": texts, "comparisons": tuple(pairs.values()), "tags": tags}
            groups[key] = replace(old, **own, source="memory")
        else:
            repeated.append(number)
    return list(groups.values()), repeated


def _ends(pair: Comparison) -> object:
    return frozenset((pair.chosen, pair.rejected)) if pair.tie else (pair.chosen, pair.rejected)


def held_out_by_key(groups: Sequence[Group], fraction: float, seed: int) -> list[bool]:
    digests = (hashlib.sha256(f"{seed}:{normalised_key(g.prompt)}".encode()) for g in groups)
    return [int.from_bytes(d.digest()[:8], "big") / 2**64 < fraction for d in digests]


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> PreferenceData:
    monkeypatch.setattr(store, "IN_MEMORY", 4000)
    reading = read_preferences([rows(400, seed=0), rows(50, seed=1)], max_bad_fraction=1.0)
    assert isinstance(reading.groups, Lazy)
    return reading


@pytest.fixture
def in_memory() -> PreferenceData:
    return read_preferences([rows(400, seed=0), rows(50, seed=1)], max_bad_fraction=1.0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("limit", [100, store.IN_MEMORY])
def test_groups_and_repeated_rows_are_those_of_whole_prompts_in_dictionaries(
    limit: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "IN_MEMORY", limit)
    raw = rows(400, seed)
    groups, repeated = grouped_in_dictionaries(raw)
    reading = read_preferences([raw], max_bad_fraction=1.0)
    assert list(reading.groups) == groups
    assert [row.row for row in reading.bad_rows if row.reason == "duplicate"] == repeated
    assert [row.row for row in reading.bad_rows] == sorted(row.row for row in reading.bad_rows)


def test_splits_mixes_and_files_are_those_of_lists(
    in_memory: PreferenceData, lazily: PreferenceData, tmp_path: Path
) -> None:
    both = [in_memory, lazily]
    split = [split_by_prompt(reading.groups, 0.3, seed=5) for reading in both]
    assert [list(part) for part in split[0]] == [list(part) for part in split[1]]
    mask = held_out_by_key(in_memory.groups, 0.3, seed=5)
    assert list(split[1][1]) == [g for g, own in zip(in_memory.groups, mask, strict=True) if own]
    rest = [without_prompts(r.groups, held) for r, (_, held) in zip(both, split, strict=True)]
    assert list(rest[0]) == list(rest[1]) == list(split[0][0])
    with pytest.raises(DataError) as in_lists:
        check_leakage(in_memory.groups, split[0][1])
    with pytest.raises(DataError) as on_disk:
        check_leakage(lazily.groups, split[1][1])
    assert str(in_lists.value) == str(on_disk.value)
    cut = in_memory.num_groups[0]
    mixed = [mix([r.groups[:cut], r.groups[cut:]], weights=[2.0, 1.0], cap=9, seed=3) for r in both]
    assert list(mixed[0]) == list(mixed[1]) and isinstance(mixed[1], Lazy)
    files = [tmp_path / "lists", tmp_path / "disk"]
    sizes = [write_groups(r.groups, file) for r, file in zip(both, files, strict=True)]
    assert sizes[0] == sizes[1] and files[0].read_bytes() == files[1].read_bytes()


def test_token_ids_and_descriptions_are_those_of_lists(
    in_memory: PreferenceData, lazily: PreferenceData
) -> None:
    encoder = Encoder(chat_tokenizer(CHATML))
    (listed, report), (stored, same_report) = (
        encoder.encode(r.groups) for r in (in_memory, lazily)
    )
    assert report == same_report and isinstance(stored, Lazy)

    def content(group: TokenizedGroup) -> list[object]:
        ids = [part.tolist() for part in (group.prompt_ids, *group.response_ids)]
        return [ids, group.comparisons, group.id, group.source, group.tags]

    assert [content(group) for group in stored] == [content(group) for group in listed]
    last = stored[-1]
    assert last.prompt_ids.dtype == np.int32 and not last.response_ids[0].flags.writeable
    assert describe_data(lazily, encoder.encode) == describe_data(in_memory, encoder.encode)
