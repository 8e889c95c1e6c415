"""The reference cache gives what a live reference gives, and never something stale."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from hafrm.engine.layout import lay_out
from hafrm.preferences import Comparison, TokenizedGroup
from hafrm.resumable import cache_folder
from hafrm.training import parallel, reference
from hafrm.training.passes import (
    reference_cache_key,
    reference_logps,
    references_of,
    weights_digest,
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
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HAFRM_CACHE", str(tmp_path))


def test_cached_equals_live_and_runs_the_model_once(monkeypatch):
    first = reference_logps(tiny_hybrid(), groups(), max_tokens=12)
    model = tiny_hybrid()
    live = model(lay_out(groups())).logps
    assert torch.allclose(torch.from_numpy(first.logps), live, atol=1e-4)
    monkeypatch.setattr(parallel, "score_on_all_ranks", None)
    again = reference_logps(tiny_hybrid(), groups(), max_tokens=500)
    assert (again.logps == first.logps).all()
    assert again.first.tolist() == [0, 2, 3]


def test_only_responses_that_the_run_reaches_are_computed_and_the_others_are_not_a_number(
    monkeypatch,
):
    """Groups of 2, 1 and 3 responses; the run compares the last two of the third group only."""
    compared = replace(groups()[2], comparisons=(Comparison(0, 1), Comparison(2, 1)))
    train, validation = [*groups()[:2], compared], groups(seed=1)[:1]
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
    live = tiny_hybrid()(lay_out([*train, *validation])).logps
    assert np.isnan(ours.logps[:4]).all()
    assert torch.allclose(torch.from_numpy(ours.logps[4:]), live[4:6], atol=1e-4)
    assert ours.first.tolist() == [0, 2, 3]
    assert torch.allclose(torch.from_numpy(held_out.logps), live[6:], atol=1e-4)
    assert held_out.first.tolist() == [0]


def test_a_damaged_cache_file_is_computed_again():
    first = reference_logps(tiny_hybrid(), groups(), max_tokens=100)
    (file,) = cache_folder("reference").iterdir()
    file.write_bytes(b"torn")
    assert (reference_logps(tiny_hybrid(), groups(), max_tokens=100).logps == first.logps).all()


def test_the_key_follows_weights_ids_and_dtype_but_not_the_reward_head():
    model = tiny_hybrid()
    key = reference_cache_key(model, groups(), None)
    assert key == reference_cache_key(tiny_hybrid(), groups(), None)
    assert key != reference_cache_key(tiny_hybrid(seed=1), groups(), None)
    assert key != reference_cache_key(model, groups(seed=1), None)
    assert key != reference_cache_key(model, groups(), torch.bfloat16)
    model.reward_head.weight.data.add_(1.0)
    assert key == reference_cache_key(model, groups(), None)


def test_fresh_adapters_do_not_change_the_key():
    """LoRA starts as the base model, so both ways of training share one cache."""
    model = tiny_hybrid()
    key = reference_cache_key(model, groups(), None)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), model.backbone)
    assert key == reference_cache_key(model, groups(), None)


def test_a_checkpoints_files_stand_for_its_weights_and_these_are_not_hashed(tmp_path, monkeypatch):
    """Files, the hub's commit, or, where neither says anything, the weights in memory."""
    model = tiny_hybrid()
    assert weights_digest(str(tmp_path), model) is None
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    digest = weights_digest(str(tmp_path), model)
    monkeypatch.setattr(reference, "_weight_bytes", None)
    first = reference_logps(model, groups(), max_tokens=100, path=str(tmp_path))
    file.write_bytes(b"two")
    assert weights_digest(str(tmp_path), model) != digest
    again = reference_logps(model, groups(), max_tokens=100, path=str(tmp_path))
    assert (again.logps == first.logps).all()
    assert len(list(cache_folder("reference").iterdir())) == 2
    model.backbone.config._commit_hash = "abc"
    assert weights_digest("some/model", model) == "some/model@abc"
