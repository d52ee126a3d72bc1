"""Rows that begin alike: which of them share their first tokens, so that these are computed once for all.

A decoder's states of a prefix depend on the prefix alone. Rows that begin with the same tokens (a system prompt, the
header of a template) can therefore follow one copy of them in a sequence. What flows back into it is the sum over the
rows, so losses and gradients stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from edgetune.data.encode import IGNORED, Example

SHORTEST = 8
"""Tokens below which a common prefix is left in every row: as many as lengths of sequences are rounded to."""


@dataclass(frozen=True)
class Prefix:
    """First tokens that several rows have in common."""

    number: int
    """Tells it from others."""
    tokens: int
    """How many, at least `SHORTEST`."""


@dataclass(frozen=True)
class PackedRow:
    """A row in a sequence."""

    row: int
    """Which, as an index."""
    shared: int = 0
    """How many of its first tokens are not repeated: they are those of the nearest row before it that shares none."""


def common_prefixes(rows: Sequence[Example]) -> list[Prefix | None]:
    """The prefix that each row shares with others; none where it shares too little.

    A row has one prefix at most; they are chosen so that the most tokens are saved. Every row keeps its last untrained
    token before the first trained one, because what is predicted there is its own.

    Args:
        rows: At least one.
    """
    found: list[Prefix | None] = [None] * len(rows)
    limits = [_untrained(row) for row in rows]
    # Of big-endian numbers, bytes are in the order of the numbers.
    order = sorted(range(len(rows)), key=lambda row: np.asarray(rows[row].input_ids[: limits[row]], ">i4").tobytes())
    # Sorted, rows that begin alike are neighbours; the prefix of a stretch is its shortest between neighbours.
    shared = [_common(rows[a].input_ids, rows[b].input_ids, min(limits[a], limits[b])) for a, b in pairwise(order)]
    for number, (start, stop) in enumerate(_best_stretches(shared, 0, len(order))[1]):
        prefix = Prefix(number, min(shared[start : stop - 1]))
        for place in range(start, stop):
            found[order[place]] = prefix
    return found


def _best_stretches(shared: Sequence[int], start: int, stop: int) -> tuple[int, list[tuple[int, int]]]:
    """Stretches of sorted rows that save the most tokens, each with one prefix, and how many they save.

    Either all rows from `start` to `stop` share what they have in common, or they are cut where they have the least in
    common. What is in common is compared in steps of `SHORTEST`, so that cuts are never deeper than a row has of them.
    """
    if stop - start < 2:
        return 0, []
    between = shared[start : stop - 1]
    least = min(between)
    together = (stop - start - 1) * least if least >= SHORTEST else 0
    cuts = [start + 1 + place for place, tokens in enumerate(between) if tokens // SHORTEST == least // SHORTEST]
    apart = [_best_stretches(shared, *bounds) for bounds in zip([start, *cuts], [*cuts, stop], strict=True)]
    if together >= sum(saved for saved, _ in apart):
        return together, [(start, stop)] if together else []
    return sum(saved for saved, _ in apart), [stretch for _, stretches in apart for stretch in stretches]


def _untrained(row: Example) -> int:
    """First tokens of a row that it may share: neither they nor what the last of them predicts is trained."""
    trained = np.flatnonzero(np.asarray(row.labels)[1:] != IGNORED)
    return int(trained[0]) if len(trained) else len(row.labels) - 1


def _common(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """How many first tokens are the same, `limit` at most."""
    same = np.asarray(one[:limit]) == np.asarray(other[:limit])
    return limit if same.all() else int(same.argmin())
