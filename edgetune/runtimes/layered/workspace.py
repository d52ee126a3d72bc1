"""Arrays for what lies between graphs, made once and used again while the batch keeps its shape.

Those between the sublayers are the hidden states, which the backward pass needs again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_HALF = np.dtype(np.float16)
_SHRINK = np.float32(2**-4)
"""Applied to what is kept in float16, which then reaches to a million."""


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


class HiddenStates:
    """States by their numbers: 2 · layer enters a layer, 2 · layer + 1 its feed-forward network.

    Args:
        workspace: Gives arrays, in the backend's storage.
        short: Keep float32 in 16 bits.
    """

    def __init__(self, workspace: Workspace, short: bool) -> None:
        self._workspace = workspace
        self._short = short and workspace.storage == np.float32

    def array(self, number: int, shape: tuple[int, ...], *, kept: bool) -> NDArray[Any]:
        """Where a state is computed; when it is not kept as it is, the next but one is computed there, too."""
        own = kept and not self._short
        return self._workspace.array(f"hidden.{number}" if own else f"hidden.turn.{number % 2}", shape)

    def keep(self, number: int, hidden: NDArray[Any]) -> None:
        """Keep a state that was computed where `array` said."""
        if self._short:
            short = self._workspace.array(f"hidden.{number}", hidden.shape, _HALF)
            np.multiply(hidden, _SHRINK, out=short, dtype=np.float32, casting="same_kind")

    def take(self, number: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """A state that was kept; valid until the next but one is taken."""
        if not self._short:
            return self._workspace.array(f"hidden.{number}", shape)
        hidden = self._workspace.array(f"hidden.turn.{number % 2}", shape)
        short = self._workspace.array(f"hidden.{number}", shape, _HALF)
        np.divide(short, _SHRINK, out=hidden, dtype=np.float32)
        return hidden
