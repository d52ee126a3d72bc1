"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from edgetune.errors import UsageError

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BY_LETTERS = {unit.lower(): size for unit, size in _UNITS.items()}


def parse_bytes(text: str) -> int:
    """Bytes that `3GB`, `800 MB`, `2.5GiB` or `4096B` stand for; a unit's case does not matter.

    Raises:
        UsageError: It is something else, or nothing.
    """
    found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]+)\s*", text)
    unit = _BY_LETTERS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise UsageError(f"{text!r:.60} is no size; expected a number and one of {', '.join(_UNITS)}, such as 3GB")
    # Not as a float: 1.001 · 1000 would be a byte too little.
    size = int(Fraction(found[1]) * unit)
    if not size:
        raise UsageError(f"{text!r:.60} is no memory at all; expected a size such as 3GB")
    return size


def bytes_text(count: int) -> str:
    """Bytes for people: `512 bytes`, `1.5 MB`, `2.3 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
