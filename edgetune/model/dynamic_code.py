"""Numbers in 8 bits, as optimizer states are kept: a dynamic tree code, and a float32 scale for each block of them.

After Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". Within a block numbers are divided by the
largest magnitude, and each is rounded to the nearest of 256 values. In a byte of the code, after the sign, as many
zeros as the value has leading decimal zeros come before a one; the bits behind that one say where in its decade the
value lies: in the middle of one of as many equal intervals, from 0.1 to 1, as these bits can tell apart. So values near
the largest are 1.4% of it apart, and the smallest is 5.5e-7 of it. Numbers that are never negative need no sign: its
bit is one more behind the one, which halves the intervals. Of the two bytes without a one, one is 0 and the other 1.

Here a code is the place of a value in ascending order, which says the same as the byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Numbers that share a scale."""
BYTES_A_NUMBER = 1 + 4 / BLOCK
"""Of a code, and its share of a scale."""
_TREE_BITS = 7
"""Of a byte, beside the sign or what stands in its place."""
_LOW_BITS = 16
"""Of a float32, by which it is not looked up: the other 16 tell any two middles between values apart."""
_CHUNK = 1 << 15
"""Numbers that are worked on at a time: their arrays stay in the processor's cache."""
_SMALLEST = np.finfo(np.float32).tiny
"""Largest magnitude, at least, of a block that is not all zeros: smaller numbers have fewer digits, and graphs take
them as zero."""

Array = NDArray[np.float32]


def code_values(*, signed: bool) -> Array:
    """The values of the code (256,), ascending: from -0.993, or 0, to 1.

    Args:
        signed: Whether there are negative ones.
    """
    magnitudes = []
    for zeros in range(_TREE_BITS):
        intervals = 1 << (_TREE_BITS - 1 - zeros + (not signed))
        edges = np.linspace(0.1, 1, intervals + 1)
        magnitudes.append((edges[1:] + edges[:-1]) / 2 * 10.0**-zeros)
    positive = np.concatenate(magnitudes)
    negative = -positive if signed else positive[:0]
    return np.sort(np.concatenate([negative, positive, [0.0, 1.0]])).astype(np.float32)


class BlockCode:
    """Turns flat vectors, of whole blocks, into codes with scales, and back.

    A number that is never negative is not rounded to zero unless it is zero: AdamW divides by the root of its second
    moment, and a first moment over nothing is a step without bounds.

    Args:
        signed: Whether numbers may be negative.
    """

    def __init__(self, *, signed: bool) -> None:
        self.values = code_values(signed=signed)
        middles = (self.values[1:].astype(np.float64) + self.values[:-1]) / 2
        if not signed:
            middles[0] = 0.0
        # A float32 is above a middle exactly if it is above the last float32 that is not.
        borders = middles.astype(np.float32)
        borders = np.where(borders > middles, np.nextafter(borders, np.float32(-np.inf)), borders)
        # A float32 is looked up by its upper 16 bits: how many borders are below all numbers that have these, and the
        # next one, which may lie among them.
        upper = np.arange(1 << 16, dtype=np.uint32) << _LOW_BITS
        ends = np.stack([upper, upper | (1 << _LOW_BITS) - 1]).view(np.float32)
        # Of what is no number no code is ever asked for.
        places = np.searchsorted(borders, np.fmin(*ends))
        self._below = places.astype(np.uint8)
        self._border = np.append(borders, np.float32(np.inf))[places]

    def quantise(self, numbers: Array, codes: NDArray[np.uint8], scales: Array) -> None:
        """Round to the nearest values.

        Args:
            numbers: Finite, (blocks · 256,).
            codes: Is overwritten, (blocks · 256,).
            scales: Is overwritten with the largest magnitude of each block, (blocks,); of what is no normal float32, 0.
        """
        for start in range(0, numbers.size, _CHUNK):
            blocks = numbers[start : start + _CHUNK].reshape(-1, BLOCK)
            largest = np.abs(blocks).max(axis=1)
            largest[largest < _SMALLEST] = 0
            scales[start // BLOCK : start // BLOCK + largest.size] = largest
            shares = (blocks / np.maximum(largest, _SMALLEST)[:, None]).reshape(-1)
            upper = (shares.view(np.uint32) >> _LOW_BITS).astype(np.intp)
            found = codes[start : start + _CHUNK]
            # Nothing is out of range; to clip is faster than to check.
            self._below.take(upper, out=found, mode="clip")
            found += shares > self._border.take(upper, mode="clip")

    def dequantise(self, codes: NDArray[np.uint8], scales: Array, numbers: Array) -> None:
        """The numbers that `quantise` rounded to.

        Args:
            codes: (blocks · 256,).
            scales: (blocks,).
            numbers: Is overwritten, (blocks · 256,).
        """
        for start in range(0, codes.size, _CHUNK):
            found = numbers[start : start + _CHUNK]
            self.values.take(codes[start : start + _CHUNK], out=found, mode="clip")
            blocks = found.reshape(-1, BLOCK)
            blocks *= scales[start // BLOCK : start // BLOCK + len(blocks), None]
