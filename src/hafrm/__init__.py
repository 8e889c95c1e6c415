"""hafrm: train, evaluate, use and serve reward models that keep their language-model head.

The public nouns; the verbs are `hafrm.training.loop.train` and `hafrm.evaluation.evaluate.evaluate`, and
the command line. Importing this loads nothing heavy: a name loads its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hafrm.data.encoding import Encoder
    from hafrm.data.reader import read_preferences
    from hafrm.engine.model import HybridModel
    from hafrm.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        HafrmError,
        ModelError,
        NumericsError,
    )
    from hafrm.preferences import Comparison, Group, Message
    from hafrm.recipe import Recipe
    from hafrm.recipe_file import load_recipe
    from hafrm.scoring.fused import FusedRewardModel
    from hafrm.scoring.scorer import ImplicitRewardModel, RewardModel

_HOME = {
    "CheckpointError": "errors",
    "Comparison": "preferences",
    "ConfigError": "errors",
    "DataError": "errors",
    "Encoder": "data.encoding",
    "FusedRewardModel": "scoring.fused",
    "Group": "preferences",
    "HafrmError": "errors",
    "HybridModel": "engine.model",
    "ImplicitRewardModel": "scoring.scorer",
    "Message": "preferences",
    "ModelError": "errors",
    "NumericsError": "errors",
    "Recipe": "recipe",
    "RewardModel": "scoring.scorer",
    "load_recipe": "recipe_file",
    "read_preferences": "data.reader",
}

__all__ = [
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "DataError",
    "Encoder",
    "FusedRewardModel",
    "Group",
    "HafrmError",
    "HybridModel",
    "ImplicitRewardModel",
    "Message",
    "ModelError",
    "NumericsError",
    "Recipe",
    "RewardModel",
    "load_recipe",
    "read_preferences",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hafrm' has no attribute {name!r}")
    return getattr(import_module(f"hafrm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
