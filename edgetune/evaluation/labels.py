"""Metrics of classification: the answer is a label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.evaluation.measurement import AnsweredRow, Measurement, mean_of, texts


def label_of(text: str) -> str:
    """A label as labels are compared: without case, surrounding white space and full stops at its end."""
    return " ".join(text.split()).casefold().rstrip(".")


def accuracy(rows: Sequence[AnsweredRow]) -> Measurement:
    """Share of rows whose answer is the reference's label."""
    return mean_of([float(label_of(one) == label_of(other)) for one, other in texts(rows)])


def macro_f1(rows: Sequence[AnsweredRow]) -> Measurement:
    """Mean over labels of the F1 with which each is answered; a rare label counts as much as a frequent one.

    The labels are those of the references. An answer that is none of them is wrong, and no label of its own.
    """
    from sklearn.metrics import f1_score

    pairs = [(label_of(reference), label_of(answer)) for reference, answer in texts(rows)]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(reference for reference, _ in pairs))}
    expected = np.array([numbers[reference] for reference, _ in pairs])
    answered = np.array([numbers.get(answer, -1) for _, answer in pairs])

    def score(indices: NDArray[np.int64]) -> float:
        truth = expected[indices]
        return float(f1_score(truth, answered[indices], labels=np.unique(truth), average="macro", zero_division=0))

    return Measurement((expected == answered).astype(np.float64), score)
