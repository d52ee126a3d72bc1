"""Whether one model's answers are better than another's to the same rows, or only seem so: a paired bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgetune.evaluation.measurement import Measurement

RESAMPLES = 1000
"""How often rows are drawn."""
CONFIDENCE = 0.95
"""Share of the draws whose difference lies in the interval."""
SEED = 0
"""So that the same rows have the same interval."""
Verdict = Literal["better", "worse", "not told apart", "not compared"]


@dataclass(frozen=True)
class Difference:
    """How a score differs from another model's."""

    other: float
    """The other model's score."""
    difference: float
    """This model's score less the other's."""
    low: float | None
    """Where the interval of 95 % begins; None where the metric has none."""
    high: float | None
    """Where it ends."""
    verdict: Verdict
    """What that says of this model: the interval lies on one side of zero or does not."""


def compare(ours: Measurement, theirs: Measurement, *, higher_is_better: bool, rows_add_up: bool) -> Difference:
    """Draw as many rows as there are, with replacement, the same for both, and look where the differences lie.

    The interval is the percentile bootstrap's (Efron and Tibshirani 1993; Koehn 2004 of translations).

    Args:
        ours: Of this model.
        theirs: Of the other, of the same rows in the same order.
        higher_is_better: The metric's direction.
        rows_add_up: Without it there is no interval: a row that is drawn twice would change what the metric means.
    """
    other, difference = theirs.score, ours.score - theirs.score
    if not rows_add_up:
        return Difference(other, difference, None, None, "not compared")
    count = len(ours.rows)
    generator = np.random.default_rng(SEED)
    draws = [generator.integers(count, size=count) for _ in range(RESAMPLES)]
    differences = [ours.of(rows) - theirs.of(rows) for rows in draws]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.percentile(differences, [tail, 100 - tail]))
    verdict: Verdict = "not told apart"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == higher_is_better else "worse"
    return Difference(other, difference, low, high, verdict)
