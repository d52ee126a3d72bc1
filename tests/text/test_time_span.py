"""Spans of time as people write them."""

from __future__ import annotations

import pytest

from edgetune.errors import UsageError
from edgetune.text.time_span import parse_seconds


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), (" 2 d ", 172_800)])
def test_a_span_is_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "-1m", "0s", "1e3s", "20 minutes", "nan s"])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a number and one of s, m, h, d, such as 20m"):
        parse_seconds(text)
