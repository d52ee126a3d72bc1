"""Spans of time as people write them."""

from __future__ import annotations

import re

from edgetune.errors import UsageError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_seconds(text: str) -> float:
    """Seconds that `90s`, `20m`, `1.5h` or `2d` stand for.

    Raises:
        UsageError: It is something else, or no time at all.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([smhd])\s*", text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not seconds:
        raise UsageError(f"{text!r:.60} is no time; expected a number and one of s, m, h, d, such as 20m")
    return seconds
