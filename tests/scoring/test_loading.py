"""What weights are loaded in, and where: `auto` follows the device, a name is taken as it is."""

import pytest
import torch

from exports_for_tests import hybrid_with_encoder
from hafrm.errors import ConfigError
from hafrm.export.stock_export import export_reward, gather_weights
from hafrm.scoring.loading import Placement, choose_dtype
from hafrm.scoring.reward_model import RewardModel


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A reward model by the name of the dtype that it is stored in."""
    folder = tmp_path_factory.mktemp("stored")
    model, encoder = hybrid_with_encoder()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        export_reward(gather_weights(model), encoder, folder / name, dtype=dtype)
    return {path.name: path for path in folder.iterdir()}


def test_auto_is_float32_on_a_cpu_whatever_is_stored(stored):
    for path in stored.values():
        model = RewardModel.from_pretrained(path)
        assert {p.dtype for p in model.model.parameters()} == {torch.float32}


def test_auto_is_the_stored_dtype_on_a_gpu_and_the_log_says_so(stored, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    with caplog.at_level("INFO", "hafrm"):
        assert choose_dtype(stored["float32"], "auto", None) == torch.float32
        assert caplog.text == ""
        assert choose_dtype(stored["bfloat16"], "auto", None) == torch.bfloat16
    assert "in torch.bfloat16, as it is stored" in caplog.text
    assert choose_dtype(stored["bfloat16"], "auto", "cpu") == torch.float32
    assert choose_dtype(stored["bfloat16"], "float32", "cuda:1") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert choose_dtype(stored["bfloat16"], "auto", None) == torch.float32


def test_a_named_dtype_is_taken_on_a_cpu_too(stored):
    model = RewardModel.from_pretrained(stored["float32"], dtype="bfloat16", device="cpu")
    assert model.model.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "device"), [("int8", None), ("auto", "gpu")])
def test_a_placement_that_there_is_not_is_refused(dtype, device):
    with pytest.raises(ConfigError, match="must be"):
        Placement(dtype, device)
