"""Exported directories are what stock transformers makes of them: the same scores, nothing left over."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from exports_for_tests import export_both, hybrid_with_encoder
from hafrm.engine.layout import lay_out
from hafrm.errors import ModelError
from hafrm.export.checklist import replay_directory
from hafrm.export.proof import write_golden
from hafrm.export.stock_export import StockWeights, export_reward
from hafrm.preferences import Group, Message
from hafrm.scoring.reward_model import RewardModel
from models_for_tests import FAMILIES

PROMPT = (Message("user", "How do I bake bread?"),)
RESPONSES = ("Mix flour and water, then wait.", "No.", "I think that it is a good idea to ask.")
GROUP = Group("g", PROMPT, RESPONSES)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in ("granite", "cohere", "gemma3")]
)
def test_stock_classes_load_an_export_and_give_our_numbers(tmp_path, family):
    """Rewards and log-probs within 1e-5 (relative to max(1, |value|)), one at a time and padded."""
    model, encoder = export_both(tmp_path, family)
    (ids,), _ = encoder.encode([GROUP])
    ours = model(lay_out([ids]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    stock, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert stock.config.num_labels == 1
    assert stock.config.problem_type == "regression"
    assert stock.config.get_text_config().pad_token_id not in (None, tokenizer.eos_token_id)
    policy, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "policy", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    start = len(ids.prompt_ids)
    for k, response in enumerate(RESPONSES):
        messages = [m._asdict() for m in (*PROMPT, Message("assistant", response))]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        row = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            reward = stock(row).logits[0, 0]
            logps = policy(row).logits[0].log_softmax(-1)[start - 1 : -1]
        logp = logps.gather(1, row[0, start:, None]).sum()
        assert torch.allclose(ours.rewards[k], reward, atol=1e-5, rtol=1e-5)
        assert torch.allclose(ours.logps[k], logp, atol=1e-5, rtol=1e-5)


def test_the_pipeline_returns_the_reward_itself_and_no_sigmoid_of_it(tmp_path):
    _, encoder = export_both(tmp_path)
    text = encoder.render(PROMPT, RESPONSES[0])
    ours = RewardModel.from_pretrained(tmp_path / "reward").score(
        "How do I bake bread?", RESPONSES[0]
    )
    (found,) = pipeline("text-classification", str(tmp_path / "reward"))(text)
    assert found["score"] == pytest.approx(ours, abs=1e-5)


def test_a_directory_holds_safetensors_json_and_templates_only(tmp_path):
    export_both(tmp_path)
    suffixes = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja"}


def test_nothing_is_left_when_writing_fails_midway(tmp_path, monkeypatch):
    model, encoder = hybrid_with_encoder()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(encoder, "export_tokenizer", fail)
    from hafrm.export.stock_export import gather_weights

    with pytest.raises(OSError, match="disk full"):
        export_reward(gather_weights(model), encoder, tmp_path / "reward")
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_not_there_cannot_be_exported(tmp_path):
    model, encoder = hybrid_with_encoder()
    weights = StockWeights(model.backbone.config, {}, {}, {})
    with pytest.raises(ModelError, match="no reward head"):
        export_reward(weights, encoder, tmp_path / "reward")


def planted(folder, fault):
    """One fault of the export checklist, planted into a good directory."""
    config = json.loads((folder / "config.json").read_text())
    if fault == "two labels":
        config |= {"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}}
    elif fault == "sigmoid":
        del config["problem_type"]
    elif fault == "pad is eos":
        config["pad_token_id"] = config["eos_token_id"]
    elif fault == "no eos":
        template = folder / "chat_template.jinja"
        template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    elif fault == "other weights":
        golden = folder / "golden_scores.jsonl"
        rows = [json.loads(line) for line in golden.read_text().splitlines()]
        golden.write_text("".join(json.dumps(r | {"reward": r["reward"] + 1}) + "\n" for r in rows))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "fault", ["two labels", "sigmoid", "pad is eos", "no eos", "other weights"]
)
def test_the_golden_replay_finds_a_planted_fault(tmp_path, fault):
    export_both(tmp_path)
    folder = tmp_path / "reward"
    assert write_golden(folder, [GROUP]) == 5
    good = replay_directory(folder)
    assert not good.faults
    assert max(good.differences.values()) < 1e-5
    planted(folder, fault)
    replay = replay_directory(folder)
    assert replay.faults or max(replay.differences.values()) > 1e-3
