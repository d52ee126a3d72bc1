"""Rows of random tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgetune.data.encode import IGNORED, Example


def rows_of(seed: int, lengths: list[int]) -> list[Example]:
    """Random rows; the first few tokens of each and some in between are not trained."""
    generator = np.random.default_rng(seed)
    examples = []
    for index, length in enumerate(lengths):
        ids = generator.integers(3, 440, length)
        labels = np.where(generator.random(length) < 0.2, IGNORED, ids)
        labels[: index + 1] = IGNORED
        labels[-1] = ids[-1]
        examples.append(Example(index, ids.tolist(), labels.tolist()))
    return examples


def lengths_of(variant: str, seed: int) -> list[int]:
    """Of different length, so that there is padding. transformers picks longrope's factors for a whole batch, so its
    rows are all short or all longer than the 64 positions of the short factors."""
    lowest, highest = (66, 90) if variant == "longrope" and seed % 2 == 0 else (6, 40)
    return [int(length) for length in np.random.default_rng(seed).integers(lowest, highest, 4)]


def prompted_rows(lengths: Sequence[int], vocabulary: int = 448, seed: int = 0) -> list[Example]:
    """Rows with a prompt that is not trained."""
    generator = np.random.default_rng(seed)
    rows = []
    for line, length in enumerate(lengths, start=1):
        ids = generator.integers(3, vocabulary, length).tolist()
        prompt = int(generator.integers(1, length - 2))
        rows.append(Example(line, ids, [IGNORED] * prompt + ids[prompt:]))
    return rows


def rows_with_prefixes(
    tails: Sequence[Sequence[int]], prefix: int, vocabulary: int = 448, seed: int = 0
) -> list[Example]:
    """Rows that begin alike.

    Args:
        tails: For each prefix, how many tokens follow it in each of its rows, at least 3.
        prefix: Tokens of a prefix.
        vocabulary: Token ids are below this.
        seed: The same seed gives the same rows.
    """
    generator = np.random.default_rng(seed)
    rows: list[Example] = []
    for lengths in tails:
        first = generator.integers(3, vocabulary, prefix).tolist()
        for length in lengths:
            ids = [*first, *generator.integers(3, vocabulary, length).tolist()]
            rows.append(Example(len(rows), ids, [*[IGNORED] * (prefix + 1), *ids[prefix + 1 :]]))
    return rows
