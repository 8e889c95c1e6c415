"""A few steps of pretraining lower the loss and leave an ordinary transformers directory."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from hafrm.data.encoding import Encoder
from hafrm.demo.demo import METHODS, recipe
from hafrm.demo.pretrain import Plan, pretrain
from hafrm.demo.world import TEST_SETS, pretraining_texts

PLAN = Plan(width=32, layers=1, heads=2, vocabulary=400)


def test_the_loss_falls_and_the_directory_loads(tmp_path):
    losses = []
    texts = pretraining_texts(0, 300)
    final = pretrain(tmp_path, texts, PLAN, on_step=lambda p: losses.append(p.loss))
    assert final < losses[0] - 0.5
    assert len(losses) > 5
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size >= len(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    encoder = Encoder(tokenizer)
    assert encoder.render(texts[0][:-1], "yes.").endswith(tokenizer.eos_token)


def test_the_same_texts_and_plan_give_the_same_loss(tmp_path):
    texts = pretraining_texts(0, 60)
    assert pretrain(tmp_path / "a", texts, PLAN) == pretrain(tmp_path / "b", texts, PLAN)


def test_the_methods_of_the_demo_differ_in_objective_and_learning_rate_only(tmp_path):
    names = ["train", "validation", *(f"test-{name}" for name in TEST_SETS)]
    files = {name: tmp_path / f"{name}.jsonl" for name in names}
    recipes = [recipe(method, tmp_path, files).model_dump() for method in METHODS]
    for other in recipes:
        other["method"] = other["training"]["learning_rate"] = None
    assert recipes[0] == recipes[1] == recipes[2]
