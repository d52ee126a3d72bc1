"""Stock ONNX Runtime as a backend of the layered form: float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgetune.bundle import Bundle
from edgetune.frozen import LAYERS, Block
from edgetune.onnx_session import open_graph
from edgetune.runtimes.layered.backend import Arrays


class OrtGraph:
    """A graph whose inputs and outputs are bound where they lie."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())

    def run(self, inputs: Arrays, outputs: Arrays) -> None:
        """See `LayeredGraph.run`."""
        binding = self._session.io_binding()
        for name in self.inputs:
            array = inputs[name]
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)


class OrtBackend:
    """Runs graphs on the CPU provider.

    Args:
        bundle: Holds the graph `dequantise`.
    """

    storage = np.dtype(np.float32)

    def __init__(self, bundle: Bundle) -> None:
        self._dequantise = self.load(bundle.file(f"{LAYERS}/dequantise"))

    def load(self, graph: Path) -> OrtGraph:
        """See `Backend.load`."""
        return OrtGraph(open_graph(graph))

    def dequantise(self, block: Block, out: NDArray[Any]) -> None:
        """See `Backend.dequantise`."""
        if block.scales is None:
            out[...] = block.values
        else:
            rows = np.arange(len(out), dtype=np.int64)
            self._dequantise.run({"packed": block.values, "rows": rows, "scales": block.scales}, {"weight": out})

    def store(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        """See `Backend.store`."""
        out[...] = values

    def restore(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """See `Backend.restore`."""
        return values
