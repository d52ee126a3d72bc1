"""What a runtime has to offer for the layered form."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.model.blocks import Block
from edgetune.runtimes.layered.channels import Channels

Arrays = Mapping[str, NDArray[Any]]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""Gives an array of this shape and type, whose values do not matter."""


class LayeredGraph(Protocol):
    """One loaded graph."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, inputs: Arrays, outputs: Arrays, bound_as: Hashable = None) -> None:
        """Compute; results are written into the arrays of `outputs`, all arrays being contiguous.

        Args:
            inputs: Every one of the graph's.
            outputs: Every one of the graph's.
            bound_as: Where in the model the graph runs. An array that it was given there before, the same object, is
                not bound again.
        """
        ...


class Backend(Protocol):
    """Loads graphs, and holds numbers the way it computes with them."""

    storage: np.dtype[Any]
    """Of what is kept for the backward pass."""
    sublayers: str
    """Folder of the sublayers' graphs in the bundle."""
    fixed_shapes: bool
    """Whether every new shape of an input costs a compilation."""
    channels: Channels
    """The order of channels in all that graphs take and give."""

    def exact(self) -> Backend:
        """Another whose products are as exact as the processor multiplies at full speed; all else is the same."""
        ...

    def load(self, graph: Path) -> LayeredGraph:
        """Load a graph of the layered form."""
        ...

    def begin(self, positions: int, scores: int) -> None:
        """Make room for a batch.

        Args:
            positions: Of all its sequences.
            scores: Attention scores of one head.
        """
        ...

    def weight(
        self, layout: str, block: Block, allocate: Allocate, scales: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[Any]]:
        """What graphs take of a linear weight W (out, in).

        Args:
            layout: Empty for an input `W`; what follows the dot for an input such as `W.forward`.
            block: The weight as it is stored.
            allocate: Makes the arrays, but for scales.
            scales: Those that came with this weight before; without them they are found.

        Returns:
            The array for this input, named "", and those of other inputs by what follows this one's name.
        """
        ...

    def store(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        """Convert float32 to storage."""
        ...

    def restore(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Convert storage to float32; a copy unless they are the same."""
        ...
