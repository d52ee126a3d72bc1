"""Arrays for what lies between graphs, made once and used again while the batch keeps its shape."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Workspace:
    """Named arrays.

    Args:
        storage: Their type, unless another is asked for.
    """

    def __init__(self, storage: np.dtype[Any]) -> None:
        self.storage = storage
        self._shape: tuple[int, ...] = ()
        self._arrays: dict[str, NDArray[Any]] = {}

    def fit(self, shape: tuple[int, ...]) -> None:
        """Give everything back when the batch has another shape than before."""
        if shape != self._shape:
            self._arrays.clear()
            self._shape = shape

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
        """The array called so; its values are those it had when it was last used."""
        if name not in self._arrays:
            self._arrays[name] = np.empty(shape, dtype=dtype or self.storage)
        return self._arrays[name]

    def drop(self, part: str) -> None:
        """Give back the arrays with this part of a name, between dots."""
        self._arrays = {name: array for name, array in self._arrays.items() if part not in name.split(".")}

    def like(self, name: str, other: NDArray[Any]) -> NDArray[Any]:
        """The same of another array's shape."""
        return self.array(name, other.shape)
