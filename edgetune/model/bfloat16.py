"""bfloat16, the upper half of a float32. numpy does not have it: its bits are held as uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BFLOAT16 = np.dtype(np.uint16)


def to_bfloat16(values: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Rounded to the nearest, ties to even; what is beyond the largest number becomes infinity."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact."""
    return (values.astype(np.uint32) << 16).view(np.float32)
