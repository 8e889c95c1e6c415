"""Progress that several passes report as one."""

from hafrm.progress import over_passes


def test_passes_of_different_sizes_add_up_to_one_total():
    """The second pass's first count, 5, is above the first pass's last, 3."""
    counts = []
    on_progress = over_passes(lambda done, total: counts.append((done, total)), 12)
    for done, total in ((2, 3), (3, 3), (5, 9), (9, 9)):
        on_progress(done, total)
    assert counts == [(2, 12), (3, 12), (8, 12), (12, 12)]
