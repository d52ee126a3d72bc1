"""The paired bootstrap: scipy's interval, the verdict's direction, and what has none."""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.evaluation.comparison import RESAMPLES, compare
from edgetune.evaluation.measurement import mean_of, of_sums


def test_the_interval_is_scipys() -> None:
    from scipy.stats import bootstrap

    generator = np.random.default_rng(5)
    ours = generator.normal(0.6, 0.2, 80)
    theirs = ours - generator.normal(0.03, 0.1, 80)
    found = compare(mean_of(list(ours)), mean_of(list(theirs)), higher_is_better=True, rows_add_up=True)
    oracle = bootstrap(
        (ours, theirs), lambda one, other, axis: one.mean(axis) - other.mean(axis), paired=True, vectorized=True,
        n_resamples=20 * RESAMPLES, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.difference == pytest.approx(ours.mean() - theirs.mean())
    assert found.low is not None and found.high is not None
    width = oracle.high - oracle.low
    assert abs(found.low - oracle.low) < width / 10
    assert abs(found.high - oracle.high) < width / 10


@pytest.mark.parametrize(("higher_is_better", "verdict"), [(True, "better"), (False, "worse")])
def test_a_difference_in_every_row_is_told(higher_is_better: bool, verdict: str) -> None:
    ours, theirs = mean_of([1.0] * 9), mean_of([0.5] * 9)
    found = compare(ours, theirs, higher_is_better=higher_is_better, rows_add_up=True)
    assert (found.low, found.high, found.verdict) == (0.5, 0.5, verdict)
    other_way = compare(theirs, ours, higher_is_better=not higher_is_better, rows_add_up=True)
    assert other_way.verdict == verdict


def test_chance_is_not_told_apart_and_the_same_rows_have_the_same_interval() -> None:
    generator = np.random.default_rng(6)
    ours, theirs = (mean_of(list(generator.integers(0, 2, 30).astype(float))) for _ in range(2))
    first = compare(ours, theirs, higher_is_better=True, rows_add_up=True)
    assert first.verdict == "not told apart"
    assert first == compare(ours, theirs, higher_is_better=True, rows_add_up=True)
    same = compare(ours, ours, higher_is_better=True, rows_add_up=True)
    assert (same.difference, same.verdict) == (0.0, "not told apart")


def test_scores_of_sums_are_drawn_by_rows() -> None:
    """One long row decides a score of sums: whether it is drawn at all decides the interval."""
    ours = of_sums([(0.0, 1.0)] * 9 + [(90.0, 91.0)], lambda sums: sums[0] / sums[1])
    theirs = of_sums([(0.0, 1.0)] * 10, lambda sums: sums[0] / sums[1])
    found = compare(ours, theirs, higher_is_better=True, rows_add_up=True)
    assert found.difference == pytest.approx(0.9)
    assert found.low == 0.0 and found.verdict == "not told apart"


def test_what_a_repeated_row_would_change_has_no_interval() -> None:
    found = compare(mean_of([1.0]), mean_of([0.0]), higher_is_better=True, rows_add_up=False)
    assert (found.low, found.high, found.verdict) == (None, None, "not compared")
    assert (found.other, found.difference) == (0.0, 1.0)
