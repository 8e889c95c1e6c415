"""Tasks on several processes: each runs once, errors and deaths end the rest, GPUs are dealt out."""

import os
import signal

import pytest
import torch

from hafrm.errors import CheckpointError, DataError
from hafrm.process_pool import ProcessPool, _take_gpu


def run_task(task: str) -> str:
    if task == "refuse":
        raise DataError("no such row")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{task} by {os.getpid()}"


def make_worker():
    return run_task


@pytest.mark.parametrize("num", [1, 2])
def test_every_task_runs_once_an_error_of_ours_comes_through_and_a_kill_is_told(num):
    reported = []
    with ProcessPool(make_worker, num) as pool:
        pool.run(["a", "b", "c"], lambda _, task, result: reported.append((task, result)))
        pool.run(["d"], lambda _, task, result: reported.append((task, result)))
        with pytest.raises(DataError, match="no such row"):
            pool.run(["refuse", "a"], lambda *_: None)
        if num == 2:
            with pytest.raises(CheckpointError, match="died"):
                pool.run(["die"], lambda *_: None)
    assert sorted(task for task, _ in reported) == ["a", "b", "c", "d"]
    assert all(result.startswith(f"{task} by ") for task, result in reported)
    in_this_process = {result.endswith(f" {os.getpid()}") for _, result in reported}
    assert in_this_process == {num == 1}


@pytest.mark.parametrize(("visible", "rank", "expected"), [(None, 3, "1"), ("4,6", 1, "6")])
def test_a_process_sees_one_gpu_of_several(monkeypatch, visible, rank, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    _take_gpu(rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
