"""`hafrm.train`: train from Python, with a recipe or only some keys, and data from files or memory."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hafrm.atomic import atomic_write, cache_folder, write_cache
from hafrm.data.files import show
from hafrm.data.reader import RawRows
from hafrm.errors import ConfigError, DataError
from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe, load_recipe, nested, with_values

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
    to train on, instead of `data.train`. Raises what `hafrm.training.loop.run_training` raises.
    """
    from hafrm.training.loop import run_training  # noqa: PLC0415 - torch only when it trains

    if not isinstance(out, str | Path):
        raise ConfigError(f"out must be a folder's path, got {show(out)}")
    if not isinstance(recipe, Recipe | Mapping | str | Path):
        raise ConfigError(
            f"recipe must be a Recipe, a file or a mapping of keys, got {show(recipe)}"
        )
    changes = {} if data is None else {"data.train": [str(_keep_rows(data, Path(out)))]}
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


def _keep_rows(rows: RawRows, out: Path) -> Path:
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"data must be rows in memory (files: data.train), got {show(rows)}")
    # a file named after its content, so that a resumed run reads the same path
    text = "".join(_as_line(number, row) for number, row in enumerate(rows))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    path = cache_folder("rows") / f"rows-{digest}.jsonl"
    beside = out.absolute().with_name(f"{out.absolute().name}.{path.name}")
    if beside.exists() or not (path.exists() or write_cache(path, text)):
        path = beside
        atomic_write(path, text)
    return path


def _as_line(number: int, row: Any) -> str:
    if not isinstance(row, Mapping):
        raise DataError(
            f"row {number} of data must be a mapping such as {{'prompt': ..., 'chosen': ..., 'rejected': "
            f"...}}, got {show(row)}"
        )
    try:
        return json.dumps(dict(row), ensure_ascii=False, default=_as_json) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"row {number} of data cannot be written as JSON: {error}") from error


def _as_json(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's and torch's
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON type")
