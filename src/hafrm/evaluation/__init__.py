"""How good a model is on preference data, and which of two models is better on the same comparisons.

`evaluate(model, data)` scores the data with every head of a model and measures each source;
`compare_models` tests the difference of two models. Nothing here trains, selects or changes a model.
Start with `heads`. `metrics` defines what is measured; it needs no torch, so that a report can read results
without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hafrm.evaluation.heads import compare_models, evaluate

__all__ = ["compare_models", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hafrm.evaluation import heads  # noqa: PLC0415 - torch only when a model is run

    return getattr(heads, name)
