"""The frozen weights as the graphs take them: all resident, or made in reused memory where they are needed.

The scales of an int8 matrix stay in either case: they are small, and to find them takes longer than the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.roles import SCALES
from edgetune.model.pieces import LAYER_PREFIX, Slice
from edgetune.runtimes.layered.backend import Allocate, Backend

_WEIGHT = ".weight"
_ALIGNMENT = 64
"""Bytes: a cache line."""


class LinearWeights:
    """What graphs take of linear weights.

    Args:
        frozen: Where they come from.
        backend: Knows what becomes of them.
        resident: Keep all that was made of a weight.
        memory: For what is not kept; several may share it, of which one is used at a time.
    """

    def __init__(self, frozen: FrozenWeights, backend: Backend, resident: bool, memory: ReusedMemory) -> None:
        self.frozen, self.resident = frozen, resident
        self._backend = backend
        self._made: dict[tuple[str, Slice], dict[str, NDArray[Any]]] = {}
        self._scales: dict[tuple[str, Slice], NDArray[np.float32]] = {}
        self._memory = memory

    def take(self, slices: Mapping[str, Slice]) -> dict[str, NDArray[Any]]:
        """The arrays of these inputs, valid until the next call; the slices are of the checkpoint's parameters.

        Scales come with the input whose scales they are.
        """
        self._memory.use_again()
        taken = {}
        for name, slice_ in slices.items():
            for suffix, array in self._arrays(weight_and_layout(name)[1], slice_).items():
                taken[name + suffix] = array
        return taken

    def release(self, layers: range) -> None:
        """Let go of what was made of these layers' weights; it is made again if it is needed again."""
        prefixes = tuple(map(LAYER_PREFIX.format, layers))
        self._made = {key: made for key, made in self._made.items() if not key[1].parameter.startswith(prefixes)}

    def _arrays(self, layout: str, slice_: Slice) -> dict[str, NDArray[Any]]:
        if not self.resident:
            return self._make(layout, slice_, self._memory.allocate)
        if (layout, slice_) not in self._made:
            self._made[layout, slice_] = self._make(layout, slice_, np.empty)
        return self._made[layout, slice_]

    def _make(self, layout: str, slice_: Slice, allocate: Allocate) -> dict[str, NDArray[Any]]:
        block = self.frozen.linear(slice_.parameter, slice_.rows, slice_.columns)
        ordered = self._backend.channels.block(slice_, block)
        made = self._backend.weight(layout, ordered, allocate, self._scales.get((layout, slice_)))
        if SCALES in made:
            self._scales[layout, slice_] = made[SCALES]
        return made


def weight_and_layout(name: str) -> tuple[str, str]:
    """`q_proj.weight.forward` takes the weight `q_proj.weight` in the layout `forward`; a weight itself has none."""
    weight, _, layout = name.partition(f"{_WEIGHT}.")
    return (weight + _WEIGHT, layout) if layout else (name, "")


class ReusedMemory:
    """Arrays behind each other in one buffer, as large as those that were ever asked for together."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self._used = 0

    def use_again(self) -> None:
        """What was given before may be overwritten."""
        if self._used > self._buffer.size:
            self._buffer = np.empty(self._used, np.uint8)
        self._used = 0

    def release(self) -> None:
        """Give the buffer back; it grows again as it is needed."""
        self._buffer = np.empty(0, np.uint8)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """See `Allocate`."""
        size = math.prod(shape) * dtype.itemsize
        start = self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        if self._used > self._buffer.size:
            return np.empty(shape, dtype)
        return self._buffer[start : start + size].view(dtype).reshape(shape)
