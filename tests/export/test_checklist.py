"""Every clause of the export checklist finds its own fault and no other; a good directory passes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from export_faults import FAULTS, change_config
from exports_for_tests import export_with_golden
from hafrm.errors import DataError, ModelError
from hafrm.export.checklist import CLAUSES, clauses_on_disk, verify_directory
from hafrm.results import to_plain
from tokenizers_for_tests import chat_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return export_with_golden(tmp_path_factory.mktemp("good") / "reward")


@pytest.fixture
def export(good, tmp_path):
    """A copy of the good directory to damage."""
    return shutil.copytree(good, tmp_path / "reward")


def failed(found):
    return [result.name for result in found.failed]


def outcomes(found):
    return {result.name: result.outcome for result in found.clauses}


def test_a_good_export_passes_every_clause(good):
    found = verify_directory(good)
    assert set(outcomes(found).values()) == {"pass"}
    assert found.ok
    assert [result.name for result in found.clauses] == [clause.name for clause in CLAUSES]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_clause_alone(export, fault):
    clause, plant = FAULTS[fault]
    plant(export)
    found = verify_directory(export)
    assert failed(found) == [clause]
    (result,) = found.failed
    assert result.observed
    assert result.fix


def test_every_clause_on_files_and_text_has_a_planted_fault():
    """The three on scores that no file can break have theirs below."""
    by_hand = {"last token", "left = right padding", "batch 1 = batch N"}
    assert {clause for clause, _ in FAULTS.values()} == {c.name for c in CLAUSES} - by_hand


def patched(monkeypatch, change):
    """Rewards as `change(model, rewards, ids, mask)` makes them, whoever asks for them."""
    forward = GenericForSequenceClassification.forward

    def changed(self, input_ids=None, attention_mask=None, **rest):
        output = forward(self, input_ids=input_ids, attention_mask=attention_mask, **rest)
        output.logits = change(self, output.logits, input_ids, attention_mask)
        return output

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", changed)


def test_a_class_that_reads_one_token_early_is_found(export, monkeypatch):
    def early(model, rewards, ids, mask):
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return model.score(hidden)[:, -2]

    patched(monkeypatch, early)
    assert "last token" in failed(verify_directory(export))
    assert "golden scores" not in failed(verify_directory(export))


def test_a_model_that_looks_at_pads_on_the_left_is_found(export, monkeypatch):
    def with_pads(model, rewards, ids, mask):
        return rewards + (mask[:, :1] == 0)

    patched(monkeypatch, with_pads)
    assert failed(verify_directory(export)) == ["left = right padding"]


def test_a_score_that_depends_on_its_company_is_found(export, monkeypatch):
    def crowded(model, rewards, ids, mask):
        return rewards + 0.1 * (len(ids) - 1)

    patched(monkeypatch, crowded)
    assert failed(verify_directory(export)) == ["batch 1 = batch N"]


def test_a_reward_that_is_no_number_never_passes(export, monkeypatch):
    def broken(model, rewards, ids, mask):
        return rewards * float("nan")

    patched(monkeypatch, broken)
    assert failed(verify_directory(export)) == ["finite scores"]


def test_what_depends_on_a_failed_clause_is_not_judged_and_says_so(export):
    FAULTS["saved as a causal LM"][1](export)
    results = {result.name: result for result in verify_directory(export).clauses}
    assert results["one label"].outcome == "not applicable"
    assert results["golden scores"].observed == "not checked before this holds: no fresh weights"


def test_a_model_of_others_is_judged_without_golden_scores_or_with_a_file_of_them(tmp_path):
    """A stock classifier with a closed template, not made by hafrm; its golden file is made by hand."""
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m['role'] ~ ': ' ~ m['content'] ~ eos_token }}{% endfor %}"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=2,
        num_labels=1,
        problem_type="regression",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    stock = LlamaForSequenceClassification(config).eval()
    stock.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    found = verify_directory(tmp_path / "theirs")
    assert found.ok
    assert outcomes(found)["golden scores"] == "not applicable"
    text = "user: Hello<|im_end|>assistant: Goodbye<|im_end|>"
    with torch.no_grad():
        reward = stock(**tokenizer(text, return_tensors="pt")).logits.item()
    golden = tmp_path / "golden.jsonl"
    golden.write_text(json.dumps({"text": text, "reward": reward}) + "\n")
    assert outcomes(verify_directory(tmp_path / "theirs", golden))["golden scores"] == "pass"
    golden.write_text(json.dumps({"text": text, "reward": reward + 0.01}) + "\n")
    assert failed(verify_directory(tmp_path / "theirs", golden)) == ["golden scores"]


def test_the_proof_in_a_fresh_process_does_not_load_the_engine():
    code = (
        "import sys, hafrm.export.checklist;"
        "print([m for m in sys.modules if m.startswith(('hafrm.engine', 'hafrm.scoring'))])"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_code_of_the_directory_is_not_run(export):
    """An unknown model type with an auto_map is what transformers offers to run."""
    FAULTS["code of its own"][1](export)
    change_config(export, model_type="unheard-of")
    assert "stock code" in failed(verify_directory(export))


def test_learned_positions_pass_with_a_word_on_left_padding(tmp_path):
    """GPT-2 counts positions from the row's start unless it is told them."""
    found = verify_directory(export_with_golden(tmp_path / "gpt2", "gpt2"))
    (result,) = [r for r in found.clauses if r.name == "left = right padding"]
    assert found.ok
    assert "without position_ids is off by" in result.observed


def test_without_the_model_only_files_and_text_are_judged(export):
    FAULTS["an infinite weight"][1](export)
    found = verify_directory(export, run_model=False)
    assert found.ok
    assert len(found.clauses) == len(clauses_on_disk()) == 15


def test_no_model_an_adapter_and_a_damaged_golden_file_are_refused(good, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        verify_directory(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter"):
        verify_directory(tmp_path)
    for text, said in (
        ("", "holds no golden scores"),
        ("{", "line 1: not JSON"),
        ("[]", "not a JSON object"),
        ('{"text": "a", "reward": NaN}', "finite number"),
        ('{"reward": 1}', "needs `messages`"),
    ):
        (tmp_path / "golden.jsonl").write_text(text)
        with pytest.raises(DataError, match=said):
            verify_directory(good, tmp_path / "golden.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        verify_directory(good, tmp_path / "missing.jsonl")


def test_the_verdict_is_ready_for_json(good):
    told = to_plain(verify_directory(good, run_model=False))
    assert told["ok"] is True
    assert told["clauses"][0] == {
        "name": "sequence classifier",
        "outcome": "pass",
        "observed": "architectures ['LlamaForSequenceClassification']",
        "fix": "",
    }
