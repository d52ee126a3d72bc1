"""Arrays as OpenVINO's tensors."""

from __future__ import annotations

from typing import Any

import openvino as ov
from numpy.typing import NDArray

from edgetune.model.bfloat16 import BFLOAT16


def tensor(array: NDArray[Any]) -> ov.Tensor:
    """The array's own memory as a tensor."""
    if array.dtype == BFLOAT16:
        return ov.Tensor(array, ov.Shape(array.shape), ov.Type.bf16)
    return ov.Tensor(array, shared_memory=True)
