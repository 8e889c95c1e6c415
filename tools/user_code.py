"""What a user writes; it runs, and mypy --strict and pyright accept it, with the installed wheel.

tools/wheel_test.sh runs it beside a base and data. `assert_type` fails where a type is Any.
"""

from typing import assert_type

import hafrm
from hafrm import DataError, PolicyModel, Recipe, RewardModel

values = {"model.path": "base", "data.train": "train.jsonl", "method.name": "haf"}
sizes = {"data.max_length": 64, "training.steps": 2, "training.batch_size": 4}
run = hafrm.train({**values, **sizes}, out="from-python")
assert_type(run.num_steps, int)
assert_type(run.best, dict[str, float])

recipe = hafrm.load_recipe(run.folder / "recipe.yaml")
assert_type(recipe, Recipe)
assert_type(recipe.training.learning_rate, float)
assert_type(recipe.training.steps, int | None)

result = hafrm.evaluate(run, "test.jsonl")
assert_type(result.accuracy.value, float)
assert_type(result.sets[0].accuracy.num_correct, int)

data = hafrm.read_preferences([[{"prompt": "hi", "chosen": "hello", "rejected": "no"}]])
assert_type(data.groups[0].responses, tuple[str, ...])
assert_type(data.num_rows, int)

for model in (RewardModel.from_pretrained(run), PolicyModel.from_pretrained(run)):
    assert_type(model.score("Say sun.", "sun"), float)
    assert_type(model.score([{"role": "user", "content": "Say sun."}], ["sun", "sea"]), list[float])
    assert_type(model.score_batch(["Say sun."], [["sun", "sea"]]), list[list[float]])
    assert_type(model.probability("Say sun.", "sun", "sea"), float)
    best = model.best_of("Say sun.", ["sun", "sea"])
    assert_type(best.index, int)
    assert_type(best.response, str)
    assert_type(best.rewards, list[float])

try:
    hafrm.evaluate(run, "none.jsonl")
except DataError as error:
    assert_type(error, DataError)
    print(error)
print("names:", *hafrm.__all__, *(getattr(hafrm, name).__module__ for name in hafrm.__all__))
