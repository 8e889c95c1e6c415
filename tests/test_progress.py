"""Progress that several passes report as one."""

from itertools import chain, repeat

from hafrm import progress
from hafrm.progress import over_passes


def test_passes_of_different_sizes_add_up_to_one_total():
    """The second pass's first count, 5, is above the first pass's last, 3."""
    counts = []
    on_progress = over_passes(lambda done, total: counts.append((done, total)), 12)
    for done, total in ((2, 3), (3, 3), (5, 9), (9, 9)):
        on_progress(done, total)
    assert counts == [(2, 12), (3, 12), (8, 12), (12, 12)]


def test_without_a_terminal_a_resumed_run_logs_its_own_speed_and_the_time_left(monkeypatch, caplog):
    """From step 100 of 400, 20 steps in 40 s: 2 s each, so 280 steps take 560 s."""
    now = chain((0.0, 10.0), repeat(40.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with caplog.at_level("INFO"), progress.show_progress("training", done=100) as on_progress:
        on_progress(105, 400)
        on_progress(120, 400)
    (record,) = caplog.records
    assert record.message == "training: 120 of 400, 2.0 s each, 0:09:20 left"
