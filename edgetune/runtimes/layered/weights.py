"""The frozen weights as the graphs take them: all resident, or dequantised into one buffer when they are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.frozen import FrozenWeights
from edgetune.pieces import Part
from edgetune.runtimes.layered.backend import Backend


class LinearWeights:
    """Linear weights in the backend's storage.

    Args:
        frozen: Where they come from.
        backend: Dequantises them.
        resident: Keep every weight once it is dequantised.
    """

    def __init__(self, frozen: FrozenWeights, backend: Backend, resident: bool) -> None:
        self._frozen = frozen
        self._backend = backend
        self._resident: dict[Part, NDArray[Any]] | None = {} if resident else None
        self._buffer: NDArray[Any] = np.empty(0, dtype=backend.storage)

    def take(self, parts: Mapping[str, Part]) -> dict[str, NDArray[Any]]:
        """These parts of tensors, whose names are the checkpoint's; valid until the next call."""
        if self._resident is not None:
            for part in parts.values():
                if part not in self._resident:
                    self._resident[part] = np.empty(self._shape(part), dtype=self._backend.storage)
                    self._read(part, self._resident[part])
            return {name: self._resident[part] for name, part in parts.items()}
        shapes = {name: self._shape(part) for name, part in parts.items()}
        total = sum(map(math.prod, shapes.values()))
        if total > self._buffer.size:
            self._buffer = np.empty(total, dtype=self._backend.storage)
        taken, start = {}, 0
        for name, shape in shapes.items():
            end = start + math.prod(shape)
            taken[name] = self._buffer[start:end].reshape(shape)
            self._read(parts[name], taken[name])
            start = end
        return taken

    def _shape(self, part: Part) -> tuple[int, int]:
        high, wide = self._frozen.shape(part.parameter)
        (top, bottom), (left, right) = part.rows or (0, high), part.columns or (0, wide)
        return bottom - top, right - left

    def _read(self, part: Part, out: NDArray[Any]) -> None:
        row = 0
        for block in self._frozen.linear(part.parameter, part.rows, part.columns):
            rows = len(block.values)
            self._backend.dequantise(block, out[row : row + rows])
            row += rows
