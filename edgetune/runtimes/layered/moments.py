"""AdamW's moments of a flat vector of parameters: as they are, or in 8 bits between the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.model.dynamic_code import BLOCK, BlockCode
from edgetune.runtimes.layered.parameters import Array

STRETCH = 1 << 18
"""Numbers of the flat vector that are updated at a time: what lies between the graph's operators stays in the cache."""


class Moment(Protocol):
    """One of the two moments, zero at the start."""

    def opened(self, stretch: slice) -> AbstractContextManager[Array]:
        """The numbers of a stretch as float32, to be changed in place; changes hold from the end of the context on.

        Args:
            stretch: Where it begins and ends in the vector, at most `STRETCH` numbers.
        """
        ...

    def state(self) -> Mapping[str, NDArray[Any]]:
        """What it holds, by suffixes of its name; the arrays themselves."""
        ...


class ExactMoment:
    """In float32.

    Args:
        size: Numbers.
    """

    def __init__(self, size: int) -> None:
        self._numbers: Array = np.zeros(size, np.float32)

    @contextmanager
    def opened(self, stretch: slice) -> Iterator[Array]:
        """See `Moment.opened`."""
        yield self._numbers[stretch]

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Moment.state`."""
        return {"": self._numbers}


class CodedMoment:
    """In 8 bits; see `edgetune.model.dynamic_code`.

    Args:
        size: Numbers, in whole blocks.
        signed: Whether they may be negative.
    """

    def __init__(self, size: int, *, signed: bool) -> None:
        self._code = BlockCode(signed=signed)
        self._opened: Array = np.empty(min(size, STRETCH), np.float32)
        # Whatever the codes are, numbers whose scale is zero are.
        self._codes = np.zeros(size, np.uint8)
        self._scales: Array = np.zeros(size // BLOCK, np.float32)

    @contextmanager
    def opened(self, stretch: slice) -> Iterator[Array]:
        """See `Moment.opened`; the stretch begins and ends where blocks do."""
        codes, scales = self._codes[stretch], self._scales[stretch.start // BLOCK : stretch.stop // BLOCK]
        numbers = self._opened[: codes.size]
        self._code.dequantise(codes, scales, numbers)
        yield numbers
        self._code.quantise(numbers, codes, scales)

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Moment.state`."""
        return {".codes": self._codes, ".scales": self._scales}
