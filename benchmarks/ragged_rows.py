"""Rows of very different lengths, as conversations have them: what packing is measured on."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from edgetune.data.encode import IGNORED, Example

Spread = Literal["log-normal", "uniform"]
"""How lengths are spread: many short rows and few long ones, as in chat data, or all lengths alike."""
SHORTEST, LONGEST = 20, 500
MEDIAN, SIGMA = 120.0, 0.7
"""Of the log-normal lengths, in tokens, before they are clipped to `SHORTEST` and `LONGEST`."""
PROMPT_SHARE = 0.2, 0.6
"""The least and the most of a row that is its prompt, which is not trained."""


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
