"""Stock ONNX Runtime as a backend of the layered form, on the CPU: float32, frozen products int8 where asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgetune.bundle import Bundle
from edgetune.execution import Products
from edgetune.frozen import BACKWARD, FORWARD, INT8, LAYERS, Block
from edgetune.onnx_session import open_graph
from edgetune.runtimes.layered.backend import Allocate, Arrays
from edgetune.runtimes.layered.channels import Channels
from edgetune.runtimes.layered.requantise import Requantiser


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
        bundle: Holds the graphs that dequantise.
        products: Precision of products with the sublayers' frozen weights; the head's are float32.
    """

    storage = np.dtype(np.float32)
    fixed_shapes = False
    channels = Channels()

    def __init__(self, bundle: Bundle, products: Products) -> None:
        self.sublayers = f"{LAYERS}/{INT8}" if products == "int8" else LAYERS
        self._dequantise = self.load(bundle.file(f"{LAYERS}/dequantise"))
        forms = (FORWARD, BACKWARD) if products == "int8" else ()
        self._requantiser = Requantiser({form: self.load(bundle.file(f"{LAYERS}/{INT8}/{form}")) for form in forms})

    def load(self, graph: Path) -> OrtGraph:
        """See `Backend.load`."""
        return OrtGraph(open_graph(graph))

    def weight(self, form: str, block: Block, allocate: Allocate) -> dict[str, NDArray[Any]]:
        """See `Backend.weight`."""
        if form:
            return self._requantiser.weight(form, block, allocate)
        out = allocate(block.shape, self.storage)
        if block.scales is None:
            out[...] = block.values
        else:
            rows = np.arange(len(out), dtype=np.int64)
            packed, scales = (np.ascontiguousarray(array) for array in (block.values, block.scales))
            self._dequantise.run({"packed": packed, "rows": rows, "scales": scales}, {"weight": out})
        return {"": out}

    def store(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        """See `Backend.store`."""
        out[...] = values

    def restore(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """See `Backend.restore`."""
        return values
