"""Rates and the time left follow from counts and a clock."""

from hafrm.scoring.pace import Pace


def test_the_time_left_is_what_the_rows_so_far_took_for_each_row_to_come():
    """1,000 of 5,000 rows in 50 s: 20 rows/s, 4,000 tokens/s, and 4,000 rows at 20 a second."""
    now = 100.0
    pace = Pace(5000, clock=lambda: now)
    assert pace.seconds_left is None
    pace.add(600, 150_000)
    pace.add(400, 50_000)
    now = 150.0
    assert pace.seconds_left == 200.0
    assert str(pace) == "1,000 of 5,000 rows, 20.0 rows/s, 4,000 tokens/s, 0:03:20 left"


def test_before_the_first_row_nothing_is_foretold():
    now = 0.0
    assert str(Pace(7, clock=lambda: now)) == "0 of 7 rows, 0.0 rows/s, 0 tokens/s"
