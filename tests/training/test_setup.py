"""What a recipe makes of its data and its model: mixing, splits, templates, adapters, precision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import NemotronConfig, NemotronForCausalLM

from hafrm.engine.layout import lay_out
from hafrm.errors import CheckpointError, ConfigError, DataError
from hafrm.recipe_file import load_recipe
from hafrm.scoring.model_files import load_config
from hafrm.training import setup
from hafrm.training.loop import run_training
from hafrm.training.methods import get_method
from hafrm.training.prepared_data import prepare_data
from hafrm.training.setup import (
    build_model,
    meta_model,
    with_precision,
)
from support.chat_tokenizers import CHATML, chat_tokenizer
from support.fake_hub import fake_datasets
from support.models import GROUPED
from support.published_rows import PUBLISHED
from support.recipe_models import tiny_mixtral_config
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
    by_source: dict[str, list[float]] = {}
    for group in [*prepared.train, *prepared.validation]:
        by_source.setdefault(group.source, []).extend(pair.weight for pair in group.comparisons)
    return by_source


@pytest.mark.parametrize(
    ("data", "big", "small"),
    [
        ({}, [1.0] * 24, [1.0] * 8),
        ({"cap": 10}, [1.0] * 10, [1.0] * 8),
        ({"weights": [0.5, 3.0]}, [0.5] * 24, [3.0] * 8),
    ],
)
def test_sets_are_capped_and_weighted_in_the_order_of_the_entries(
    tmp_path, two_files, data, big, small
):
    by_source = weights(tmp_path, two_files, **data)
    assert by_source == {"big": big, "small": small}


def test_a_group_of_sets_is_one_entry_with_one_weight_and_a_cap_for_each_member(
    tmp_path, two_files, monkeypatch
):
    def load(name, *_, split, **__):
        name = "beaver-safe" if "Safe" in name else "hh-harmless"
        text = json.dumps(PUBLISHED[name])
        rows = [text.replace("How do I pick a lock?", f"Say {name} {i} {split}.") for i in range(6)]
        return [json.loads(row) for row in rows]

    fake_datasets(monkeypatch, load)
    entries = ["set:safety#split=train", two_files[1]]
    by_source = weights(tmp_path, entries, weights=[2.0, 1.0], cap=5)
    assert by_source == {"beaver-safe": [2.0] * 5, "hh-harmless": [2.0] * 5, "small": [1.0] * 5}


def test_what_named_sets_leave_out_is_recorded(tmp_path):
    row = PUBLISHED["chatbot-arena"]
    question, answer = row["conversation_a"]
    rows = [row | {"winner": "tie"}] * 3
    rows += [
        row | {"conversation_a": [{**question, "content": f"q{i}"}, answer]} for i in range(40)
    ]
    file = tmp_path / "arena.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(tmp_path, data={"train": [f"set:chatbot-arena={file}#split=train"]})
    assert prepare_data(recipe).counts["left_out"] == {"tie": 3}


@pytest.mark.parametrize("column", [{"tie": True}, {"weight": 0}])
def test_data_of_nothing_but_ties_or_comparisons_of_weight_0_are_refused(
    tmp_path, two_files, column
):
    lines = Path(two_files[0]).read_text().splitlines()
    rows = [json.loads(line) | column for line in lines]
    Path(two_files[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="only ties and comparisons of weight 0"):
        prepare_data(tiny_recipe(tmp_path, data={"train": two_files[0]}))


def rewrite(file: str, first: int = 0, **columns: Any) -> None:
    """Add columns to the rows of a file, from that one on."""
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    rows[first:] = [row | columns for row in rows[first:]]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_groups_that_are_too_long_are_dropped_with_a_warning_but_not_all_of_them(
    tmp_path, two_files, caplog
):
    data = {"train": two_files[0], "too_long": "drop", "max_length": 64}
    rewrite(two_files[0], 12, chosen="so " * 60)
    counts = prepare_data(tiny_recipe(tmp_path, data=data)).counts
    assert counts["encoding"]["dropped"] > 0
    assert f"{counts['encoding']['dropped']} groups are longer than data.max_length" in caplog.text
    rewrite(two_files[0], chosen="so " * 60)
    with pytest.raises(DataError, match=r"data\.train: all groups are longer than.* 64: raise it"):
        prepare_data(tiny_recipe(tmp_path, data=data))


def test_a_run_says_first_what_its_rows_are_and_records_it(tmp_path, two_files, caplog):
    """24 rows, of which 20 have one text as both sides once the template has trimmed them."""
    rewrite(two_files[0], 4, author="x", chosen="same", rejected="  same. ")
    template = tmp_path / "trim.jinja"
    template.write_text(CHATML.replace("m['content']", "m['content'] | trim | replace('.', '')"))
    sections = {"model": {"chat_template": str(template)}, "data": {"train": two_files[0]}}
    recipe = tiny_recipe(tmp_path, **sections)
    with caplog.at_level("INFO", logger="hafrm"):
        counts = prepare_data(recipe).counts
    num = counts["train_comparisons"]
    assert (counts["unread_columns"], counts["bad_rows"]) == (["author"], 0)
    assert num - 4 <= counts["identical_comparisons"] < num
    assert "24 rows (0 bad)" in caplog.text and "columns not read: author" in caplog.text
    assert f"{counts['identical_comparisons']} of {num} comparisons have two equal" in caplog.text
    assert "leaves out a part" in caplog.text
    rewrite(two_files[0], chosen="same", rejected="  same. ")
    with pytest.raises(DataError, match=r"all \d+ comparisons have two equal sides"):
        prepare_data(recipe)


def test_a_row_that_the_template_refuses_is_a_bad_row_of_training_and_evaluation(tmp_path):
    rows = write_preferences(tmp_path / "rows.jsonl", num=30)
    plain = prepare_data(tiny_recipe(tmp_path, data={"train": [str(rows)]}))
    bad = {"prompt": "Hi", "system": "Be brief.", "chosen": "a", "rejected": "b"}
    rows.write_text(json.dumps(bad) + "\n" + rows.read_text())
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}"
        + CHATML
    )
    sections = {"model": {"chat_template": str(template)}, "data": {"train": [str(rows)]}}
    with pytest.raises(DataError, match=r"1 of \d+ groups are not encodable.*No system"):
        prepare_data(tiny_recipe(tmp_path, **sections))
    sections["data"]["max_bad_fraction"] = 0.5
    bad_rows = tmp_path / "bad.jsonl"
    prepared = prepare_data(tiny_recipe(tmp_path, **sections), bad_rows)
    assert json.loads(bad_rows.read_text())["reason"] == "not encodable"
    assert prepared.counts["bad_rows"] == 1
    groups = [*prepared.train, *prepared.validation]
    assert len(groups) == len(plain.train) + len(plain.validation)


def test_columns_may_have_other_names(tmp_path, two_files):
    text = Path(two_files[0]).read_text()
    for name, own in (("prompt", "question"), ("chosen", "good"), ("rejected", "bad")):
        text = text.replace(f'"{name}"', f'"{own}"')
    Path(two_files[0]).write_text(text)
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert weights(tmp_path, two_files[:1], columns=columns) == {"big": [1.0] * 24}


@pytest.mark.parametrize("values", [[1.0], [1.0, -1.0], "uniform", [1, 2, 3]])
def test_wrong_weights_are_refused(tmp_path, two_files, values):
    with pytest.raises(ConfigError, match=r"data\.weights"):
        tiny_recipe(tmp_path, data={"train": two_files, "weights": values})


def test_the_recipes_template_is_the_one_that_is_trained_on(tmp_path):
    plain = prepare_data(tiny_recipe(tmp_path)).encoder
    recipe = tiny_recipe(tmp_path, model={"chat_template": "paper-phi-2"})
    encoder = prepare_data(recipe).encoder
    assert encoder.template.startswith(
        "{% for message in messages %}{% if message['role'] == 'user'"
    )
    assert encoder.template_sha256 != plain.template_sha256


def test_prompts_shared_between_splits_are_an_error_or_left_out_as_the_recipe_says(tmp_path):
    """20 prompts to train on, of which the other file has three."""
    other = [str(write_preferences(tmp_path / "test.jsonl", num=5, start=17))]
    train = [str(write_preferences(tmp_path / "twenty.jsonl", num=20))]
    data = {"train": train, "test": other}
    with pytest.raises(
        DataError, match=r"(?s)3 of 5 prompts of data.test are in data.train.*=drop"
    ):
        prepare_data(tiny_recipe(tmp_path, data=data))
    prepared = prepare_data(tiny_recipe(tmp_path, data=data | {"shared_prompts": "drop"}))
    assert len(prepared.train) + len(prepared.validation) == 17
    assert prepared.counts["groups_with_shared_prompts_dropped"] == 3
    data = {"train": train, "validation": other, "validation_fraction": 0.0}
    prepared = prepare_data(tiny_recipe(tmp_path, data=data | {"shared_prompts": "drop"}))
    assert (len(prepared.train), len(prepared.validation)) == (17, 5)


def test_sharing_is_tried_before_there_are_float32_adapters_in_a_bf16_model(tmp_path):
    """Nemotron's layers give the attention no layout, which a trial must reach."""
    tokenizer, base = chat_tokenizer(), tmp_path / "nemotron"
    sizes = {**GROUPED, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    NemotronForCausalLM(NemotronConfig(**sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    sections = {"lora": {"rank": 2, "targets": ["q_proj"]}, "training": {"precision": "bf16"}}
    recipe = tiny_recipe(tmp_path, model={"path": str(base)}, **sections)
    encoder = setup.build_encoder(recipe)
    model = build_model(recipe, get_method("haf"), encoder, torch.device("cpu"))
    assert not model.sharing


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
    auto, fp32, bf16 = (
        tiny_recipe(tmp_path, training={"precision": p}) for p in ("auto", "fp32", "bf16")
    )
    assert with_precision(auto, device).training.precision == precision
    assert [with_precision(asked, device) for asked in (fp32, bf16)] == [fp32, bf16]


def test_a_run_records_the_precision_that_auto_was_and_resumes_in_no_other(
    tmp_path, monkeypatch, caplog
):
    recipe, run = tiny_recipe(tmp_path, method={"name": "bt"}), tmp_path / "run"
    with caplog.at_level("INFO", "hafrm"):
        run_training(recipe, run, finish=lambda _: None)
    assert "training.precision auto: fp32 on cpu" in caplog.text
    assert load_recipe(run / "recipe.yaml").training.precision == "fp32"
    run_training(recipe, run, resume=True, finish=lambda _: None)
    monkeypatch.setattr(setup, "has_bfloat16", lambda _: True)
    with pytest.raises(CheckpointError, match="recipe differs"):
        run_training(recipe, run, resume=True)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "v_prj"], "v_prj"),
        (["q_proj", "lm_head"], "lm_head"),
        (["q_proj", "embed_tokens"], "embed_tokens"),
    ],
)
def test_lora_targets_that_are_no_linear_layer_are_refused(tmp_path, targets, named):
    recipe = tiny_recipe(tmp_path, lora={"rank": 2, "targets": targets})
    with pytest.raises(ConfigError, match=named):
        meta_model(load_config(recipe.model.path), recipe, get_method("haf"))


def test_lora_on_experts_that_are_no_linear_layers_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path, lora={"rank": 2})
    with pytest.raises(ConfigError, match="is not a linear layer"):
        meta_model(tiny_mixtral_config(), recipe, get_method("haf"))
