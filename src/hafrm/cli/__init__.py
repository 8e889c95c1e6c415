"""The command line: parse, call the library, print. The only place that prints and exits.

Verbs import what they need when they run, so `hafrm --help` answers at once. Tables go to standard
output, progress and log to standard error. Exit codes: 0 done, 1 refused or failed, 2 wrong usage,
143 stopped by a signal with its state saved. `--help` lists verbs in the order of the imports here.
"""

# ruff: noqa: F401, I001 - verbs register themselves
from hafrm.cli import training_verbs, model_verbs, data_verbs
from hafrm.cli.entry import app, main

__all__ = ["app", "main"]
