"""Arrays as OpenVINO's tensors. numpy has no bfloat16: its bits are held as uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

BFLOAT16 = np.dtype(np.uint16)


def tensor(array: NDArray[Any]) -> ov.Tensor:
    """The array's own memory as a tensor."""
    if array.dtype == BFLOAT16:
        return ov.Tensor(array, ov.Shape(array.shape), ov.Type.bf16)
    return ov.Tensor(array, shared_memory=True)


def to_bfloat16(values: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact."""
    return (values.astype(np.uint32) << 16).view(np.float32)
