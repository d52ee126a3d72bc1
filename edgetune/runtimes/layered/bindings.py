"""Which arrays a runtime was given last: one that is still in its place need not be given again."""

from __future__ import annotations

from typing import Any
from weakref import ref

from numpy.typing import NDArray


class Bindings:
    """Of one request's inputs and outputs. They keep no array alive."""

    def __init__(self) -> None:
        self._arrays: dict[str, ref[NDArray[Any]]] = {}

    def renew(self, name: str, array: NDArray[Any]) -> bool:
        """Whether this is another array than the last of this name: then it has to be given."""
        last = self._arrays.get(name)
        if last is not None and last() is array:
            return False
        self._arrays[name] = ref(array)
        return True
