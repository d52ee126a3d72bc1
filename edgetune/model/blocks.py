"""Blocks of quantised weights: neighbours that share a scale, and the numbers that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 32
"""Neighbouring weights along the input that share a scale in an int4 or int8 model."""
BITS = {"int4": 4, "int8": 8}
"""Of a weight that is stored in blocks, by the name of its layout, which is that of the base."""
Range = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """Rows of a linear weight as they are stored: views of the file, not always contiguous."""

    values: NDArray[Any]
    """float32 or float16 (rows, in); uint8 (rows, in / 2) with two int4 weights a byte, or (rows, in) of int8."""
    scales: NDArray[np.float32] | None
    """(rows, in / 32) of weights in blocks."""
    group: int = 0
    """Of so many columns the even ones are to come first, then the odd ones; 0: they stay where they are."""
    bits: int = 0
    """Of a weight in blocks."""

    @property
    def zero_point(self) -> int:
        """What stands for a weight of zero in blocks."""
        return 1 << (self.bits - 1)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, in)."""
        rows, columns = self.values.shape
        return rows, 8 * columns // self.bits if self.bits else columns


def dequantised(block: Block) -> NDArray[np.float32]:
    """A weight in blocks (rows, in): (q − zero point) · scale."""
    weight = np.empty(block.shape, dtype=np.float32)
    if block.bits == 4:
        weight[:, 0::2], weight[:, 1::2] = block.values & 15, block.values >> 4
    else:
        weight[...] = block.values
    weight -= block.zero_point
    assert block.scales is not None  # for mypy: a weight in blocks has them
    weight.reshape(*block.scales.shape, BLOCK_SIZE)[...] *= block.scales[:, :, None]
    return weight
