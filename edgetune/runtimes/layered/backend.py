"""What a runtime has to offer for the layered form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.frozen import Block

Arrays = Mapping[str, NDArray[Any]]


class LayeredGraph(Protocol):
    """One loaded graph."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, inputs: Arrays, outputs: Arrays) -> None:
        """Compute; results are written into the arrays of `outputs`, all arrays being contiguous."""
        ...


class Backend(Protocol):
    """Loads graphs, and holds numbers the way it computes with them."""

    storage: np.dtype[Any]
    """Of hidden states, kept activations and linear weights."""

    def load(self, graph: Path) -> LayeredGraph:
        """Load a graph of the layered form."""
        ...

    def dequantise(self, block: Block, out: NDArray[Any]) -> None:
        """Write linear weights (rows, in) in storage, as the graphs of this backend take them."""
        ...

    def store(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        """Convert float32 to storage."""
        ...

    def restore(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Convert storage to float32; a copy unless they are the same."""
        ...
