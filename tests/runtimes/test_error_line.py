"""Why a library failed, in one line."""

from __future__ import annotations

import pytest

from edgetune.runtimes.whole.error_line import first_line, last_line


@pytest.mark.parametrize(
    ("message", "first", "last"),
    [
        ("no device", "no device", "no device"),
        ("\nreason \n at x.cpp:1\n", "reason", "at x.cpp:1"),
        ("", "RuntimeError", "RuntimeError"),
        (" \n", "RuntimeError", "RuntimeError"),
        ("a" * 1000, "a" * 300, "a" * 300),
    ],
)
def test_the_line_with_the_reason(message: str, first: str, last: str) -> None:
    error = RuntimeError(message)
    assert (first_line(error), last_line(error)) == (first, last)
