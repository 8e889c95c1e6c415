"""The reference cache gives what a live reference gives, and never something stale."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hafrm.atomic import cache_folder
from hafrm.data.store import store_tokens
from hafrm.engine.layout import lay_out
from hafrm.preferences import Comparison, TokenizedGroup
from hafrm.scoring.forward import Scores, first_responses
from hafrm.statistics import effective_rank, spectrum
from hafrm.training import parallel, passes
from hafrm.training.passes import (
    reference_file,
    reference_logps,
    reference_weights,
    references_of,
    repeated_wins,
    score_heads,
    state_spread,
)
from hafrm.training.step_batches import ComparisonRef
from support.models import tiny_hybrid, token_groups


def groups(seed: int = 0) -> list[TokenizedGroup]:
    shapes = [(5, (3, 4)), (2, (6,)), (9, (1, 2, 3))]
    return [
        TokenizedGroup(t.prompt_ids, t.response_ids, id=str(i))
        for i, t in enumerate(token_groups(shapes, seed))
    ]


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HAFRM_CACHE", str(tmp_path))


def cache_of(model, some, autocast, path):
    return reference_file(model, some, autocast, reference_weights(model, path))


@pytest.fixture
def base(tmp_path) -> str:
    """A checkpoint's folder, whose files stand for the weights."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model.safetensors").write_bytes(b"one")
    return str(tmp_path / "base")


def test_cached_equals_live_and_runs_the_model_once_unless_the_file_is_damaged(base, monkeypatch):
    first = reference_logps(tiny_hybrid(), groups(), max_tokens=12, path=base)
    live = tiny_hybrid()(lay_out(groups())).logps
    assert torch.allclose(torch.from_numpy(first.logps), live, atol=1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "score_on_all_ranks", None)
        again = reference_logps(tiny_hybrid(), groups(), max_tokens=500, path=base)
    assert (again.logps == first.logps).all()
    assert again.first.tolist() == [0, 2, 3]
    (file,) = cache_folder("reference").iterdir()
    file.write_bytes(b"torn")
    torn = reference_logps(tiny_hybrid(), groups(), max_tokens=12, path=base)
    assert (torn.logps == first.logps).all()


def test_a_killed_pass_is_taken_up_where_its_last_file_ends(base, monkeypatch):
    """Three groups of 12, 8 and 15 tokens in files of about 16, and a process that dies in the second."""
    whole = reference_logps(tiny_hybrid(), groups(), max_tokens=500)
    monkeypatch.setattr(passes, "PART_TOKENS", 16)
    score, sizes = parallel.score_on_all_ranks, []

    def dying(model, part, **options):
        if sizes:
            raise KeyboardInterrupt
        sizes.append(len(part))
        return score(model, part, **options)

    monkeypatch.setattr(parallel, "score_on_all_ranks", dying)
    with pytest.raises(KeyboardInterrupt):
        reference_logps(tiny_hybrid(), groups(), max_tokens=500, path=base)
    seen = []
    monkeypatch.setattr(
        parallel,
        "score_on_all_ranks",
        lambda model, part, **options: seen.append(len(part)) or score(model, part, **options),
    )
    resumed = reference_logps(tiny_hybrid(), groups(), max_tokens=500, path=base)
    assert (sizes, seen) == ([1], [1, 1])
    np.testing.assert_allclose(resumed.logps, whole.logps, atol=1e-5)
    assert (resumed.first == whole.first).all()


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "on disk"])
def test_only_responses_that_the_run_reaches_are_computed_and_the_others_are_not_a_number(
    monkeypatch, stored
):
    """Groups of 2, 1 and 3 responses; the run compares the last two of the third group only."""
    compared = replace(groups()[2], comparisons=(Comparison(0, 1), Comparison(2, 1)))
    train, validation = [*groups()[:2], compared], groups(seed=1)[:1]
    whole = [*train, *validation]
    train = store_tokens(train) if stored else train
    seen = []

    def counted(model, some, **options):
        seen.append(sum(len(group.response_ids) for group in some))
        return score(model, some, **options)

    score = parallel.score_on_all_ranks
    monkeypatch.setattr(parallel, "score_on_all_ranks", counted)
    ours, held_out = references_of(
        tiny_hybrid(), train, [ComparisonRef(2, 1)], validation, max_tokens=500
    )
    assert seen == [2 + 2]
    live = tiny_hybrid()(lay_out(whole)).logps
    assert np.isnan(ours.logps[:4]).all()
    assert torch.allclose(torch.from_numpy(ours.logps[4:]), live[4:6], atol=1e-4)
    assert ours.first.tolist() == [0, 2, 3]
    assert torch.allclose(torch.from_numpy(held_out.logps), live[6:], atol=1e-4)
    assert held_out.first.tolist() == [0]


def test_the_file_follows_the_checkpoints_files_or_its_commit_token_ids_and_dtype(base, tmp_path):
    model, file = tiny_hybrid(), tmp_path / "base/model.safetensors"
    names = {
        cache_of(model, groups(), None, base),
        cache_of(model, groups(seed=1), None, base),
        cache_of(model, groups(), torch.bfloat16, base),
    }
    assert cache_of(tiny_hybrid(), groups(), None, base) in names
    file.write_bytes(b"two")
    names.add(cache_of(model, groups(), None, base))
    model.backbone.config._commit_hash = "abc"
    names.add(cache_of(model, groups(), None, "some/model"))
    assert len(names) == 5
    file.unlink()
    assert cache_of(model, groups(), None, base) is None
    reference_logps(model, groups(), max_tokens=100, path=base)
    assert not cache_folder("reference").exists()


def test_the_spread_of_the_states_is_that_of_what_the_reward_head_reads():
    model = tiny_hybrid()
    with torch.no_grad():  # equal weights would make all norms equal
        model.backbone.norm.weight[::2] = 0.2
    some = groups()
    with state_spread(model) as spread:
        score_heads(model, some, None, None, max_tokens=64)
    states = [model.last_states(lay_out([group])).detach().numpy() for group in some]
    together = np.concatenate(states)
    assert spread["effective_rank"] == pytest.approx(effective_rank(spectrum(together)), rel=1e-4)
    norms = [np.sqrt(state @ state) for state in together]
    assert spread["norm_spread"] == pytest.approx(np.std(norms) / np.mean(norms), rel=1e-4)
    assert not model.reward_head._forward_pre_hooks
    model.reward_head = None
    with state_spread(model) as none:
        score_heads(model, some, None, None, max_tokens=64)
    assert none == {}


def test_one_token_repeated_is_scored_against_the_chosen_response_and_keeps_the_eos(monkeypatch):
    """The fake reward counts equal neighbours: repetition wins wherever a response has three tokens or more
    and is not repetition itself."""
    chosen = [Comparison(0, 1)]
    texts = [([5, 6, 7, 2], [5, 2]), ([6, 6, 6, 2], [5, 2]), ([9, 2], [5, 2])]
    some = [
        TokenizedGroup(
            np.array([1, 3], np.int32), tuple(np.array(t, np.int32) for t in pair), chosen
        )
        for pair in texts
    ]
    seen = []

    def score(model, groups, **_):
        ids = [ids for group in groups for ids in group.response_ids]
        seen.extend(i.tolist() for i in ids)
        rewards = np.array([(np.diff(i) == 0).sum() for i in ids], np.float32)
        return Scores(rewards, None, np.ones(len(ids), np.int64), first_responses(groups))

    monkeypatch.setattr(parallel, "score_on_all_ranks", score)
    scores = score_heads(tiny_hybrid(), some, None, None, max_tokens=64)
    seen.clear()
    wins = repeated_wins(tiny_hybrid(), some, scores, max_tokens=64)
    assert seen == [[6, 6, 6, 2], [6, 6, 6, 2], [9, 2]]
    assert wins["repeated_wins"] == pytest.approx(1 / 3)
    assert repeated_wins(None, some, replace(scores, rewards=None)) == {}
