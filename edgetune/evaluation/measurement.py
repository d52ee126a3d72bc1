"""What a metric is given of a row, and what it makes of all of them, in a form that some of them can be drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgetune.data.rows import Message


@dataclass(frozen=True)
class AnsweredRow:
    """A row, and what a model made of it."""

    line: int
    """Line of the file, counted from 1."""
    prompt: str | tuple[Message, ...]
    """The turns before the last answer; a text where the row was asked as it is."""
    reference: str
    """The answer that the row has."""
    answer: str | None = None
    """The model's; None where no metric needs it."""
    loss: float | None = None
    """Mean cross entropy of the row's trained tokens, in nats; None where no metric needs it."""
    tokens: int | None = None
    """How many these are."""
    scores: dict[str, float] = field(default_factory=dict)
    """What each metric says of this row alone."""


@dataclass(frozen=True)
class Measurement:
    """What a metric says of some rows."""

    rows: NDArray[np.float64]
    """Of each row alone."""
    of: Callable[[NDArray[np.int64]], float]
    """Of the rows with these indices together; an index may occur more than once."""

    @property
    def score(self) -> float:
        """Of all rows together."""
        return self.of(np.arange(len(self.rows)))


def mean_of(scores: Sequence[float]) -> Measurement:
    """A metric whose score is the mean of those of the rows."""
    rows = np.array(scores, np.float64)
    return Measurement(rows, lambda indices: float(rows[indices].mean()))


def of_sums(counts: Sequence[Sequence[float]], score: Callable[[NDArray[np.float64]], float]) -> Measurement:
    """A metric whose score is computed of counts that are added up over the rows.

    Args:
        counts: As many of each row.
        score: Of their sums (counts,).
    """
    table = np.array(counts, np.float64)
    rows = np.array([score(row) for row in table], np.float64)
    return Measurement(rows, lambda indices: score(table[indices].sum(axis=0)))


def f1(counts: NDArray[np.float64]) -> float:
    """The harmonic mean of precision and recall of what agrees, of how many answered, and of how many expected.

    Where nothing is expected and nothing answered, that is right: 1.
    """
    agreed, answered, expected = counts
    total = answered + expected
    return float(2 * agreed / total) if total else 1.0


def texts(rows: Sequence[AnsweredRow]) -> list[tuple[str, str]]:
    """Reference and answer of each row; no answer is an empty one."""
    return [(row.reference, row.answer or "") for row in rows]
