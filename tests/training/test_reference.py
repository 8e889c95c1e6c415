"""The reference cache gives what a live reference gives, and never something stale."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from hafrm.engine.layout import lay_out
from hafrm.preferences import TokenizedGroup
from hafrm.resumable import cache_folder
from hafrm.training import reference
from hafrm.training.reference import reference_key, reference_logps
from models_for_tests import tiny_hybrid, token_groups


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
    monkeypatch.setattr(reference, "run_forward", None)
    again = reference_logps(tiny_hybrid(), groups(), max_tokens=500)
    assert (again.logps == first.logps).all()
    assert again.first.tolist() == [0, 2, 3]


def test_a_damaged_cache_file_is_computed_again():
    first = reference_logps(tiny_hybrid(), groups(), max_tokens=100)
    (file,) = cache_folder("reference").iterdir()
    file.write_bytes(b"torn")
    assert (reference_logps(tiny_hybrid(), groups(), max_tokens=100).logps == first.logps).all()


def test_the_key_follows_weights_ids_and_dtype_but_not_the_reward_head():
    model = tiny_hybrid()
    key = reference_key(model, groups(), None)
    assert key == reference_key(tiny_hybrid(), groups(), None)
    assert key != reference_key(tiny_hybrid(seed=1), groups(), None)
    assert key != reference_key(model, groups(seed=1), None)
    assert key != reference_key(model, groups(), torch.bfloat16)
    model.reward_head.weight.data.add_(1.0)
    assert key == reference_key(model, groups(), None)


def test_fresh_adapters_do_not_change_the_key():
    """LoRA starts as the base model, so both ways of training share one cache."""
    model = tiny_hybrid()
    key = reference_key(model, groups(), None)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), model.backbone)
    assert key == reference_key(model, groups(), None)
