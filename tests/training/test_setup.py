"""Training data as a recipe mixes it: capped and weighted set by set, named sets included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from hafrm.engine.layout import lay_out
from hafrm.errors import CheckpointError, ConfigError, DataError
from hafrm.recipe_file import load_recipe
from hafrm.training import run_export, setup
from hafrm.training.loop import run_training
from hafrm.training.memory_plan import plan_recipe
from hafrm.training.methods import get_method, resolve_method
from hafrm.training.setup import build_model, prepare_data, with_precision
from support.published_rows import PUBLISHED
from support.tiny_runs import tiny_recipe, write_preferences


@pytest.fixture
def two_files(tmp_path: Path) -> list[str]:
    """24 and 8 comparisons, a prompt each."""
    big = write_preferences(tmp_path / "big.jsonl", num=24)
    return [str(big), str(write_preferences(tmp_path / "small.jsonl", num=8, start=100))]


def weights(tmp_path: Path, train: list[str], **data: Any) -> dict[str, list[float]]:
    """The weights of the comparisons of each source, of training and validation together."""
    recipe = tiny_recipe(tmp_path, data={"train": train, "validation_fraction": 0.2, **data})
    prepared = prepare_data(recipe)
    found: dict[str, list[float]] = {}
    for group in [*prepared.train, *prepared.validation]:
        found.setdefault(group.source, []).extend(pair.weight for pair in group.comparisons)
    return found


def test_without_cap_and_weights_everything_counts_alike(tmp_path, two_files):
    assert weights(tmp_path, two_files) == {"big": [1.0] * 24, "small": [1.0] * 8}


def test_a_cap_holds_for_each_set(tmp_path, two_files):
    found = weights(tmp_path, two_files, cap=10)
    assert {name: len(each) for name, each in found.items()} == {"big": 10, "small": 8}


def test_weights_go_to_the_entries_in_their_order(tmp_path, two_files):
    assert weights(tmp_path, two_files, weights=[0.5, 3.0]) == {
        "big": [0.5] * 24,
        "small": [3.0] * 8,
    }


def test_uniform_weights_make_the_sets_equal_with_and_without_a_cap(tmp_path, two_files):
    """32 comparisons in two sets: 16 for each, 16/24 and 16/8; capped 18 in two: 9/10 and 9/8."""
    found = weights(tmp_path, two_files, weights="uniform")
    assert found == {"big": [pytest.approx(16 / 24)] * 24, "small": [2.0] * 8}
    found = weights(tmp_path, two_files, weights="uniform", cap=10)
    assert found == {"big": [pytest.approx(0.9)] * 10, "small": [pytest.approx(9 / 8)] * 8}


def test_a_group_of_sets_is_one_entry_with_one_weight_and_a_cap_for_each_member(
    tmp_path, two_files
):
    for name in ("beaver-safe", "hh-harmless"):
        text = json.dumps(PUBLISHED[name])
        rows = [text.replace("How do I pick a lock?", f"Say {name} {i}.") for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    group = f"set:safety={tmp_path}#split=train"
    found = weights(tmp_path, [group, two_files[1]], weights=[2.0, 1.0], cap=5)
    assert found == {"beaver-safe": [2.0] * 5, "hh-harmless": [2.0] * 5, "small": [1.0] * 5}


def test_what_named_sets_leave_out_is_recorded(tmp_path):
    rows = [PUBLISHED["chatbot-arena"] | {"winner": "tie"}] * 3
    talk = PUBLISHED["chatbot-arena"]["conversation_a"]
    for i in range(40):
        rows.append(
            PUBLISHED["chatbot-arena"]
            | {"conversation_a": [{**talk[0], "content": f"q{i}"}, talk[1]]}
        )
    file = tmp_path / "arena.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(tmp_path, data={"train": [f"set:chatbot-arena={file}#split=train"]})
    assert prepare_data(recipe).counts["left_out"] == {"tie": 3}


@pytest.mark.parametrize("given", [[1.0], [1.0, -1.0], "alike", [1, 2, 3]])
def test_wrong_weights_are_refused(tmp_path, two_files, given):
    with pytest.raises(ConfigError, match=r"data\.weights"):
        tiny_recipe(tmp_path, data={"train": two_files, "weights": given})


def test_the_recipes_template_is_the_one_that_is_trained_on(tmp_path):
    plain = prepare_data(tiny_recipe(tmp_path)).encoder
    recipe = tiny_recipe(tmp_path, model={"chat_template": "paper-phi-2"})
    encoder = prepare_data(recipe).encoder
    assert encoder.template.startswith(
        "{% for message in messages %}{% if message['role'] == 'user'"
    )
    assert encoder.template_sha256 != plain.template_sha256


def shared(folder: Path) -> dict[str, Any]:
    """20 prompts to train on, of which the test file has three."""
    test = write_preferences(folder / "test.jsonl", num=5, start=17)
    train = write_preferences(folder / "twenty.jsonl", num=20)
    return {"train": [str(train)], "test": [str(test)]}


def test_prompts_shared_with_the_test_set_are_an_error_or_left_out_as_the_recipe_says(tmp_path):
    with pytest.raises(
        DataError, match=r"(?s)3 of 5 prompts of data.test are in data.train.*=drop"
    ):
        prepare_data(tiny_recipe(tmp_path, data=shared(tmp_path)))
    prepared = prepare_data(
        tiny_recipe(tmp_path, data=shared(tmp_path) | {"shared_prompts": "drop"})
    )
    assert len(prepared.train) + len(prepared.validation) == 17
    assert prepared.counts["groups_with_shared_prompts_dropped"] == 3


def test_prompts_shared_with_the_validation_set_are_left_out_of_training(tmp_path):
    data = shared(tmp_path)
    data = {"train": data["train"], "validation": data["test"], "shared_prompts": "drop"}
    recipe = tiny_recipe(tmp_path, data=data | {"validation_fraction": 0.0})
    prepared = prepare_data(recipe)
    assert (len(prepared.train), len(prepared.validation)) == (17, 5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_adapters_read_their_layers_input_as_it_is(tmp_path, precision):
    """In bf16 peft would keep a float32 copy of it, from which autocast makes bfloat16 again."""
    recipe = tiny_recipe(tmp_path, lora={"rank": 2}, training={"precision": precision})
    data = prepare_data(recipe)
    model = build_model(recipe, get_method("haf"), data.encoder, torch.device("cpu"))
    dtypes = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A["default"].register_forward_pre_hook(lambda _, x: dtypes.add(x[0].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(lay_out(data.train[:2]))
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}


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
        run_training(recipe, run)
    assert "training.precision auto: fp32 on cpu" in caplog.text
    assert load_recipe(run / "recipe.yaml").training.precision == "fp32"
    run_training(recipe, run, resume=True)
    monkeypatch.setattr(setup, "has_bfloat16", lambda _: True)
    with pytest.raises(CheckpointError, match="recipe differs"):
        run_training(recipe, run, resume=True)


def test_a_plan_for_a_gpu_is_one_in_bf16(tmp_path):
    """This machine need not have the GPU that is planned for."""
    auto, bf16, fp32 = (
        tiny_recipe(tmp_path, training={"precision": p}) for p in ("auto", "bf16", "fp32")
    )
    plans = [plan_recipe(r, resolve_method(r), memory=8.0).need for r in (auto, bf16, fp32)]
    assert plans[0] == plans[1] != plans[2]
