"""Which arrays a request was given last: one that is still in its place need not be given again.

An object that lives keeps its memory, so that the same array lies at the same address. Of one that is gone, neither the
id nor the address says anything.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

from numpy.typing import NDArray


class Bindings:
    """Of one request's inputs and outputs. They keep no array alive."""

    def __init__(self) -> None:
        self._arrays: dict[str, ref[NDArray[Any]]] = {}

    def has(self, name: str, array: NDArray[Any]) -> bool:
        """Whether this very array, no other view of its memory, was noted last under this name."""
        noted = self._arrays.get(name)
        return noted is not None and noted() is array

    def note(self, name: str, array: NDArray[Any]) -> None:
        """The request has it now."""
        self._arrays[name] = ref(array)
