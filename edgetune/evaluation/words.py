"""Metrics that compare words: exact match and F1 as SQuAD defines them, and how varied the words are."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.evaluation.measurement import AnsweredRow, Measurement, f1, mean_of, texts

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalised_words(text: str) -> list[str]:
    """Words as SQuAD (Rajpurkar et al. 2016) compares them: lower case, no ASCII punctuation, no English articles."""
    bare = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return _ARTICLES.sub(" ", bare).split()


def exact_match(rows: Sequence[AnsweredRow]) -> Measurement:
    """Share of rows whose answer has the words of the reference."""
    return mean_of([float(normalised_words(one) == normalised_words(other)) for one, other in texts(rows)])


def token_f1(rows: Sequence[AnsweredRow]) -> Measurement:
    """Mean over rows of the F1 of the answer's words, each as often as it occurs."""
    return mean_of([_overlap(normalised_words(one), normalised_words(other)) for one, other in texts(rows)])


def _overlap(reference: list[str], answer: list[str]) -> float:
    common = sum((Counter(reference) & Counter(answer)).values())
    return f1(np.array([common, len(answer), len(reference)], np.float64))


def distinct(rows: Sequence[AnsweredRow], length: int) -> Measurement:
    """Different sequences of words in all answers, by how many there are (Li et al. 2016): 1 where none comes again.

    Args:
        rows: Their answers are taken together; words are what white space separates, in lower case.
        length: Words of a sequence.
    """
    found = [_sequences((row.answer or "").lower().split(), length) for row in rows]

    def score(indices: NDArray[np.int64]) -> float:
        together = [sequence for index in indices for sequence in found[index]]
        return len(set(together)) / len(together) if together else 0.0

    return Measurement(np.array([score(np.array([index])) for index in range(len(found))]), score)


def _sequences(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
