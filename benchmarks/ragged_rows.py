"""What packing is measured on: rows of very different lengths, as conversations have, and rows that begin alike."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from edgetune.data.encode import IGNORED, Example

RowKind = Literal["ragged", "prefixed"]
"""Of very different lengths, or with a common prefix."""
Spread = Literal["log-normal", "uniform"]
"""How lengths are spread: many short rows and few long ones, as in chat data, or all lengths alike."""
SHORTEST, LONGEST = 20, 500
MEDIAN, SIGMA = 120.0, 0.7
"""Of the log-normal lengths, in tokens, before they are clipped to `SHORTEST` and `LONGEST`."""
PREFIX, PREFIXED, ANSWER = 200, 260, 30
"""Tokens of a common prefix, of a row that begins with it, and of its answer."""
PROMPT_SHARE = 0.2, 0.6
"""The least and the most of a row that is its prompt, which is not trained."""


def rows_of(kind: RowKind, count: int, vocabulary: int) -> list[Example]:
    """Random rows, the same each time."""
    return ragged_rows(count, vocabulary) if kind == "ragged" else prefixed_rows(count, vocabulary)


def ragged_rows(count: int, vocabulary: int, *, spread: Spread = "log-normal", seed: int = 0) -> list[Example]:
    """Random rows of `SHORTEST` to `LONGEST` tokens: a prompt, which is only read, and an answer, which is trained.

    Args:
        count: Rows.
        vocabulary: Token ids are below this; the first eight, where special tokens tend to be, are left out.
        spread: How the lengths are spread.
        seed: The same seed gives the same rows.
    """
    generator = np.random.default_rng(seed)
    if spread == "uniform":
        lengths = generator.integers(SHORTEST, LONGEST + 1, count)
    else:
        drawn = generator.lognormal(math.log(MEDIAN), SIGMA, count)
        lengths = np.clip(np.rint(drawn), SHORTEST, LONGEST).astype(np.int64)
    rows = []
    for line, length in enumerate(lengths.tolist(), start=1):
        ids = generator.integers(8, vocabulary, length).tolist()
        prompt = round(length * generator.uniform(*PROMPT_SHARE))
        rows.append(Example(line, ids, [IGNORED] * prompt + ids[prompt:]))
    return rows


def prefixed_rows(count: int, vocabulary: int, seed: int = 0) -> list[Example]:
    """Random rows of `PREFIXED` tokens that all begin with the same `PREFIX`; the last `ANSWER` tokens are trained.

    Args:
        count: Rows.
        vocabulary: Token ids are below this; the first eight are left out.
        seed: The same seed gives the same rows.
    """
    generator = np.random.default_rng(seed)
    prefix = generator.integers(8, vocabulary, PREFIX).tolist()
    rows = []
    for line in range(1, count + 1):
        ids = [*prefix, *generator.integers(8, vocabulary, PREFIXED - PREFIX).tolist()]
        rows.append(Example(line, ids, [IGNORED] * (PREFIXED - ANSWER) + ids[-ANSWER:]))
    return rows
