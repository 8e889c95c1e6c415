"""What is decided when a run starts: the precision that it computes in, from then on."""

import pytest
import torch

from hafrm.errors import CheckpointError
from hafrm.recipe_file import load_recipe
from hafrm.training import model_setup, run_export
from hafrm.training.loop import train
from hafrm.training.memory_plan import plan_recipe
from hafrm.training.methods import resolve_method
from hafrm.training.model_setup import with_precision
from support.tiny_runs import tiny_recipe


@pytest.mark.parametrize(
    ("device", "native", "precision"),
    [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp32")],
)
def test_precision_auto_is_bf16_on_a_gpu_that_computes_in_it(
    tmp_path, monkeypatch, device, native, precision
):
    """A T4 or V100 emulates bfloat16, which is slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    recipe = tiny_recipe(tmp_path)
    assert recipe.training.precision == "auto"
    assert with_precision(recipe, device).training.precision == precision
    for named in ("fp32", "bf16"):
        asked = tiny_recipe(tmp_path, training={"precision": named})
        assert with_precision(asked, device) == asked


def test_a_run_records_the_precision_that_auto_was_and_resumes_in_no_other(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(run_export, "check_golden", lambda _: {})
    recipe, run = tiny_recipe(tmp_path, method={"name": "bt"}), tmp_path / "run"
    with caplog.at_level("INFO", "hafrm"):
        train(recipe, run)
    assert "training.precision auto: fp32 on cpu" in caplog.text
    assert load_recipe(run / "recipe.yaml").training.precision == "fp32"
    train(recipe, run, resume=True)
    monkeypatch.setattr(model_setup, "has_bfloat16", lambda _: True)
    with pytest.raises(CheckpointError, match="recipe differs"):
        train(recipe, run, resume=True)


def test_a_plan_for_a_gpu_is_one_in_bf16(tmp_path):
    """This machine need not have the GPU that is planned for."""
    auto, bf16, fp32 = (
        tiny_recipe(tmp_path, training={"precision": p}) for p in ("auto", "bf16", "fp32")
    )
    plans = [plan_recipe(r, resolve_method(r), memory=8.0).need for r in (auto, bf16, fp32)]
    assert plans[0] == plans[1] != plans[2]
