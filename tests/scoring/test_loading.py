"""The one place that loads configs, tokenizers and models: what it refuses, and how."""

import contextlib
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import transformers

import hafrm
from hafrm.engine.layout import lay_out
from hafrm.errors import ModelError
from hafrm.scoring.loading import load_causal_lm, load_policy
from hafrm.scoring.model_files import load_any_tokenizer, load_config
from support.models import one_at_a_time, token_groups
from support.tiny_runs import write_base


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def base(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "base"))


def change_config(base: Path, **values: object) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(base: Path) -> object:
    return load_policy(base, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_quantised_base_is_refused_by_name(base, method):
    change_config(base, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"is quantised .{method}"):
        load(base)


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 999},
        {"vocab_size": "x"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**6},
        {"hidden_size": None},
        {"rope_parameters": []},
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_one_clear_error(base, values):
    change_config(base, **values)
    with pytest.raises(ModelError) as refusal:
        load(base)
    assert len(str(refusal.value)) < 800


@pytest.mark.parametrize("content", [b"", b"\x00" * 9, b"[" * 5000, b"[1, 2]", b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_is_a_model_error(base, name, content):
    (base / name).write_bytes(content)
    with pytest.raises(ModelError):
        load_any_tokenizer(base) if name.startswith("tok") else load(base)


def test_a_panic_in_the_tokenizers_rust_is_a_model_error(base):
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["continuing_subword_prefix"] = "longer than any token"
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"cannot load a tokenizer from .*out of (range|bounds)"):
        load_any_tokenizer(base)


def test_truncated_weights_are_a_model_error(base):
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(ModelError, match="cannot load a model from"):
        load_causal_lm(base, dtype=torch.float32)


@pytest.mark.parametrize("outside", ["../x.safetensors", "/dev/zero", ".."])
def test_an_index_names_no_file_outside_its_directory(base, outside):
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": outside}}))
    with pytest.raises(ModelError, match="not a file of its directory"):
        load(base)


def test_the_text_part_of_a_multimodal_checkpoint_is_the_stock_models(tmp_path):
    """trl#2957: Gemma 3 with its vision tower."""
    text = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=80
    )
    stock = transformers.Gemma3ForConditionalGeneration(config).eval()
    stock.save_pretrained(tmp_path)
    groups = token_groups(((11, (5, 9)), (7, (8,))), vocab=70)
    model = load_policy(tmp_path, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        logps = model(lay_out(groups)).logps
    _, expected = one_at_a_time(stock, torch.nn.Linear(32, 1), groups)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c", "base/model", "~/model"])
def test_a_local_path_that_does_not_exist_is_refused_without_asking_the_hub(
    base, monkeypatch, name
):
    monkeypatch.chdir(base.parent)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    for read in (load_config, load_any_tokenizer):
        with pytest.raises(ModelError, match="does not exist"):
            read(name)


def test_without_a_network_an_unknown_hub_id_is_refused_at_once_and_a_cached_one_is_read(
    monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("hafrm.scoring.model_files.getproxies", dict)
    monkeypatch.setattr("hafrm.scoring.model_files.find_adapter", lambda *_: None)
    cached = transformers.PretrainedConfig()
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: cached)

    def getaddrinfo(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    with pytest.raises(
        ModelError, match=r"owner/name is not a directory here .* cannot be reached"
    ):
        load_config("owner/name")
    (tmp_path / "models--owner--name").mkdir()
    assert load_config("owner/name") is cached


def test_a_folder_without_config_says_what_it_is(tmp_path):
    with pytest.raises(ModelError, match=r"not a model directory: it has no config\.json$"):
        load_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base"):
        load_config(tmp_path)


def test_code_of_a_model_directory_never_runs(base, monkeypatch):
    change_config(base, auto_map={"AutoConfig": "evil.Evil"}, model_type="evil")
    (base / "evil.py").write_text(f"open({str(base / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for read in (load_config, load_any_tokenizer, load):
        with contextlib.suppress(ModelError):  # a tokenizer of a class that transformers has loads
            read(base)
    assert not (base / "ran").exists()


def test_models_are_loaded_without_their_code_everywhere():
    """Every call of a loader of transformers or peft in the source says so, or is one of our own."""
    calls = []
    for file in sorted(Path(hafrm.__file__).parent.rglob("*.py")):
        text = file.read_text()
        for call in re.finditer(r"(\w+)\.(from_pretrained|from_config)\b", text):
            after = text[call.end() : call.end() + 400]
            ours = call[1] in ("rm", "RewardModel", "PolicyModel")
            card = file.name == "model_card.py"  # text of a card, which trusts no code either
            if not (ours or card or "trust_remote_code=False" in after):
                calls.append(f"{file.name}: {call[0]}")
    # PEFT's own: a JSON file, and weights put into a model that is there
    allowed = [
        "plain_model.py: PeftConfig.from_pretrained",
        "plain_model.py: PeftModel.from_pretrained",
        "model_files.py: PeftConfig.from_pretrained",
    ]
    assert calls == allowed
