"""Stock ONNX Runtime as a backend of the layered form, on the CPU: float32, frozen products int8 where asked for."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgetune.formats.bundle import Bundle
from edgetune.formats.roles import BACKWARD, FORWARD, INT8, LAYERS
from edgetune.model.blocks import BLOCK_SIZE, Block
from edgetune.runtimes.execution import Precision
from edgetune.runtimes.layered.backend import Allocate, Arrays
from edgetune.runtimes.layered.bindings import Bindings
from edgetune.runtimes.layered.channels import Channels
from edgetune.runtimes.layered.onnxruntime.requantise import Requantiser
from edgetune.runtimes.onnx_session import open_graph

_SHRINK = "memory.enable_memory_arena_shrinkage"
"""Entry of a run's configuration: afterwards the allocator gives back what is free."""


class OrtGraph:
    """A graph whose inputs and outputs are bound where they lie."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())
        self._bound: dict[Hashable, tuple[ort.IOBinding, Bindings]] = {}

    def run(self, inputs: Arrays, outputs: Arrays, bound_as: Hashable = None) -> None:
        """See `LayeredGraph.run`."""
        if bound_as not in self._bound:
            self._bound[bound_as] = self._session.io_binding(), Bindings()
        binding, bound = self._bound[bound_as]
        for name in self.inputs:
            if not bound.has(name, array := inputs[name]):
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
                bound.note(name, array)
        for name in self.outputs:
            if not bound.has(name, array := outputs[name]):
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
                bound.note(name, array)
        self._session.run_with_iobinding(binding)

    def run_and_release(self, inputs: Arrays) -> None:
        """Compute, and let the allocator that all graphs share give back what is free."""
        options = ort.RunOptions()
        options.add_run_config_entry(_SHRINK, "cpu:0")
        self._session.run(None, dict(inputs), options)


class OrtBackend:
    """Runs graphs on the CPU provider.

    Args:
        bundle: Holds the graphs that dequantise.
        precision: Of products with the sublayers' frozen weights; the head's are float32.
    """

    storage = np.dtype(np.float32)
    fixed_shapes = False
    channels = Channels()

    def __init__(self, bundle: Bundle, precision: Precision) -> None:
        self._bundle = bundle
        self.sublayers = f"{LAYERS}/{INT8}" if precision == "int8" else LAYERS
        self._most_positions = self._most_scores = 0
        self._dequantise = self.load(bundle.file(f"{LAYERS}/dequantise"))
        layouts = (FORWARD, BACKWARD) if precision == "int8" else ()
        graphs = {layout: self.load(bundle.file(f"{LAYERS}/{INT8}/{layout}")) for layout in layouts}
        self._requantiser = Requantiser(self._dequantise, graphs)

    def exact(self) -> OrtBackend:
        """See `Backend.exact`."""
        return OrtBackend(self._bundle, "fp32")

    def load(self, graph: Path) -> OrtGraph:
        """See `Backend.load`."""
        return OrtGraph(open_graph(graph))

    def begin(self, positions: int, scores: int) -> None:
        """See `Backend.begin`.

        Free memory stays with the allocator in pieces as large as they were once asked for, too small for a larger
        batch: without giving it back, a run would in the end hold twice what its largest batch needs.
        """
        if positions <= self._most_positions and scores <= self._most_scores:
            return
        self._most_positions, self._most_scores = max(positions, self._most_positions), max(scores, self._most_scores)
        # Any run can do so; this is the smallest, of int4 or int8.
        block: Arrays = {
            "packed": np.zeros((1, BLOCK_SIZE // 2), np.uint8),
            "rows": np.zeros(1, np.int64),
            "scales": np.ones((1, 1), np.float32),
        }
        self._dequantise.run_and_release(block)

    def weight(
        self, layout: str, block: Block, allocate: Allocate, scales: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See `Backend.weight`."""
        if layout:
            return self._requantiser.weight(layout, block, allocate, scales)
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
