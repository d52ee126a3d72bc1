"""Arrays for what lies between graphs, made once and used again while the batch keeps its shape.

Those between the sublayers are the hidden states, which the backward pass needs again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.runtimes.layered.backend import Backend

_FLOAT, _HALF, _EXPONENT = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int32)
_HALF_EXPONENT = 15
"""Float16 reaches almost to 2^16. A trained model has rows with one number that is ten thousand times the others."""


@dataclass(frozen=True)
class Halves:
    """Float32 numbers in 16 bits: what a position's numbers have in common is a power of two of its own."""

    numbers: NDArray[np.float16]
    """(..., hidden_size)."""
    exponents: NDArray[np.int32]
    """(..., 1): of the powers of two that they are to be multiplied with, plus a constant."""

    @classmethod
    def of(cls, hidden: NDArray[np.float32]) -> Halves:
        """New arrays that hold these numbers (..., hidden_size)."""
        halves = cls(np.empty(hidden.shape, _HALF), np.empty((*hidden.shape[:-1], 1), _EXPONENT))
        halves.keep(hidden)
        return halves

    def keep(self, hidden: NDArray[np.float32]) -> None:
        """Hold these numbers (..., hidden_size)."""
        # The largest of a position becomes one half to one times 2^_HALF_EXPONENT, whatever it was.
        self.exponents[...] = np.frexp(np.abs(hidden).max(axis=-1, keepdims=True))[1]
        np.ldexp(hidden, _HALF_EXPONENT - self.exponents, out=self.numbers, casting="same_kind", dtype=np.float32)

    def take(self, hidden: NDArray[np.float32]) -> None:
        """Write the numbers, as they were rounded, into an array (..., hidden_size)."""
        np.ldexp(self.numbers, self.exponents - _HALF_EXPONENT, out=hidden, dtype=np.float32)


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
        """The same of another array's shape and type."""
        return self.array(name, other.shape, other.dtype)


class HiddenStates:
    """States by their numbers: 2 · layer enters a layer, 2 · layer + 1 its feed-forward network.

    They are float32 where they are computed, so that no rounding adds up from layer to layer. What the backward pass
    takes is kept in the backend's storage, or in 16 bits.

    Args:
        workspace: Gives arrays.
        backend: Converts to its storage.
        short: Keep float32 in 16 bits.
    """

    def __init__(self, workspace: Workspace, backend: Backend, short: bool) -> None:
        self._workspace = workspace
        self._backend = backend
        self._float = backend.storage == _FLOAT
        self._short = short and self._float

    def array(self, number: int, shape: tuple[int, ...], *, kept: bool) -> NDArray[np.float32]:
        """Where a state is computed; when it is not kept as it is, the next but one is computed there, too."""
        own = kept and self._as_it_is
        return self._workspace.array(f"hidden.{number}" if own else f"hidden.turn.{number % 2}", shape, _FLOAT)

    def keep(self, number: int, hidden: NDArray[np.float32]) -> None:
        """Keep a state that was computed where `array` said."""
        if self._short:
            self._halves(number, hidden.shape).keep(hidden)
        elif not self._float:
            self._backend.store(hidden, self._workspace.array(f"hidden.{number}", hidden.shape))

    def take(self, number: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A state that was kept; valid until the next but one is taken."""
        if self._as_it_is:
            return self._workspace.array(f"hidden.{number}", shape, _FLOAT)
        hidden = self.array(number, shape, kept=False)
        if self._short:
            self._halves(number, shape).take(hidden)
        else:
            hidden[...] = self._backend.restore(self._workspace.array(f"hidden.{number}", shape))
        return hidden

    @property
    def _as_it_is(self) -> bool:
        return self._float and not self._short

    def _halves(self, number: int, shape: tuple[int, ...]) -> Halves:
        exponents = self._workspace.array(f"hidden.{number}.exponents", (*shape[:-1], 1), _EXPONENT)
        return Halves(self._workspace.array(f"hidden.{number}", shape, _HALF), exponents)
