"""A data set is tokenised once, and anything that would change its ids is another entry."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from hafrm.data.encoding import Encoder, encode_cached
from hafrm.preferences import Comparison, Group, Message
from hafrm.resumable import cache_folder
from tokenizers_for_tests import chat_tokenizer


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HAFRM_CACHE", str(tmp_path))


def groups(num: int = 6) -> list[Group]:
    """Groups of two or three responses, the third much longer than the others."""
    return [
        Group(
            id=f"g{i}",
            prompt=(Message("user", f"Say {'sun ' * (i + 1)}."),),
            responses=("sun", "moon and so on")
            if i % 3
            else ("sea", "boat", "a very long song " * 40),
            comparisons=(Comparison(0, 1, margin=float(i)),),
            tags={"number": str(i)},
        )
        for i in range(num)
    ]


def assert_same(first, second):
    (ours, report), (theirs, other) = first, second
    assert asdict(report) == asdict(other)
    assert [g.id for g in ours] == [g.id for g in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.prompt_ids, b.prompt_ids)
        assert all(map(np.array_equal, a.response_ids, b.response_ids))
        assert len(a.response_ids) == len(b.response_ids)
        assert (a.comparisons, a.source, a.tags) == (b.comparisons, b.source, b.tags)
        assert a.prompt_ids.dtype == b.prompt_ids.dtype == np.int32
        assert not b.response_ids[0].flags.writeable


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_the_second_time_nothing_is_encoded_and_the_result_is_the_same(monkeypatch, too_long):
    encoder = Encoder(chat_tokenizer(), max_length=64, too_long=too_long)
    plain = encoder.encode(groups())
    assert_same(plain, encode_cached(encoder, groups()))
    assert (len(plain[0]) < 6) == (too_long == "drop")
    monkeypatch.setattr(Encoder, "encode_indexed", None)
    assert_same(plain, encode_cached(encoder, groups()))


def test_another_text_length_limit_or_comparison_is_another_entry():
    encoder = Encoder(chat_tokenizer(), max_length=64)
    encode_cached(encoder, groups())
    encode_cached(Encoder(chat_tokenizer(), max_length=63), groups())
    encode_cached(encoder, groups(5))
    first, *rest = groups()
    encode_cached(encoder, [replace(first, responses=("sea", "boats", "x")), *rest])
    encode_cached(encoder, [replace(first, comparisons=(Comparison(1, 0),)), *rest])
    assert len(list(cache_folder("encoded").iterdir())) == 5


def test_tags_and_margins_are_those_of_the_groups_given_now():
    encoder = Encoder(chat_tokenizer(), max_length=64)
    encode_cached(encoder, groups())
    changed = [
        replace(g, tags={"new": "yes"}, comparisons=(Comparison(0, 1, margin=9.0),))
        for g in groups()
    ]
    encoded, _ = encode_cached(encoder, changed)
    assert all(g.tags == {"new": "yes"} and g.comparisons[0].margin == 9.0 for g in encoded)


def test_a_dropped_group_does_not_lend_its_comparisons_to_another_of_its_id():
    """Ids need not be unique: two files may number their rows alike."""
    encoder = Encoder(chat_tokenizer(), max_length=64, too_long="drop")
    dropped, fits = replace(groups()[0], id="7"), replace(groups()[1], id="7")
    fits = replace(fits, comparisons=(Comparison(1, 0),))
    plain = encoder.encode([dropped, fits])
    assert plain[0][0].comparisons == (Comparison(1, 0),)
    for _ in range(2):
        assert_same(plain, encode_cached(encoder, [dropped, fits]))


def test_a_damaged_entry_is_made_again():
    encoder = Encoder(chat_tokenizer(), max_length=64)
    plain = encode_cached(encoder, groups())
    (file,) = cache_folder("encoded").iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert_same(plain, encode_cached(encoder, groups()))
    assert_same(plain, encode_cached(encoder, groups()))


def test_no_groups_are_no_groups():
    encoder = Encoder(chat_tokenizer(), max_length=64)
    assert encode_cached(encoder, [])[0] == encode_cached(encoder, [])[0] == []
