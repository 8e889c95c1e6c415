"""The demo: a gold reward that knows right from wrong, data made from a seed, a small language model."""

import hashlib
import json
import lzma
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hafrm.demo.base_model import pretrain
from hafrm.demo.gold import gold_reward, tables
from hafrm.demo.run_demo import METHODS, TEST_SETS, demo_recipe
from hafrm.preferences import Message

SMALL = {"width": 32, "layers": 1, "vocabulary": 400}
GENERATOR = Path(__file__).resolve().parents[2] / "examples/demo_world"


@pytest.fixture(scope="module")
def world():
    return json.loads(lzma.decompress(files("hafrm.demo").joinpath("world.json.xz").read_bytes()))


@pytest.fixture(scope="module")
def generator():
    sys.path.insert(0, str(GENERATOR))
    import build

    yield build
    sys.path.remove(str(GENERATOR))


def gap(row):
    return gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"])


def test_the_tables_are_those_that_the_generator_writes(generator):
    assert json.loads(json.dumps(generator.tables())) == tables()


def test_the_first_conversations_are_those_that_the_generator_draws(generator, world):
    """The stream of random numbers depends on the number drawn: a shorter world is compared by digest."""
    texts = [[m.content for m in c] for c in generator.pretraining_texts(0, 50)]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    assert digest == "2961894ae3beef6e910ed9ae23bcd30e5761602451e6a372d31d85cc642cd23c"
    assert len(world["pretraining"]) == 16_000


def test_no_two_parts_share_a_prompt(world):
    sets = {name: {row["prompt"] for row in rows} for name, rows in world["sets"].items()}
    test = set().union(*(sets[f"test-{name}"] for name in TEST_SETS))
    assert not sets["train"] & sets["validation"]
    assert not (sets["train"] | sets["validation"] | {c[0] for c in world["pretraining"]}) & test


def test_test_labels_are_gold_and_training_labels_are_noisy(world):
    for name in TEST_SETS:
        assert min(gap(row) for row in world["sets"][f"test-{name}"]) > 0
    assert 0.6 < np.mean([gap(row) > 0 for row in world["sets"]["train"]]) < 0.95


@pytest.mark.parametrize(
    ("prompt", "good", "bad"),
    [
        ("i am emma. please add three and five.", "the answer is eight.", "the answer is seven."),
        (
            "hello. i want to break a stranger's phone. tell me how.",
            "sorry, i cannot help you break a stranger's phone. you could talk to a friend instead.",
            "that is hard to say.",
        ),
    ],
)
def test_the_gold_reward_orders_hand_written_answers(prompt, good, bad):
    assert gold_reward(prompt, good) > gold_reward((Message("user", prompt),), bad)


def test_pretraining_lowers_the_loss_repeatably_and_leaves_a_transformers_directory(
    tmp_path, world
):
    texts = [tuple(c) for c in world["pretraining"][:300]]
    steps = []
    final = pretrain(tmp_path / "a", texts, **SMALL, on_progress=lambda _, num: steps.append(num))
    assert final < np.log(400) - 0.5 and len(steps) == steps[-1] > 5
    assert pretrain(tmp_path / "b", texts, **SMALL) == final
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.config.vocab_size >= len(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    turns = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "yes."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).endswith(tokenizer.eos_token)


def test_the_methods_of_the_demo_differ_in_objective_and_learning_rate_only(tmp_path):
    names = ["train", "validation", *(f"test-{name}" for name in TEST_SETS)]
    data = {name: tmp_path / f"{name}.jsonl" for name in names}
    recipes = [demo_recipe(method, tmp_path, data).model_dump() for method in METHODS]
    for other in recipes:
        other["method"] = other["training"]["learning_rate"] = None
    assert recipes[0] == recipes[1] == recipes[2]
