"""What long work says while it goes on, a line at a time; and a sign of life from it, from time to time."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

EVERY = 5.0
"""Seconds without a word, after which one is due."""


def silent(line: str) -> None:
    """Takes a line and says it to nobody: what functions are given that shall say nothing."""


class Pulse:
    """Counts what is done of something, and says it when nothing was said for `EVERY` seconds.

    What is done sooner is done without a word.

    Args:
        say: Takes one line.
        what: What is done with how many of what, with `{}` for the number done: `measured {} of 105 rows`.
    """

    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self._say, self._what = say, what
        self._done = 0
        self._said = monotonic()

    def add(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if (now := monotonic()) - self._said >= EVERY:
            self._said = now
            self._say(self._what.format(f"{self._done:,}"))
