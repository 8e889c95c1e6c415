"""`hafrm.train`: a recipe, or just the keys that matter, and data from files or memory; from Python."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hafrm.atomic import atomic_write
from hafrm.data.reader import RawRows
from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe, load_recipe, nested, with_values
from hafrm.run_folder import cache_folder

if TYPE_CHECKING:
    from hafrm.training.loop import TrainResult


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    data: RawRows | None = None,
    out: str | Path = "run",
    resume: bool = False,
) -> "TrainResult":
    """Train a reward model and export it; returns the run once its exports are verified.

        run = hafrm.train({"model.path": "Qwen/Qwen2.5-0.5B", "method.name": "haf"}, data=rows, out="run")
        result = hafrm.evaluate(run, test_rows)
        rm = hafrm.RewardModel.from_pretrained("run/model/reward")

    `recipe` is a Recipe, a YAML file, or its values, nested or with dotted keys. `data` are rows in memory
    to train on, in the place of `data.train`. Raises what `hafrm.training.loop.run_training` raises.
    """
    from hafrm.training.loop import run_training  # noqa: PLC0415 - torch only when it trains

    changes = {} if data is None else {"data.train": [str(_keep_rows(data))]}
    if isinstance(recipe, Recipe):
        checked = with_values(recipe, changes)
    elif isinstance(recipe, Mapping):
        # sections first, so that a dotted key changes its section and is not replaced by it
        values = sorted({**recipe, **changes}.items(), key=lambda item: "." in item[0])
        checked = build_recipe(nested({}, dict(values)))
    else:
        # as overrides, so that a recipe without data.train is complete
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        checked = load_recipe(recipe, overrides)
    return run_training(checked, Path(out), resume=resume)


def _keep_rows(rows: RawRows) -> Path:
    # a file named after its content, so that a resumed run reads the same path
    text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    path = cache_folder("rows") / f"rows-{digest}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)
    return path
