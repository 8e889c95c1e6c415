"""What hafrm raises: one root, and children that also are the standard error they replace.

    HafrmError
    |-- ConfigError (ValueError)       a recipe, an option or a method name
    |-- DataError (ValueError)         preference data that cannot be used
    |-- ModelError (ValueError)        a model or tokenizer that cannot do what was asked of it
    |-- CheckpointError (RuntimeError) a run folder or checkpoint that cannot be used
    |-- NumericsError (RuntimeError)   numbers that must not be built upon
    |   `-- DivergedError              a loss or gradient of training that is not finite
    |-- VerificationError (RuntimeError) an export that is written, but not proved
    |-- ServerError (ConnectionError)  a server that cannot be reached, or answers otherwise than it should
    `-- MemoryBudgetError (MemoryError) a pass that does not fit, however it is cut

Every message says what is wrong, the value got, what is allowed, and the fix.
"""


class HafrmError(Exception):
    """The root of every error that hafrm raises on purpose."""


class ConfigError(HafrmError, ValueError):
    """A recipe, an option or a method name is wrong."""


class DataError(HafrmError, ValueError):
    """Preference data cannot be used as it is."""


class ModelError(HafrmError, ValueError):
    """A model or tokenizer cannot do what was asked of it."""


class CheckpointError(HafrmError, RuntimeError):
    """A run folder or checkpoint is missing, incomplete or from another run."""


class NumericsError(HafrmError, RuntimeError):
    """A number that must not be built upon: non-finite, or two paths that disagree."""


class DivergedError(NumericsError):
    """A loss or gradient of training is not finite: this run cannot continue, another one may."""


class VerificationError(HafrmError, RuntimeError):
    """An export is written and kept, but was not proved to give every consumer the trained scores."""


class ServerError(HafrmError, ConnectionError):
    """A server cannot be reached, refuses, or answers in another form than its protocol has."""


class MemoryBudgetError(HafrmError, MemoryError):
    """A pass does not fit into the device's memory, however it is cut."""
