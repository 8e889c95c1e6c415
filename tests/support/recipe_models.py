"""Recipes and models for tests of plans: a config, the real model, and the one on the meta device."""

from typing import Any

import transformers

from hafrm.engine.model import HybridModel, split_causal_lm
from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe
from hafrm.training.methods import get_method
from hafrm.training.setup import assemble, meta_model
from support.models import FAMILIES, GROUPED, tiny_causal_lm


def config_of(family: str) -> transformers.PretrainedConfig:
    """The tiny config of a family."""
    name, sizes = FAMILIES[family]
    config: transformers.PretrainedConfig = getattr(transformers, f"{name}Config")(**sizes)
    return config


def recipe_of(**sections: Any) -> Recipe:
    """A recipe whose model and data nobody reads."""
    values: dict[str, Any] = {"model": {"path": "base"}, "data": {"train": "x", "max_length": 64}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build_recipe(values)


def real_model(family: str, recipe: Recipe, method: str = "haf") -> HybridModel:
    """The model that a run with this recipe would train, with random weights."""
    return assemble(*split_causal_lm(tiny_causal_lm(family)), recipe, get_method(method))


def meta_of(family: str, recipe: Recipe, method: str = "haf") -> HybridModel:
    """The same on the meta device."""
    return meta_model(config_of(family), recipe, get_method(method))


def tiny_mixtral_config() -> transformers.PretrainedConfig:
    """Two layers of 8 experts, of which a token is sent to 2."""
    return transformers.MixtralConfig(**GROUPED, num_local_experts=8, num_experts_per_tok=2)
