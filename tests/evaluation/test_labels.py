"""Accuracy and macro F1 on the examples of scikit-learn's reference, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.evaluation.labels import accuracy, macro_f1
from support.answered import answered


def labels(expected: list[int], answered_: list[int]) -> list[tuple[str, str]]:
    return [(f"label {one}", f"label {other}") for one, other in zip(expected, answered_, strict=True)]


def test_accuracy_of_the_reference() -> None:
    """`accuracy_score`'s example: 2 of 4."""
    assert accuracy(answered(*labels([0, 1, 2, 3], [0, 2, 1, 3]))).score == 0.5


def test_macro_f1_of_the_reference() -> None:
    """`f1_score`'s example: label 0 has precision 2/3 and recall 1, so 0.8; the others 0; the mean is 0.2667."""
    rows = answered(*labels([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1]))
    assert macro_f1(rows).score == pytest.approx(0.8 / 3)
    assert macro_f1(rows).rows.tolist() == [1, 0, 0, 1, 0, 0]


def test_an_answer_that_is_no_label_is_wrong_and_no_label() -> None:
    rows = answered(("on", "On."), ("on", "it is on"), ("off", " off\n"))
    # on: recall 1/2, precision 1, F1 2/3; off: 1. A third label, whose F1 is 0, would make it 5/9.
    assert macro_f1(rows).score == pytest.approx((2 / 3 + 1) / 2)
    assert accuracy(rows).score == pytest.approx(2 / 3)


def test_rows_that_are_drawn_have_their_own_labels() -> None:
    rows = answered(("on", "on"), ("off", "on"))
    assert macro_f1(rows).of(np.array([0, 0])) == 1.0
    assert macro_f1(rows).of(np.array([1, 1])) == 0.0
