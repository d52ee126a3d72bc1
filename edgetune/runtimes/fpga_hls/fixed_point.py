"""Fixed-point types that hold the values seen on calibration rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDTH = 16
"""Bits of weights and activations: a DSP48E2 multiplies 27 × 18 (AMD UG579)."""
_HEADROOM = 4.0
"""How much larger values may get while adapters change, relative to the largest seen on the calibration rows."""


@dataclass(frozen=True)
class FixedPoint:
    """A signed `ap_fixed` type: `width` bits, of which `integer` stand before the point, the sign among them."""

    width: int
    integer: int

    @property
    def fraction(self) -> int:
        """Bits behind the point."""
        return self.width - self.integer

    def __str__(self) -> str:
        """As HLS C++ writes it: rounded to the nearest, ties to even; saturated."""
        return f"ap_fixed<{self.width},{self.integer},AP_RND_CONV,AP_SAT>"

    def exactly(self) -> str:
        """The same for sums of products that fit: nothing is rounded, so no circuit for it is needed."""
        return f"ap_fixed<{self.width},{self.integer}>"

    def rounded(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values rounded to the type and saturated, of any shape."""
        steps = np.rint(values * 2.0**self.fraction)
        return np.clip(steps, -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1) / 2.0**self.fraction


UNIT = FixedPoint(WIDTH, 1)
"""Of numbers between -1 and 1."""


def exponents(vectors: NDArray[np.float32]) -> NDArray[np.int32]:
    """For each of some vectors (count, size) the exponent e (count, 1) with 2^(e-1) ≤ its largest magnitude < 2^e."""
    largest: NDArray[np.float32] = np.abs(vectors).max(axis=-1, keepdims=True)
    return np.frexp(largest)[1].astype(np.int32)


def holding(largest: float, headroom: float = _HEADROOM) -> FixedPoint:
    """The type of `WIDTH` bits with the finest step that holds values up to `largest` · `headroom`."""
    needed = math.ceil(math.log2(max(largest * headroom, 2.0**-WIDTH))) + 1
    # One step below the power of two is the largest positive value.
    return FixedPoint(WIDTH, min(needed, WIDTH))


def accumulator(weight: FixedPoint, activation: FixedPoint, terms: int) -> FixedPoint:
    """A type that holds the exact sum of `terms` products of a weight and an activation."""
    grown = math.ceil(math.log2(terms)) if terms > 1 else 0
    return FixedPoint(weight.width + activation.width + grown, weight.integer + activation.integer + grown)
