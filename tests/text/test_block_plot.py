"""Curves of block characters, from an eighth of a cell to all of it."""

from __future__ import annotations

import pytest

from edgetune.text.block_plot import block_rows


@pytest.mark.parametrize(
    ("values", "height", "rows"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 1, ["▁▂▃▄▅▆▇█"]),
        ([7.0, 0.0], 1, ["█▁"]),
        ([15, 8, 7, 0], 2, ["█▁  ", "███▁"]),
        ([3.0, 3.0], 2, ["  ", "▁▁"]),
        ([-1e300, 1e300], 1, ["▁█"]),
    ],
)
def test_each_value_is_a_column_of_its_height(values: list[float], height: int, rows: list[str]) -> None:
    assert block_rows(values, height) == rows
