"""The rows of the benchmarks."""

from __future__ import annotations

from benchmarks.rows import real_rows


def test_there_are_rows_wherever_the_checkout_lies() -> None:
    assert all(path.is_file() for path in real_rows())
