"""The LoRA parameters of the layered form, behind each other in one array."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class FlatParameters:
    """Parameters by name, as views of one vector.

    Args:
        parameters: First values; they are copied.
        multiple: Each begins at a multiple of this many numbers, and zeros fill the gaps.
    """

    def __init__(self, parameters: Mapping[str, Array], multiple: int = 1) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._size = 0
        for name, array in parameters.items():
            self._places[name] = (self._size, array.shape)
            self._size += -(-array.size // multiple) * multiple
        self._parameter = np.zeros(self._size, dtype=np.float32)
        for name, array in parameters.items():
            self.parameter(name)[...] = array

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def parameter(self, name: str) -> Array:
        """A parameter, as a view that can be written."""
        return self._view(self._parameter, name)

    def _view(self, flat: Array, name: str) -> Array:
        start, shape = self._places[name]
        return flat[start : start + math.prod(shape)].reshape(shape)
