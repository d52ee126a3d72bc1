"""Symmetric int8 with power-of-two scales, by ONNX Runtime's static quantiser.

The scales are chosen here: of 2^e that hold the largest magnitude, and of the next smaller ones, the one with the
smallest squared error on the calibration rows (what AMD's quantisers call PowerOfTwoMethod.MinMSE). The quantiser takes
them as given and writes the QDQ graph. AMD Quark 0.13 would do both, but it needs an older onnx than Olive's
environment has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgetune.machine.disk import require_room
from edgetune.runtimes.onnx_session import open_graph
from edgetune.split.graph import TrunkGraph, make_static

Feed = Mapping[str, NDArray[np.float32]]
_LARGEST = 127
_SMALLER = 4
"""Exponents that are tried below the one that holds everything."""
_KEPT = 1 << 16
"""Most values of a tensor in one row on which the error is measured."""
_LEAST = 2.0**-24
"""Stands in for the largest magnitude of a tensor of zeros."""


class Observed:
    """The values that a tensor had on calibration rows: their largest magnitude, and a sample.

    Args:
        values: The tensor on the first row, of any shape.
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.largest = 0.0
        self._samples: list[NDArray[np.float32]] = []
        self.add(values)

    def add(self, values: NDArray[np.float32]) -> None:
        """Add the tensor on another row, of any shape."""
        flat = values.reshape(-1)
        self.largest = max(self.largest, float(np.abs(flat).max()))
        self._samples.append(flat[:: -(-flat.size // _KEPT)].copy())

    def scale(self) -> float:
        """The power of two with the smallest squared error on the sample."""
        highest = int(np.ceil(np.log2(max(self.largest, _LEAST) / _LARGEST)))
        values = np.concatenate(self._samples)
        errors = {
            exponent: float(np.mean((values - _rounded(values, 2.0**exponent)) ** 2))
            for exponent in range(highest - _SMALLER, highest + 1)
        }
        return float(2.0 ** min(errors, key=lambda exponent: (errors[exponent], -exponent)))


def _rounded(values: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    steps = np.clip(np.rint(values / np.float32(scale)), -_LARGEST - 1, _LARGEST)
    rounded: NDArray[np.float32] = (steps * scale).astype(np.float32)
    return rounded


def observe(trunk: TrunkGraph, feeds: Iterable[Feed]) -> dict[str, Observed]:
    """Run the float32 graph and record the factors and results of all products.

    Args:
        trunk: The graph with symbolic dimensions, so that rows need no padding.
        feeds: The graph's inputs for each calibration row.

    Returns:
        What was recorded of each tensor, by its name in the graph; weights are among them.
    """
    model = ir.from_proto(ir.to_proto(trunk.model))
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    products = [node for node in model.graph if node.op_type == "MatMul"]
    names = dict.fromkeys(str(value.name) for node in products for value in (*node.inputs, *node.outputs) if value)
    watched = [name for name in names if name in values]
    given = {str(value.name) for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in watched if name not in given)
    session = open_graph(ir.to_proto(model).SerializeToString())
    seen: dict[str, Observed] = {}
    for feed in feeds:
        for name, array in zip(watched, session.run(watched, dict(feed)), strict=True):
            if name in seen:
                seen[name].add(array)
            else:
                seen[name] = Observed(array)
    for node in products:
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                seen[str(value.name)] = Observed(value.const_value.numpy())
    return seen


def quantise(trunk: TrunkGraph, seen: Mapping[str, Observed], feed: Feed, length: int, output: Path) -> None:
    """Write the static QDQ graph: every product takes and gives int8; what lies between is float32.

    Args:
        trunk: The float32 graph.
        seen: What `observe` recorded.
        feed: The static graph's inputs for one row, which the quantiser insists on running.
        length: Positions of a row.
        output: The ONNX file.

    Raises:
        NoRoomError: There is no room for what is written on the way.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class OneRow(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[Feed] = iter([feed])

        def get_next(self) -> Feed | None:
            return next(self._left, None)

    zero = np.array(0, np.int8)
    overrides: dict[str, list[dict[str, Any]]] = {
        name: [{"scale": np.array(tensor.scale(), np.float32), "zero_point": zero}] for name, tensor in seen.items()
    }
    with TemporaryDirectory(prefix=".scratch-", dir=output.parent) as scratch, _quiet():
        source, target = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
        ir.save(make_static(trunk.model, length), source)
        # The quantiser writes it again, with the shapes of all values, and does not notice when that is cut off.
        require_room(output, source.stat().st_size * 5 // 4)
        quantize_static(
            source,
            target,
            OneRow(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=False,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "TensorQuantOverrides": overrides},
        )
        model = onnx.load(target)
        # The quantiser imports every domain that it knows.
        used = {node.domain for node in model.graph.node}
        imports = [entry for entry in model.opset_import if entry.domain in used]
        del model.opset_import[:]
        model.opset_import.extend(imports)
        del model.metadata_props[:]
        onnx.save(model, output)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises a pass that these graphs have had."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
