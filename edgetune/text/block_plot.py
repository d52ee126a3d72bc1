"""A curve as lines of text, of characters that fill an eighth of a cell up to all of it."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = len(_BLOCKS) - 1


def block_rows(values: Sequence[float], height: int) -> list[str]:
    """Lines of text, the uppermost first; each value is a column, the lowest an eighth of a cell, the highest all.

    Args:
        values: Finite numbers, one at least.
        height: Number of lines.
    """
    low, high, most = min(values), max(values), height * _EIGHTHS
    span = high - low
    levels = [1 + round((value - low) / span * (most - 1)) if span > 0 else 1 for value in values]
    return [
        "".join(_BLOCKS[min(_EIGHTHS, max(0, level - row * _EIGHTHS))] for level in levels)
        for row in reversed(range(height))
    ]
