"""The errors of hafrm: one root, and subclasses that also inherit from the matching built-in error.

Every message says what is wrong, what the value is, what is allowed, and how to fix it.
"""

import difflib
from collections.abc import Iterable


class HafrmError(Exception):
    """The root of every error that hafrm raises on purpose."""

    def __str__(self) -> str:
        text = super().__str__()  # which may quote a value of megabytes
        return text if len(text) <= 4000 else f"{text[:2000]} ... {text[-500:]}"


class ConfigError(HafrmError, ValueError):
    """A recipe, an option or a method name is wrong."""


class DataError(HafrmError, ValueError):
    """Preference data cannot be used as it is."""


class ModelError(HafrmError, ValueError):
    """A model or tokenizer cannot do what was asked of it."""


class EndlessTemplateError(HafrmError, TimeoutError):
    """A chat template did not end in time and was stopped."""

    def __init__(self) -> None:
        super().__init__("The chat template does not end, it loops: use another one")


class CheckpointError(HafrmError, RuntimeError):
    """A run folder or checkpoint is missing, incomplete or from another run."""


class NumericsError(HafrmError, RuntimeError):
    """A number cannot be trusted: it is not finite, or two ways to compute it disagree."""


class DivergedError(NumericsError):
    """A loss or gradient of training is not finite: this run cannot continue, but others may."""


class VerificationError(HafrmError, RuntimeError):
    """An export is written and kept, but was not verified to give every consumer the trained scores."""


class ServerError(HafrmError, ConnectionError):
    """A server cannot be reached, refuses, or gives an answer that does not fit its protocol."""


class MemoryBudgetError(HafrmError, MemoryError):
    """A pass does not fit into the device's memory, even when it is split."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The hint "did you mean X? " for a mistyped name, or "" when no option is like it."""
    near = difflib.get_close_matches(name.lower(), list(options), 1)
    return f"did you mean {near[0]}? " if near else ""
