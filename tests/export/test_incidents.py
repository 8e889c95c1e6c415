"""What went wrong for users of other projects, each as a test: the thread stands in its docstring."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from export_faults import FAULTS, change_config
from exports_for_tests import export_both, export_with_golden
from hafrm.bulk.bulk_job import score_files
from hafrm.errors import ModelError, ServerError
from hafrm.export.checklist import verify_directory
from hafrm.export.reward_servers import Address, verify_server
from hafrm.scoring.reward_model import RewardModel
from reward_servers import serving, sglang, vllm

TURNS = [
    {"role": "user", "content": "Say sun."},
    {"role": "assistant", "content": "sun"},
    {"role": "user", "content": "Say sea."},
    {"role": "assistant", "content": "sea, sea"},
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return export_with_golden(tmp_path_factory.mktemp("good") / "reward")


@pytest.fixture
def export(good, tmp_path):
    return shutil.copytree(good, tmp_path / "reward")


def failed(folder):
    return [result.name for result in verify_directory(folder).failed]


def stock(folder, **options):
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def reward(folder, text, side="right", others=()):
    """What plain transformers gives, in a batch with `others`."""
    model, tokenizer = stock(folder)
    batch = tokenizer([text, *others], return_tensors="pt", padding=True, padding_side=side)
    return model(**batch).logits[0, 0].item()


def rendered(folder, messages=TURNS):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)


def test_pad_equal_to_eos_reads_one_token_early_and_is_refused(export):
    """huggingface/transformers#35352, RLHFlow/RLHF-Reward-Modeling#49, pytorch/rl#3887 (a pad of others).

    transformers then gives another reward without a word; the checklist finds it, and hafrm's own
    exports have another pad.
    """
    text, before = rendered(export), reward(export, rendered(export))
    FAULTS["pad is EOS"][1](export)
    assert abs(reward(export, text) - before) > 1e-3
    assert failed(export) == ["pad is not EOS"]
    FAULTS["the pad of another tokenizer"][1](export)
    assert failed(export) == ["pad is not EOS"]


def test_padding_does_not_move_a_reward(good):
    """huggingface/trl#937: padding of unequal pairs changed rewards, and accuracy stuck at chance."""
    text = rendered(good)
    alone = reward(good, text)
    long = rendered(good, [TURNS[0], {"role": "assistant", "content": "sun " * 40}])
    for side in ("left", "right"):
        assert reward(good, text, side, [long]) == pytest.approx(alone, abs=1e-5)


def test_the_reward_of_a_dialogue_is_read_at_its_last_eos(good):
    """huggingface/trl#6952, huggingface/trl#3750: read before the first pad-like token, inner turns won."""
    model, tokenizer = stock(good)
    ids = tokenizer(rendered(good), return_tensors="pt")["input_ids"]
    ends = (ids[0] == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
    assert len(ends) == 4
    with torch.no_grad():
        values = model.score(model.model(ids).last_hidden_state)[0, :, 0]
    ours = RewardModel.from_pretrained(good).score(TURNS[:3], TURNS[3]["content"])
    assert ours == pytest.approx(values[ends[-1]].item(), abs=1e-5)
    assert abs(values[ends[1]].item() - ours) > 1e-3


def test_an_eos_that_was_trained_is_also_scored(export, good):
    """huggingface/trl#5813, EleutherAI/gpt-neox#1285: trained at one token, read at another."""
    model = RewardModel.from_pretrained(good)
    encoded, _ = model.encoder.encode([group()])
    assert all(ids[-1] == model.encoder.eos_id for ids in encoded[0].response_ids)
    FAULTS["no EOS"][1](export)
    assert failed(export) == ["ends in EOS"]


def group():
    from exports_for_tests import GOLDEN_GROUP

    return GOLDEN_GROUP


def test_a_reward_model_saved_as_a_causal_lm_is_refused_and_never_scored(tmp_path):
    """allenai/reward-bench#210, modelscope/ms-swift#6129: a head newly initialised at every load."""
    export_both(tmp_path)
    with pytest.raises(ModelError, match="would be random"):
        RewardModel.from_pretrained(tmp_path / "policy")
    assert failed(tmp_path / "policy")[:1] == ["sequence classifier"]
    FAULTS["no head"][1](tmp_path / "reward")
    with pytest.raises(ModelError, match=r"score\.weight.*would be random"):
        RewardModel.from_pretrained(tmp_path / "reward")
    assert failed(tmp_path / "reward") == ["head without bias"]


def test_a_value_head_beside_a_language_model_is_no_reward_model(tmp_path):
    """hiyouga/LLaMA-Factory#7403: loaded as a classifier it got a random head of two labels."""
    export_both(tmp_path)
    policy = tmp_path / "policy"
    FAULTS["a value head beside it"][1](policy)
    random, _ = stock(policy)
    assert random.config.num_labels == 2  # what consumers would have used
    with pytest.raises(ModelError, match="would be random"):
        score_files(policy, [str(rows(tmp_path))], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert "sequence classifier" in failed(policy)


def rows(folder):
    file = folder / "in.jsonl"
    file.write_text(json.dumps({"prompt": "Say sun.", "response": "sun"}) + "\n")
    return file


def test_an_export_says_that_it_has_one_label(good, export):
    """OpenRLHF/OpenRLHF#1039, #1342: num_labels is not stored, and two labels were built on loading."""
    assert stock(good)[0].config.num_labels == 1
    change_config(export, id2label=None, label2id=None)
    assert failed(export) == ["one label"]


def test_pipelines_give_the_reward_and_no_sigmoid_of_it(good, export):
    """vllm-project/vllm#18313, #20807: one label got a softmax, later a sigmoid."""
    text = rendered(good)
    raw = pipeline("text-classification", str(good))(text)[0]["score"]
    assert raw == pytest.approx(reward(good, text), abs=1e-5)
    change_config(export, problem_type=None)
    squashed = pipeline("text-classification", str(export))(text)[0]["score"]
    assert squashed == pytest.approx(torch.sigmoid(torch.tensor(raw)).item(), abs=1e-5)
    assert failed(export) == ["raw reward"]
    with serving(
        vllm(lambda texts: [1 / (1 + 2.718281828 ** -golden(good)[t]) for t in texts])
    ) as url:
        assert "sigmoids" in verify_server(Address(url), good).suspicion


def test_a_server_that_embeds_is_told_from_one_that_rewards(good):
    """vllm-project/vllm#8967, #12791: a reward model served for another task answers a hidden state."""
    hidden = {"data": [{"index": 0, "object": "embedding", "data": [0.1] * 32}]}
    with (
        serving(lambda path, _: (200, hidden) if path == "/pooling" else (404, {})) as url,
        pytest.raises(ServerError, match="has 32 numbers, but a reward model gives one"),
    ):
        verify_server(Address(url), good)


def golden(folder):
    lines = (folder / "golden_scores.jsonl").read_text().splitlines()
    return {row["text"]: row["reward"] for row in map(json.loads, lines)}


def test_a_second_bos_is_found_before_it_moves_scores(good, export):
    """Skywork's README: strip the BOS that the template has written; allenai/reward-bench#164."""
    tokenizer = AutoTokenizer.from_pretrained(good)
    text = rendered(good)
    assert tokenizer(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    FAULTS["two BOS"][1](export)
    assert failed(export) == ["BOS once"]


def test_a_server_that_rounds_otherwise_is_measured(good):
    """sgl-project/sglang#2427: 3 in 1,000 preferences turned round against the training engine.

    A server that is 0.004 off passes its bar of 1.5e-2 and fails the one of float32, with the size told.
    """
    known = golden(good)
    with serving(sglang(lambda texts: [known[t] + 0.004 for t in texts])) as url:
        assert verify_server(Address(url), good).ok
        strict = verify_server(Address(url), good, tolerance=1e-4)
    assert not strict.ok
    assert 0.0 < strict.difference <= 0.004 + 1e-9


def test_a_head_lost_in_a_merge_is_not_made_up(export):
    """huggingface/trl#368, #398, huggingface/peft#2502, #1836; how merging is right: test_run_export.py."""
    FAULTS["no head"][1](export)
    _, info = AutoModelForSequenceClassification.from_pretrained(export, output_loading_info=True)
    assert info["missing_keys"]  # transformers makes one up and goes on
    found = verify_directory(export)
    assert [r.name for r in found.failed] == ["head without bias"]
    assert "at random" in found.failed[0].observed


def test_an_lm_head_left_in_is_found(export, tmp_path):
    """vllm-project/vllm#21176: one file with both heads; vLLM knows no module for what it does not need."""
    FAULTS["the LM head left in"][1](export)
    assert failed(export) == ["nothing left over"]
