"""Answered rows for tests of metrics: a reference and an answer each."""

from __future__ import annotations

from edgetune.evaluation.measurement import AnsweredRow


def answered(*pairs: tuple[str, str]) -> list[AnsweredRow]:
    """A row for each reference and answer."""
    return [
        AnsweredRow(line, f"question {line}", reference, answer) for line, (reference, answer) in enumerate(pairs, 1)
    ]
