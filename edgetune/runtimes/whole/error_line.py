"""The line of a library's message that says why. Where it says nothing, the kind of error has to do."""

from __future__ import annotations

_LONGEST = 300


def first_line(error: Exception) -> str:
    """Of ONNX Runtime, which adds details below."""
    return _lines(error)[0][:_LONGEST]


def last_line(error: Exception) -> str:
    """Of OpenVINO, which says first where in its source the error came up."""
    return _lines(error)[-1][:_LONGEST]


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
