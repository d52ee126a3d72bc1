"""The frozen weights as the sublayers take them: all resident, or dequantised into one buffer when they are used."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.frozen import FrozenWeights
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
        self._resident: dict[str, NDArray[Any]] | None = {} if resident else None
        self._buffer: NDArray[Any] = np.empty(0, dtype=backend.storage)

    def take(self, names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """The weights called so, valid until the next call."""
        names = list(names)
        if self._resident is not None:
            for name in names:
                if name not in self._resident:
                    self._resident[name] = np.empty(self._frozen.shape(name), dtype=self._backend.storage)
                    self._backend.dequantise(self._frozen, name, self._resident[name])
            return {name: self._resident[name] for name in names}
        sizes = [math.prod(self._frozen.shape(name)) for name in names]
        if sum(sizes) > self._buffer.size:
            self._buffer = np.empty(sum(sizes), dtype=self._backend.storage)
        taken, start = {}, 0
        for name, size in zip(names, sizes, strict=True):
            taken[name] = self._buffer[start : start + size].reshape(self._frozen.shape(name))
            self._backend.dequantise(self._frozen, name, taken[name])
            start += size
        return taken
