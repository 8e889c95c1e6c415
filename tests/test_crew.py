"""Tasks on several processes: all are done once, errors and deaths end the rest, GPUs are dealt out."""

import os
import signal

import pytest
import torch

from hafrm.crew import Crew, _take_gpu
from hafrm.errors import CheckpointError, DataError


def act(task: str) -> str:
    """What the processes of these tests do."""
    if task == "refuse":
        raise DataError("no such row")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{task} by {os.getpid()}"


def enlist():
    return act


@pytest.mark.parametrize("num", [1, 2])
def test_every_task_is_done_once_and_told_of(num):
    told = []
    with Crew(enlist, num) as crew:
        crew.run(["a", "b", "c"], lambda task, result: told.append((task, result)))
        crew.run(["d"], lambda task, result: told.append((task, result)))
    assert sorted(task for task, _ in told) == ["a", "b", "c", "d"]
    assert all(result.startswith(f"{task} by ") for task, result in told)
    here = {result.endswith(f" {os.getpid()}") for _, result in told}
    assert here == {num == 1}


def test_an_error_of_ours_comes_through_and_a_killed_process_is_named():
    with Crew(enlist, 2) as crew, pytest.raises(DataError, match="no such row"):
        crew.run(["refuse", "a"], lambda *_: None)
    with Crew(enlist, 2) as crew, pytest.raises(CheckpointError, match=r"exit code -9.*goes on"):
        crew.run(["die"], lambda *_: None)


@pytest.mark.parametrize(("seen", "rank", "expected"), [(None, 3, "1"), ("4,6", 1, "6")])
def test_a_process_sees_one_gpu_of_several(monkeypatch, seen, rank, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")
    _take_gpu(rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
