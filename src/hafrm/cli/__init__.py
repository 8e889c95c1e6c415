"""The command line: parse, call the library, print. The only place that prints and exits.

Verbs import what they need when they run, so `hafrm --help` answers at once. Tables go to standard
output, progress and log to standard error. Exit codes: 0 done, 1 refused or failed, 2 wrong usage,
143 stopped by a signal with its state saved. A verb is a function in the module that is named after it;
they stand in the help in the order in which they are imported here.
"""

# ruff: noqa: F401, I001 - verbs register themselves
from hafrm.cli import train, evaluate, compare
from hafrm.cli import score, export, verify, best_of_n, rlhf
from hafrm.cli import report, data, demo
from hafrm.cli.entry import app, main

__all__ = ["app", "main"]
