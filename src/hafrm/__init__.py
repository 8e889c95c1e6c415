"""hafrm: train, evaluate, use and serve reward models that keep their language-model head.

The public nouns; the verbs are `hafrm.training.loop.train` and `hafrm.evaluation.evaluate.evaluate`, and
the command line. Importing this loads nothing heavy: a name loads its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hafrm.config import Recipe, load_recipe
    from hafrm.data.encoding import Encoder
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
    from hafrm.scoring.fused import FusedRewardModel
    from hafrm.scoring.reward_model import PolicyModel, RewardModel

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
    "Message": "preferences",
    "ModelError": "errors",
    "NumericsError": "errors",
    "PolicyModel": "scoring.reward_model",
    "Recipe": "config",
    "RewardModel": "scoring.reward_model",
    "load_recipe": "config",
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
    "Message",
    "ModelError",
    "NumericsError",
    "PolicyModel",
    "Recipe",
    "RewardModel",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hafrm' has no attribute {name!r}")
    return getattr(import_module(f"hafrm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
