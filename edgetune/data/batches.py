"""Batches: what the training graph takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
