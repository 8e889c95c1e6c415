"""Every clause of the export checklist finds its own fault and no other; a good directory passes."""

import importlib
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from hafrm.errors import DataError, ModelError
from hafrm.export.checklist import CLAUSES, verify_directory
from hafrm.results import to_plain
from support.chat_tokenizers import chat_tokenizer
from support.export_faults import FAULTS, in_config
from support.exports import GOLDEN_GROUP, export_both, record_golden, save_stock_classifier


@pytest.fixture(scope="module")
def good(exported):
    return exported / "reward"


@pytest.fixture
def export(good, tmp_path):
    """A copy of the good directory to damage."""
    return shutil.copytree(good, tmp_path / "reward")


def failed(verification):
    return [result.name for result in verification.failed]


def outcomes(verification):
    return {result.name: result.outcome for result in verification.clauses}


def test_a_good_export_passes_every_clause(good):
    verification = verify_directory(good)
    assert set(outcomes(verification).values()) == {"pass"}
    assert verification.ok
    assert [result.name for result in verification.clauses] == [clause.name for clause in CLAUSES]
    assert to_plain(verification)["clauses"][0] == {
        "name": "sequence classifier",
        "outcome": "pass",
        "observed": "architectures ['LlamaForSequenceClassification']",
        "fix": "",
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_clause_alone(export, fault):
    clause, plant = FAULTS[fault]
    plant(export)
    verification = verify_directory(export)
    assert failed(verification) == [clause]
    assert verification.failed[0].observed
    assert verification.failed[0].fix


def test_every_clause_on_files_and_text_has_a_planted_fault():
    """The three on scores that no file can break have theirs below."""
    by_hand = {"last token", "left = right padding", "batch 1 = batch N"}
    assert {clause for clause, _ in FAULTS.values()} == {c.name for c in CLAUSES} - by_hand


def early(model, rewards, ids, mask):
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return model.score(hidden)[:, -2]


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (early, "last token"),
        (lambda _model, rewards, _ids, mask: rewards + (mask[:, :1] == 0), "left = right padding"),
        (lambda _model, rewards, ids, _mask: rewards + 0.1 * (len(ids) - 1), "batch 1 = batch N"),
        (lambda _model, rewards, _ids, _mask: rewards * float("nan"), "finite scores"),
    ],
)
def test_a_class_that_scores_otherwise_is_found(good, monkeypatch, change, clause):
    """It reads one token early, looks at pads on the left or at the batch, or gives no number."""
    forward = GenericForSequenceClassification.forward

    def changed(self, input_ids=None, attention_mask=None, **rest):
        output = forward(self, input_ids=input_ids, attention_mask=attention_mask, **rest)
        output.logits = change(self, output.logits, input_ids, attention_mask)
        return output

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", changed)
    names = failed(verify_directory(good))
    assert clause in names
    assert names == [clause] or change is early  # which pads and batches move too
    assert "golden scores" not in names


def test_what_depends_on_a_failed_clause_is_not_judged_and_says_so(export):
    FAULTS["saved as a causal LM"][1](export)
    results = {result.name: result for result in verify_directory(export).clauses}
    assert results["one label"].outcome == "not applicable"
    assert results["golden scores"].observed == "not checked before this holds: sequence classifier"


def test_a_model_of_others_is_judged_without_golden_scores_or_with_a_file_of_them(tmp_path):
    """A stock classifier with a closed template, not made by hafrm; its golden file is made by hand."""
    folder, golden = tmp_path / "theirs", tmp_path / "golden.jsonl"
    template = (
        "{% for m in messages %}{{ m['role'] ~ ': ' ~ m['content'] ~ eos_token }}{% endfor %}"
    )
    stock, tokenizer = save_stock_classifier(folder, chat_tokenizer(template))
    verification = verify_directory(folder)
    assert verification.ok
    assert outcomes(verification)["golden scores"] == "not applicable"
    text = "user: Hello<|im_end|>assistant: Goodbye<|im_end|>"
    with torch.no_grad():
        reward = stock(**tokenizer(text, return_tensors="pt")).logits.item()
    golden.write_text(json.dumps({"text": text, "reward": reward}) + "\n")
    assert outcomes(verify_directory(folder, golden))["golden scores"] == "pass"
    golden.write_text(json.dumps({"text": text, "reward": reward + 0.01}) + "\n")
    assert failed(verify_directory(folder, golden)) == ["golden scores"]


def test_the_proof_loads_no_engine():
    """By what the checklist imports, and what that imports, at the top of a module or in a function."""
    names, modules = ["hafrm.export.checklist"], set()
    while names:
        modules.add(name := names.pop())
        text = Path(inspect.getsourcefile(importlib.import_module(name))).read_text("utf-8")
        names += set(re.findall(r"(?:from|import) (hafrm\.[\w.]+)", text)) - modules
    assert "hafrm.export.plain_model" in modules
    assert not {name.split(".")[1] for name in modules} & {"engine", "scoring", "data", "training"}


def test_code_of_the_directory_is_not_run(export):
    """An unknown model type with an auto_map is what transformers offers to run."""
    FAULTS["code of its own"][1](export)
    in_config(model_type="unheard-of")(export)
    assert "stock code" in failed(verify_directory(export))


def test_learned_positions_pass_with_a_word_on_left_padding(tmp_path):
    """GPT-2 counts positions from the row's start unless it is told them."""
    export_both(tmp_path, "gpt2")
    record_golden(tmp_path / "reward", GOLDEN_GROUP)
    verification = verify_directory(tmp_path / "reward")
    (result,) = [r for r in verification.clauses if r.name == "left = right padding"]
    assert verification.ok
    assert "without position_ids is off by" in result.observed


def test_without_the_model_only_files_and_text_are_judged(export):
    FAULTS["an infinite weight"][1](export)
    verification = verify_directory(export, run_model=False)
    assert verification.ok
    assert len(verification.clauses) == 14


def test_no_model_an_adapter_and_a_damaged_golden_file_are_refused(good, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        verify_directory(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter"):
        verify_directory(tmp_path)
    for text, message in (
        ("", "holds no golden scores"),
        ("[]", "line 1:"),
        ('{"text": "a", "reward": NaN}', "line 1: .*reward.* finite number"),
        ('{"reward": 1, "messages": [{"content": "a"}]}', "needs `messages`"),
    ):
        (tmp_path / "golden.jsonl").write_text(text)
        with pytest.raises(DataError, match=message):
            verify_directory(good, tmp_path / "golden.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        verify_directory(good, tmp_path / "missing.jsonl")
