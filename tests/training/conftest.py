"""A finished run, which several tests look at; copy what a test changes."""

from pathlib import Path

import pytest

from hafrm.export.checklist import replay_directory
from hafrm.training import run_export
from hafrm.training.loop import run_training
from support.tiny_runs import tiny_recipe


def replay(folder: Path) -> dict[str, float]:
    """The golden check by the same code, without a process that imports torch again for seconds."""
    result = replay_directory(folder)
    assert not result.faults
    assert max(result.differences.values()) < 1e-4
    return result.differences


@pytest.fixture(autouse=True)
def _replay_in_this_process(monkeypatch, request):
    if "fresh_process" not in request.node.name:
        monkeypatch.setattr(run_export, "check_golden", replay)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of the default recipe, saved at steps 2, 4 and 6, validated at 3 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_export, "check_golden", replay)
        run_training(tiny_recipe(folder), folder / "run")
    return folder / "run"
