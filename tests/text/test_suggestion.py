"""Slips of the pen, told from other words."""

from __future__ import annotations

import pytest

from edgetune.text.suggestion import is_slip


@pytest.mark.parametrize(
    ("word", "meant", "expected"),
    [
        ("mesages", "messages", True),
        ("message", "messages", True),
        ("messsagse", "messages", True),
        ("Messages", "messages", True),
        ("competion", "completion", True),
        ("rloe", "role", True),
        ("wieght", "weight", True),
        ("prompt_id", "prompt", False),
        ("metadata", "messages", False),
        ("response", "completion", False),
        ("id", "text", False),
        ("", "text", False),
        ("message_id", "messages", False),
        ("tool_call_id", "tool_calls", False),
    ],
)
def test_a_slip_is_a_letter_or_two(word: str, meant: str, expected: bool) -> None:
    assert is_slip(word, meant) is expected
