"""Batches: what the training graph takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgetune.data.encode import IGNORED, Example
from edgetune.data.prefixes import PackedRow
from edgetune.errors import DataError
from edgetune.model.rope import Rope, rope_tables

MASKED = np.float32(-1e4)
"""Added to the attention scores of positions that must not be looked at."""
Ints = NDArray[np.int64]
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Borrowed:
    """First tokens of a row that are another's, in the same sequence."""

    row: int
    """Whose they are; the row itself where it borrows none."""
    tokens: int
    """How many."""


@dataclass(frozen=True)
class Batch:
    """The arrays of one pass through the model: rows laid out for a graph.

    There are B sequences of T positions, and R rotated dimensions of a head.

    A sequence holds one row or several behind each other. No position sees another row, and each row's positions are
    counted from its first token. A row may lack first tokens that an earlier one in the sequence has: it sees those.
    """

    input_ids: NDArray[np.int64]
    """(B, T) token ids."""
    labels: NDArray[np.int64]
    """(B, T): the token to be predicted at position t, −100 where nothing is trained."""
    attn_bias: NDArray[np.float32]
    """(B, 1, T, T): 0 where position t may look, −1e4 elsewhere (later positions, other rows)."""
    rope_cos: NDArray[np.float32]
    """(B, T, R)."""
    rope_sin: NDArray[np.float32]
    """(B, T, R)."""
    rows: NDArray[np.int64]
    """(B, T): the row that a position belongs to, as an index into `examples`; −1 is padding."""
    examples: tuple[Example, ...]
    """The rows."""
    borrowed: tuple[Borrowed, ...]
    """Of each row, the first tokens that another one has for it."""
    tokens: int
    """Tokens of all rows, those that a row borrows as well."""
    trained_tokens: int
    """Labels that are not −100."""

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """What the graphs of the whole step take, by their names; layered ones take the last three."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "attn_bias": self.attn_bias,
            "rope_cos": self.rope_cos,
            "rope_sin": self.rope_sin,
        }

    def only(self, row: int) -> Batch:
        """The same batch with the labels of one row only, so that its loss is that row's.

        Args:
            row: Index into `examples`.
        """
        labels = np.where(self.rows == row, self.labels, IGNORED)
        return replace(self, labels=labels, trained_tokens=int((labels != IGNORED).sum()))

    def places(self, row: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Where a row's tokens are, in their order: its sequence, repeated, and the positions.

        Args:
            row: Index into `examples`.
        """
        sequence, first, own = _places(self.rows, row, self.borrowed[row])
        positions = np.concatenate((first, own))
        return np.full_like(positions, sequence), positions


def lay_out(
    examples: Sequence[Example],
    packs: Sequence[Sequence[PackedRow]],
    length: int,
    rope: Rope,
    pad_token_id: int,
    *,
    longest: int,
    sliding_window: int | None,
) -> Batch:
    """Make the batch of rows that were assigned to sequences.

    Args:
        examples: What the rows of `packs` are indices into.
        packs: The rows of each sequence, at least one row in all.
        length: Positions of a sequence, T; no pack has more tokens. The rest is padding, on the right.
        rope: The model's rotary embedding.
        pad_token_id: Fills the padding; no row looks at it.
        longest: Tokens of the longest of the rows for which longrope chooses its factors together.
        sliding_window: Positions that a token looks back on, itself included (transformers' `sliding_window`).
    """
    shape = len(packs), length
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    rows = np.full(shape, -1, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    laid: list[Example] = []
    borrowed: list[Borrowed] = []
    for sequence, pack in enumerate(packs):
        start = whole = 0
        for packed in pack:
            example, row, shared = examples[packed.row], len(laid), packed.shared
            whole = whole if shared else row
            end = start + len(example.input_ids) - shared
            input_ids[sequence, start:end] = example.input_ids[shared:]
            # Position t predicts the token at t + 1.
            labels[sequence, start : end - 1] = example.labels[shared + 1 :]
            rows[sequence, start:end] = row
            positions[sequence, start:end] = np.arange(shared, shared + end - start)
            laid.append(example)
            borrowed.append(Borrowed(whole, shared))
            start = end
    cos, sin = rope_tables(rope, positions, np.array([longest]))
    return Batch(
        input_ids,
        labels,
        _attention_bias(rows, positions, borrowed, sliding_window),
        cos,
        sin,
        rows,
        tuple(laid),
        tuple(borrowed),
        tokens=sum(len(example.input_ids) for example in laid),
        trained_tokens=int((labels != IGNORED).sum()),
    )


def _attention_bias(
    rows: Ints, positions: Ints, borrowed: Sequence[Borrowed], sliding_window: int | None
) -> NDArray[np.float32]:
    """(B, 1, T, T): what is added to the attention scores of sequences that hold these rows.

    Args:
        rows: As in `Batch`.
        positions: (B, T), of each token in its row.
        borrowed: As in `Batch`.
        sliding_window: Positions that a token looks back on, itself included.
    """
    # Padding sees padding, so that no row of the softmax is empty.
    visible = causal_mask(rows.shape[1], None) & (rows[:, :, None] == rows[:, None, :])
    for row, lender in enumerate(borrowed):
        if lender.tokens:
            sequence, first, own = _places(rows, row, lender)
            visible[sequence][np.ix_(own, first)] = True
    if sliding_window is not None:
        visible &= positions[:, None, :] > positions[:, :, None] - sliding_window
    return np.where(visible, np.float32(0), MASKED)[:, None]


def _places(rows: Ints, row: int, borrowed: Borrowed) -> tuple[int, NDArray[np.intp], NDArray[np.intp]]:
    """A row's sequence, and there the positions of the tokens that it borrows, and of its own."""
    sequences, own = np.nonzero(rows == row)
    sequence = int(sequences[0])
    return sequence, np.flatnonzero(rows[sequence] == borrowed.row)[: borrowed.tokens], own


def causal_mask(length: int, sliding_window: int | None) -> NDArray[np.bool_]:
    """(T, T): whether position t may look at position s.

    Args:
        length: Positions, T.
        sliding_window: Positions that a token looks back on, itself included (transformers' `sliding_window`); all
            earlier ones when it is None.
    """
    place = np.arange(length)
    visible = place <= place[:, None]
    if sliding_window is not None:
        visible &= place > place[:, None] - sliding_window
    return visible


def make_batch(
    examples: Sequence[Example],
    rope: Rope,
    pad_token_id: int,
    *,
    multiple_of: int = 8,
    sliding_window: int | None = None,
) -> Batch:
    """Pad rows on the right, a sequence for each.

    Args:
        examples: The rows, at least one.
        rope: The model's rotary embedding.
        pad_token_id: Fills the padding; no row looks at it.
        multiple_of: T is the longest row, rounded up to a multiple of this.
        sliding_window: Positions that a token looks back on, itself included (transformers' `sliding_window`).
    """
    longest = max(len(example.input_ids) for example in examples)
    return lay_out(
        examples,
        [[PackedRow(row)] for row in range(len(examples))],
        -(-longest // multiple_of) * multiple_of,
        rope,
        pad_token_id,
        longest=longest,
        sliding_window=sliding_window,
    )


def epoch_batches(examples: Sequence[RowT], batch_size: int, seed: int, shuffle: bool) -> Iterator[list[RowT]]:
    """Groups of rows, epoch after epoch without end; the last group of an epoch may be smaller.

    Args:
        examples: The rows.
        batch_size: Rows per group.
        seed: Decides the order of each epoch, together with the number of the epoch.
        shuffle: Draw a new order every epoch; otherwise the file's.

    Raises:
        DataError: There are no rows.
    """
    if not examples:
        raise DataError(["there are no rows to make batches of"])
    for epoch in count():
        indices = np.arange(len(examples))
        if shuffle:
            np.random.default_rng((seed, epoch)).shuffle(indices)
        for start in range(0, len(examples), batch_size):
            yield [examples[index] for index in indices[start : start + batch_size]]
