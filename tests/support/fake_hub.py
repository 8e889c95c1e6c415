"""A stand-in for the `datasets` library, so that no test asks the hub."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """Let `datasets.load_dataset` be `load`."""
    fake = ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
