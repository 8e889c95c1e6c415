"""A reward model in use: scores follow the response, not its company."""

import shutil

import jaxtyping
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hafrm.data.encoding import Encoder
from hafrm.errors import ConfigError, DataError, ModelError
from hafrm.export.stock_export import export_reward
from hafrm.preferences import Group, Message, TokenizedGroup
from hafrm.results import write_result
from hafrm.scoring import reward_model
from hafrm.scoring.loading import Heads, Placement, choose_dtype, find_heads
from hafrm.scoring.reward_model import IMPLICIT_RULE, ImplicitRule, PolicyModel, RewardModel
from support.exports import hybrid_with_encoder, save_stock_classifier

PROMPT = "How do I bake bread?"
RESPONSES = ["Mix flour and water.", "No.", "I think that it is a good idea."]


@pytest.fixture(scope="module")
def rm(exported):
    return RewardModel.from_pretrained(exported / "reward")


def test_alone_together_repeated_and_in_any_order_a_response_scores_the_same(rm):
    together = rm.score(PROMPT, RESPONSES)
    assert [rm.score(PROMPT, r) for r in RESPONSES] == pytest.approx(together, abs=1e-5)
    assert rm.score(PROMPT, RESPONSES[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    assert rm.score([{"role": "user", "content": PROMPT}], RESPONSES) == together
    assert rm.score(PROMPT, []) == []
    batch = rm.score_batch([PROMPT, "Say sun.", PROMPT], [RESPONSES[:2], [], ["No.", "No."]])
    assert [len(scores) for scores in batch] == [2, 0, 2]
    assert batch[0] + batch[2] == pytest.approx([*together[:2], together[1], together[1]], abs=1e-5)


def test_a_text_in_the_place_of_a_list_of_responses_is_refused(rm):
    """Or its letters would be the responses."""
    with pytest.raises(DataError, match="list of texts"):
        rm.score_batch(["a", "b"], ["abc", "xyz"])
    with pytest.raises(DataError, match="list of responses"):
        rm.best_of(PROMPT, "abc")


@pytest.mark.parametrize("bad", [None, 3, {"role": "user"}, b"x", [3], [None]])
def test_what_is_no_list_of_texts_or_no_prompt_is_refused(rm, bad, monkeypatch):
    """Outside tests nothing checks the types of arguments."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for call in (
        lambda: rm.score("Say sun.", bad),
        lambda: rm.score(bad, ["sun"]),
        lambda: rm.best_of("Say sun.", bad),
        lambda: rm.score_batch(["Say sun."], [["sun"], ["sea"]]),
        lambda: rm.score_batch("Say sun.", [["sun"]] * 8),
    ):
        with pytest.raises(DataError):
            call()


def test_arrays_and_generators_of_texts_score_as_lists(rm, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    expected = rm.score("Say sun.", ["sun", "sea"])
    assert rm.score("Say sun.", np.array(["sun", "sea"])) == expected
    assert rm.score_batch(iter(["Say sun."]), iter([iter(["sun", "sea"])])) == [expected]
    for number in (-5, 1.5, "5"):
        with pytest.raises(ConfigError, match="max_tokens must be a whole number above 0"):
            RewardModel(rm.model, rm.encoder, max_tokens=number)
    with pytest.raises(ConfigError, match="too_long must be cut or drop, got 'zz'"):
        Encoder(rm.encoder.tokenizer, max_length=64, too_long="zz")
    assert isinstance(rm.score("hi", ""), float)  # a turn that ends at once, as a policy may write
    with pytest.raises(ModelError, match="got None"):
        RewardModel.from_pretrained(None)


def test_a_run_folder_its_model_folder_and_the_directory_load_the_same_model(exported, tmp_path):
    (tmp_path / "model").symlink_to(exported)
    expected = RewardModel.from_pretrained(exported / "reward").score(PROMPT, "No.")
    assert find_heads(tmp_path) == Heads(tmp_path / "model/reward", tmp_path / "model/policy")
    assert find_heads(exported / "policy") == Heads(None, exported / "policy")
    with pytest.raises(ModelError, match="holds no model"):
        find_heads(tmp_path.parent)
    for path in (tmp_path, tmp_path / "model"):
        assert RewardModel.from_pretrained(path).score(PROMPT, "No.") == expected
        assert PolicyModel.from_pretrained(path).score(PROMPT, "No.") < 0


def test_the_probability_is_the_sigmoid_of_the_difference_and_best_of_the_argmax(rm):
    rewards = rm.score(PROMPT, RESPONSES)
    expected = torch.sigmoid(torch.tensor(rewards[0] - rewards[1])).item()
    assert rm.probability(PROMPT, RESPONSES[0], RESPONSES[1]) == pytest.approx(expected, abs=1e-6)
    best = rm.best_of(PROMPT, RESPONSES)
    assert best.response == RESPONSES[rewards.index(max(rewards))]
    with pytest.raises(DataError, match="one or more"):
        rm.best_of(PROMPT, [])


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ([], "No."),
        ([{"role": "user"}], "No."),
        ([{"role": "assistant", "content": "x"}], "No."),
        (PROMPT, "\ud800"),
        (PROMPT, "word " * 300),
    ],
)
def test_what_is_no_conversation_or_too_long_is_refused(rm, prompt, response):
    with pytest.raises(DataError):
        rm.score(prompt, response)


def test_a_causal_lm_and_a_two_label_classifier_are_refused(exported, tmp_path):
    with pytest.raises(ModelError, match=r"score\.weight.*which a LlamaForSequence"):
        RewardModel.from_pretrained(exported / "policy")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, num_hidden_layers=1, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="2 labels"):
        RewardModel.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="nowhere does not exist"):
        RewardModel.from_pretrained(tmp_path / "nowhere")


def test_a_reward_model_of_others_gets_the_score_that_transformers_gives_it(tmp_path):
    """Their template writes a line break after its EOS; read literally, as its consumers do."""
    stock, tokenizer = save_stock_classifier(tmp_path)
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "No."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    with torch.no_grad():
        expected = stock(**tokenizer(text, return_tensors="pt")).logits.item()
    ours = RewardModel.from_pretrained(tmp_path).score(PROMPT, "No.")
    assert ours == pytest.approx(expected, abs=1e-5)


def test_the_implicit_reward_is_beta_times_the_log_ratio(exported, tmp_path):
    """Against the policy itself as reference it is zero; without one it is the mean log-prob."""
    policy = shutil.copytree(exported / "policy", tmp_path / "policy")

    def scores(rule):
        write_result(policy / IMPLICIT_RULE, rule)
        return PolicyModel.from_pretrained(policy).score(PROMPT, RESPONSES)

    foreign = PolicyModel.from_pretrained(policy).score(PROMPT, RESPONSES)
    assert all(score < 0 for score in foreign)
    assert scores(ImplicitRule(reference=str(policy), beta=0.1)) == [0.0] * 3
    twice = scores(ImplicitRule(reference=None, beta=2.0, per_token=True))
    assert twice == pytest.approx([2 * score for score in foreign], rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    encoder = PolicyModel.from_pretrained(policy).encoder
    (group,), _ = encoder.encode([Group("1", (Message("user", PROMPT),), (RESPONSES[0],), ())])
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, group.response_ids[0]]).astype(int))
    with torch.no_grad():
        logits = (
            model(ids[None]).logits[0, :-1].gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :]
        )
    raw = scores(ImplicitRule(reference=None, logits=True))[0]
    assert raw == pytest.approx(logits.sum().item(), abs=1e-4)
    with pytest.raises(ModelError, match="reference= with its current path"):
        scores(ImplicitRule(reference=str(tmp_path / "gone")))


def test_a_response_of_pads_alone_is_read_at_the_prompts_last_token_as_the_classifier_does(
    exported, tmp_path
):
    """Where pad is the EOS and the template writes nothing before an answer, a policy may end at once."""
    folder = shutil.copytree(exported / "reward", tmp_path / "reward")
    rm = RewardModel.from_pretrained(folder)
    rm.model.backbone.config.pad_token_id = rm.encoder.eos_id
    eos = rm.encoder.eos_id
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    stock.config.pad_token_id = eos
    responses = tuple(np.array(ids, np.int32) for ids in ([eos], [8, eos], [eos, 9, eos]))
    for prompt in ([5, 6, 7], [5, 6, eos]):  # a template may close every turn with it
        ids = np.array(prompt, np.int32)
        scores = rm.score_encoded([TokenizedGroup(ids, responses)])
        for score, own in zip(scores, responses, strict=True):
            with torch.no_grad():
                expected = stock(torch.from_numpy(np.concatenate([ids, own]))[None].long()).logits
            assert score == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(DataError, match="nothing but pad"):
        rm.score_encoded([TokenizedGroup(np.array([5, eos], np.int32), responses)])


def test_a_reference_on_the_hub_is_read_at_the_revision_that_training_began_with(
    exported, tmp_path, monkeypatch
):
    """Else a Pythia step, or a repository that moved, would be compared with today's main."""
    policy, asked = shutil.copytree(exported / "policy", tmp_path / "policy"), []
    write_result(policy / IMPLICIT_RULE, ImplicitRule("org/base", revision="step10"))
    real = reward_model.load_policy

    def load(path, *, revision=None, **options):
        asked.append((str(path), revision))
        return real(policy, **options)

    monkeypatch.setattr(reward_model, "load_policy", load)
    PolicyModel.from_pretrained(policy)
    PolicyModel.from_pretrained(policy, reference="copy/of-it")
    own = str(policy), None
    assert asked == [own, ("org/base", "step10"), own, ("copy/of-it", None)]


def test_auto_is_float32_on_a_cpu_and_the_stored_dtype_on_a_gpu_which_the_log_says(
    exported, tmp_path, monkeypatch, caplog
):
    half, single = tmp_path / "half", exported / "reward"
    model, encoder = hybrid_with_encoder()
    export_reward(model, encoder, half, dtype=torch.bfloat16)
    assert RewardModel.from_pretrained(half).model.backbone.dtype == torch.float32
    named = RewardModel.from_pretrained(single, dtype="bfloat16", device="cpu")
    assert named.model.backbone.dtype == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    with caplog.at_level("INFO", "hafrm"):
        assert choose_dtype(single, "auto", None) == torch.float32
        assert caplog.text == ""
        assert choose_dtype(half, "auto", None) == torch.bfloat16
    assert "in torch.bfloat16, as it is stored" in caplog.text
    assert choose_dtype(half, "auto", "cpu") == torch.float32
    assert choose_dtype(half, "float32", "cuda:1") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert choose_dtype(half, "auto", None) == torch.float32


@pytest.mark.parametrize(
    ("dtype", "device"), [("int8", None), ("auto", "gpu"), ("auto", "cuda:99")]
)
def test_a_placement_that_there_is_not_is_refused(dtype, device):
    with pytest.raises(ConfigError, match=r"must be|sees"):
        Placement(dtype, device)
