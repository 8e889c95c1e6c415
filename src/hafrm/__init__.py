"""hafrm: train, evaluate and use reward models that can keep their language-model head.

`train`, `evaluate` and `RewardModel` are where to start; `hafrm --help` is the same on the command line.
Importing this loads nothing heavy: a name loads its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hafrm.api import train
    from hafrm.data.reader import read_preferences
    from hafrm.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        HafrmError,
        MemoryBudgetError,
        ModelError,
        NumericsError,
        ServerError,
        VerificationError,
    )
    from hafrm.evaluation import evaluate
    from hafrm.recipe import Recipe
    from hafrm.recipe_file import load_recipe
    from hafrm.scoring.reward_model import PolicyModel, RewardModel

_MODULE_OF = {  # the others are errors
    "PolicyModel": "scoring.reward_model",
    "Recipe": "recipe",
    "RewardModel": "scoring.reward_model",
    "evaluate": "evaluation",
    "load_recipe": "recipe_file",
    "read_preferences": "data.reader",
    "train": "api",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HafrmError",
    "MemoryBudgetError",
    "ModelError",
    "NumericsError",
    "PolicyModel",
    "Recipe",
    "RewardModel",
    "ServerError",
    "VerificationError",
    "evaluate",
    "load_recipe",
    "read_preferences",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hafrm' has no attribute {name!r}")
    return getattr(import_module(f"hafrm.{_MODULE_OF.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
