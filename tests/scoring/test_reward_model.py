"""A reward model in use: scores follow the response, not its company."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from hafrm.errors import ConfigError, DataError, ModelError
from hafrm.export.stock_export import export_reward, gather_weights
from hafrm.scoring.loading import Placement, choose_dtype
from hafrm.scoring.reward_model import ImplicitRule, PolicyModel, RewardModel, write_implicit_rule
from support.chat_tokenizers import chat_tokenizer
from support.exports import hybrid_with_encoder

PROMPT = "How do I bake bread?"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
RESPONSES = ["Mix flour and water.", "No.", "I think that it is a good idea."]


@pytest.fixture(scope="module")
def rm(exported):
    return RewardModel.from_pretrained(exported / "reward")


def test_alone_together_repeated_and_in_any_order_a_response_scores_the_same(rm):
    together = rm.score(PROMPT, RESPONSES)
    assert [rm.score(PROMPT, r) for r in RESPONSES] == pytest.approx(together, abs=1e-5)
    assert rm.score(PROMPT, RESPONSES[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    assert rm.score(PROMPT, ["No.", "No."]) == pytest.approx([together[1]] * 2, abs=1e-5)
    assert rm.score(PROMPT, []) == []
    batch = rm.score_batch([PROMPT, "Say sun.", PROMPT], [RESPONSES[:2], [], ["No.", "No."]])
    assert [len(scores) for scores in batch] == [2, 0, 2]
    assert batch[0] + batch[2] == pytest.approx([*together[:2], together[1], together[1]], abs=1e-5)


def test_a_run_folder_its_model_folder_and_the_directory_load_the_same_model(exported, tmp_path):
    (tmp_path / "model").symlink_to(exported)
    expected = RewardModel.from_pretrained(exported / "reward").score(PROMPT, "No.")
    for path in (tmp_path, tmp_path / "model"):
        assert RewardModel.from_pretrained(path).score(PROMPT, "No.") == expected
        assert PolicyModel.from_pretrained(path).score(PROMPT, "No.") < 0


def test_a_text_prompt_is_a_user_message(rm):
    as_messages = [{"role": "user", "content": PROMPT}]
    assert rm.score(PROMPT, "No.") == rm.score(as_messages, "No.")


def test_the_probability_is_the_sigmoid_of_the_difference_and_best_of_the_argmax(rm):
    rewards = rm.score(PROMPT, RESPONSES)
    expected = torch.sigmoid(torch.tensor(rewards[0] - rewards[1])).item()
    assert rm.probability(PROMPT, RESPONSES[0], RESPONSES[1]) == pytest.approx(expected, abs=1e-6)
    best = rm.best_of(PROMPT, RESPONSES)
    assert best.response == RESPONSES[rewards.index(max(rewards))]
    with pytest.raises(DataError, match="one or more"):
        rm.best_of(PROMPT, [])


@pytest.mark.parametrize(
    "prompt", [[], [{"role": "user"}], [{"role": "assistant", "content": "x"}], 3]
)
def test_a_prompt_that_is_no_conversation_is_refused(rm, prompt):
    with pytest.raises((DataError, TypeError)):
        rm.score(prompt, "No.")


def test_what_does_not_fit_is_refused_and_not_cut_in_silence(rm):
    with pytest.raises(DataError, match="longer than 128 tokens"):
        rm.score(PROMPT, "word " * 300)


def test_a_causal_lm_and_a_two_label_classifier_are_refused(exported, tmp_path):
    with pytest.raises(ModelError, match="would be random"):
        RewardModel.from_pretrained(exported / "policy")
    LlamaForSequenceClassification(LlamaConfig(vocab_size=400, **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="2 labels"):
        RewardModel.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load"):
        RewardModel.from_pretrained(tmp_path / "nowhere")


def test_a_reward_model_of_others_gets_the_score_that_transformers_gives_it(tmp_path):
    """Their template writes a line break after its EOS; read literally, as its consumers do."""
    tokenizer = chat_tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(num_labels=1, **ids, **SIZES)
    torch.manual_seed(0)
    stock = LlamaForSequenceClassification(config).eval()
    stock.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "No."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    with torch.no_grad():
        expected = stock(**tokenizer(text, return_tensors="pt")).logits.item()
    ours = RewardModel.from_pretrained(tmp_path).score(PROMPT, "No.")
    assert ours == pytest.approx(expected, abs=1e-5)


def test_the_implicit_reward_is_beta_times_the_log_ratio(exported, tmp_path):
    """Against the policy itself as reference it is zero; without one it is the mean log-prob."""
    policy = shutil.copytree(exported / "policy", tmp_path / "policy")
    foreign = PolicyModel.from_pretrained(policy).score(PROMPT, RESPONSES)
    assert all(score < 0 for score in foreign)
    write_implicit_rule(policy, ImplicitRule(reference=str(policy), beta=0.1))
    assert PolicyModel.from_pretrained(policy).score(PROMPT, RESPONSES) == [0.0] * 3
    write_implicit_rule(policy, ImplicitRule(reference=None, beta=2.0, per_token=True))
    twice = PolicyModel.from_pretrained(policy).score(PROMPT, RESPONSES)
    assert twice == pytest.approx([2 * score for score in foreign], rel=1e-5)
    write_implicit_rule(policy, ImplicitRule(reference=str(tmp_path / "gone")))
    with pytest.raises(ModelError, match="reference= with its present place"):
        PolicyModel.from_pretrained(policy)


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
