"""Which rows share a pass through the model, and which share a sequence of it.

Rows differ in length, and what is computed on padding is lost. So rows are packed: several stand behind each other in
one sequence, and none sees another; what rows of a sequence begin with in common stands there once. What a pass may
hold stays what a number of the longest rows, padded, would take: packing never needs more memory than the worst batch
without it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgetune.data.prefixes import PackedRow, Prefix
from edgetune.model.architecture import Architecture, frozen_weights

MULTIPLE = 8
"""Lengths of sequences are multiples of this, the float32 numbers in a vector register."""
ATTENTION_COST = 2.0
"""Measured time of a multiplication in attention, with its share of the softmax, relative to one in a projection."""
PASS_COST = 32
"""Measured cost of a pass beside that of its positions, in positions: reading weights, starting operators."""


@dataclass(frozen=True)
class Pass:
    """Which rows go through the model together, and which of them share a sequence; `Batch` has their arrays."""

    length: int
    """Positions of each sequence, T."""
    packs: list[list[PackedRow]]
    """The rows of each sequence, in their order, as indices into the given lengths."""


@dataclass(frozen=True)
class Capacity:
    """How much the largest pass holds: `rows` sequences of `longest` positions."""

    rows: int
    longest: int
    """The longest row, rounded up."""
    limit: int
    """Longest sequence that may hold several rows, rounded up; at least `longest`."""

    @property
    def positions(self) -> int:
        """Most positions of all sequences of a pass together."""
        return self.rows * self.longest

    @property
    def scores(self) -> int:
        """Most attention scores of one head in a pass."""
        return self.positions * self.longest

    def sequences(self, length: int) -> int:
        """Number of sequences of `length` positions that need no more positions and scores than the largest pass."""
        return min(self.positions // length, self.scores // length**2)


def round_up(length: int, limit: int | None = None) -> int:
    """Round a length up to one of few, so that few shapes occur: sixteen between a power of two and the next.

    Args:
        length: Tokens, at least one.
        limit: The longest row there may be; nothing is rounded further than to the next multiple of 8 after it.
    """
    step = max(MULTIPLE, 1 << max(0, (length - 1).bit_length() - 5))
    rounded = -(-length // step) * step
    return rounded if limit is None else min(rounded, -(-limit // MULTIPLE) * MULTIPLE)


def attention_share(architecture: Architecture) -> float:
    """Cost of attending to one more position, relative to the cost of all else that is computed for a position."""
    heads = architecture.num_attention_heads * architecture.head_dim
    projections = sum(frozen_weights(architecture).values())
    # Forward and backward, attention multiplies six times a position, head and dimension, a frozen weight twice.
    return ATTENTION_COST * 3 * heads / projections


def pack(
    lengths: Sequence[int], prefixes: Sequence[Prefix | None], capacity: Capacity, attention: float
) -> list[Pass]:
    """Spread rows over sequences and passes, with the least work.

    Args:
        lengths: Tokens of each row, at least one row, none longer than `capacity.longest`.
        prefixes: Of each row, what it has in common with others.
        capacity: The largest pass.
        attention: The `attention_share` of the model.
    """
    return min(_candidates(lengths, prefixes, capacity), key=lambda passes: pass_work(passes, attention))


def pass_work(passes: Sequence[Pass], attention: float) -> float:
    """Cost of passes, in positions.

    Args:
        passes: The passes.
        attention: The `attention_share` of the model.
    """
    return sum(len(item.packs) * item.length * (1 + attention * item.length) + PASS_COST for item in passes)


def pad(lengths: Sequence[int], capacity: Capacity) -> list[Pass]:
    """A sequence for each row; rows of similar length share a pass.

    Args:
        lengths: Tokens of each row, at least one row, none longer than `capacity.longest`.
        capacity: The largest pass.
    """
    order = longest_first(lengths)
    groups = [order[start : start + capacity.rows] for start in range(0, len(order), capacity.rows)]
    return [Pass(round_up(lengths[group[0]], capacity.limit), [[PackedRow(row)] for row in group]) for group in groups]


def _candidates(
    lengths: Sequence[int], prefixes: Sequence[Prefix | None], capacity: Capacity
) -> Iterator[list[Pass]]:
    """The rows in sequences of each length that there is room for, until one holds them all."""
    length = 0
    while length < capacity.limit:
        length = round_up(max(length + 1, *lengths), capacity.limit)
        sequences = capacity.sequences(length)
        if not sequences:
            return
        packs = best_fit(lengths, prefixes, length)
        passes = -(-len(packs) // sequences)
        # Evenly filled, so that two shapes occur at most.
        yield [Pass(length, packs[index::passes]) for index in range(passes)]
        if len(packs) == 1:
            return


def best_fit(lengths: Sequence[int], prefixes: Sequence[Prefix | None], length: int) -> list[list[PackedRow]]:
    """Best fit decreasing: the longest row first, each into the sequence that it fills most.

    A row goes where its prefix is already, if there is room for the rest of it.

    Args:
        lengths: Tokens of each row.
        prefixes: Of each row, what it has in common with others.
        length: Of a sequence.
    """
    packs: list[list[list[PackedRow]]] = []
    """Of each sequence, rows with those that share their prefix behind them."""
    spaces: list[tuple[int, int]] = []
    """Free positions of each sequence and its index, in ascending order."""
    free: list[int] = []
    """Free positions of each sequence."""
    holding: defaultdict[Prefix, dict[int, list[PackedRow]]] = defaultdict(dict)
    """Where in which sequences a prefix is."""
    for row in longest_first(lengths):
        prefix, tokens = prefixes[row], lengths[row]
        places = {} if prefix is None else holding[prefix]
        rest = tokens if prefix is None else tokens - prefix.tokens
        index = min((index for index in places if free[index] >= rest), key=free.__getitem__, default=None)
        if index is not None and prefix is not None:
            places[index].append(PackedRow(row, prefix.tokens))
            tokens = rest
        else:
            found = bisect_left(spaces, (tokens, 0))
            index = spaces[found][1] if found < len(spaces) else len(packs)
            if index == len(packs):
                packs.append([])
                free.append(length)
                insort(spaces, (length, index))
            places[index] = [PackedRow(row)]
            packs[index].append(places[index])
        del spaces[bisect_left(spaces, (free[index], index))]
        free[index] -= tokens
        insort(spaces, (free[index], index))
    return [[row for rows in pack for row in rows] for pack in packs]


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices of the rows, the longest first."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])
