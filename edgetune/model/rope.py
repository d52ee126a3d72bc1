"""Rotary position embedding: the cos and sin tables that the training graphs take as inputs.

The graphs leave the choice between longrope's short and long factors to this module, which decides by the longest row
of a batch, as transformers' `modeling_rope_utils` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, as the training loop needs it (transformers' `modeling_rope_utils`)."""

    dim: int
    """Rotated dimensions of a head."""
    theta: float
    """Base of the frequencies."""
    attention_factor: float
    """Scale on cos and sin (longrope), 1 otherwise."""
    short_factor: list[float] | None
    """longrope: divisors of the frequencies up to `original_max_position_embeddings`, dim / 2 of them."""
    long_factor: list[float] | None
    """longrope: the same for longer rows."""
    original_max_position_embeddings: int
    """Longest row for which the short factors hold."""


def rope_tables(
    rope: Rope, positions: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cos and sin of every position.

    Args:
        rope: The model's rotary embedding.
        positions: (B, T), counted from 0.
        lengths: (B,) tokens of each row; longrope's long factors serve a batch whose longest row has more than
            `rope.original_max_position_embeddings`.

    Returns:
        cos and sin, each (B, T, rope.dim).
    """
    is_long = lengths.max() > rope.original_max_position_embeddings
    frequencies = _inverse_frequencies(rope, rope.long_factor if is_long else rope.short_factor)
    angles = positions.astype(np.float32)[:, :, None] * frequencies
    angles = np.concatenate([angles, angles], axis=-1)
    scale = np.float32(rope.attention_factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def _inverse_frequencies(rope: Rope, factors: list[float] | None) -> NDArray[np.float32]:
    # In float32 like transformers', but for the power: torch's is exact to the last bit, numpy's float32 one is not.
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    powers = np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    scales = np.float32(1) if factors is None else np.asarray(factors, dtype=np.float32)
    return (np.float32(1) / (scales * powers)).astype(np.float32)
