"""Batches: what the training graph takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgetune.data.encode import IGNORED, Example
from edgetune.errors import DataError
from edgetune.manifest import Rope
from edgetune.rope import rope_tables

MASKED = np.float32(-1e4)
"""Added to the attention scores of positions that must not be looked at."""
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Batch:
    """Padded rows, ready for a graph. B rows, T positions, R rotated dimensions of a head."""

    input_ids: NDArray[np.int64]
    """(B, T) token ids."""
    labels: NDArray[np.int64]
    """(B, T): the token that shall follow position t, −100 where nothing is trained."""
    attn_bias: NDArray[np.float32]
    """(B, 1, T, T): 0 where position t may look, −1e4 elsewhere (later positions, padding)."""
    rope_cos: NDArray[np.float32]
    """(B, T, R)."""
    rope_sin: NDArray[np.float32]
    """(B, T, R)."""
    tokens: int
    """Tokens that are not padding."""
    trained_tokens: int
    """Labels that are not −100."""

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """What every training graph takes, by the graphs' names."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "attn_bias": self.attn_bias,
            "rope_cos": self.rope_cos,
            "rope_sin": self.rope_sin,
        }


def make_batch(
    examples: Sequence[Example],
    rope: Rope,
    pad_token_id: int,
    *,
    multiple_of: int = 8,
    sliding_window: int | None = None,
) -> Batch:
    """Pad rows on the right and lay out all that a training graph takes.

    Args:
        examples: The rows, at least one.
        rope: The model's rotary embedding.
        pad_token_id: Fills the padding; nothing looks at it.
        multiple_of: T is the longest row, rounded up to a multiple of this.
        sliding_window: Positions that a token looks back on, itself included (transformers' `sliding_window`).
    """
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    rows, columns = len(examples), -(-int(lengths.max()) // multiple_of) * multiple_of
    input_ids = np.full((rows, columns), pad_token_id, dtype=np.int64)
    labels = np.full((rows, columns), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        input_ids[row, : lengths[row]] = example.input_ids
        labels[row, : lengths[row] - 1] = example.labels[1:]
    positions = np.arange(columns, dtype=np.int64)
    query, key = positions[:, None], positions[None, :]
    visible = key <= query
    if sliding_window is not None:
        visible &= key > query - sliding_window
    # Padding looks at itself, so that no row of the softmax is empty.
    allowed = visible & ((key < lengths[:, None, None]) | (key == query))
    attn_bias = np.where(allowed, np.float32(0), MASKED)[:, None]
    cos, sin = rope_tables(rope, np.broadcast_to(positions, (rows, columns)), lengths)
    return Batch(input_ids, labels, attn_bias, cos, sin, int(lengths.sum()), int((labels != IGNORED).sum()))


def epoch_batches(examples: Sequence[RowT], batch_size: int, seed: int, shuffle: bool) -> Iterator[list[RowT]]:
    """Groups of rows without end, epoch after epoch; the last one of an epoch may be smaller.

    Args:
        examples: The rows.
        batch_size: Rows a group.
        seed: With the number of the epoch it decides the order of that epoch.
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
