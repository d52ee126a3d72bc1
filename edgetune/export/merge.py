"""The adapter folded into the weights: W + scaling · B·A, a piece of one weight in memory at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError
from edgetune.export.projections import Part, find_parts
from edgetune.frozen import BLOCK_SIZE, Block, dequantised
from edgetune.genai import HALF, MODEL, QUANTISED, WEIGHTS, weight_name
from edgetune.manifest import Lora
from edgetune.runtimes import Parameters

if TYPE_CHECKING:
    import onnx

_PIECE = 64 << 20
"""Bytes of fp32 weights that are processed at once, roughly."""
_SMALLEST = 256
"""Fewest inputs that are processed at once; a multiple of every block size."""


def merge_adapter(source: Path, output: Path, lora: Lora, parameters: Parameters) -> None:
    """Write the fp32 GenAI graph and weights with the adapter folded in.

    Args:
        source: A verified GenAI folder, however its weights are stored.
        output: Folder for `model.onnx` and `model.onnx.data`.
        lora: The slots.
        parameters: A (rank, in_features) and B (out_features, rank), as `Lora.shapes` names them.

    Raises:
        IncompatibleError: The graph is not what GenAI's builder makes of a Phi-3.
    """
    import onnx

    model = onnx.load(str(source / MODEL), load_external_data=False)
    graph = model.graph
    parts = {weight_name(part.node.input[1]): part for of_slot in find_parts(graph, lora) for part in of_slot}
    layers = {weight_name(node.input[1]): node for node in graph.node if node.op_type in ("MatMul", "MatMulNBits")}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    scales = {node.input[2] for node in layers.values() if node.op_type == "MatMulNBits"}
    written: list[onnx.TensorProto] = []
    with (source / WEIGHTS).open("rb") as file, (output / WEIGHTS).open("wb") as data:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for tensor in graph.initializer:
            if tensor.name in scales:
                continue
            offset = data.tell()
            name = weight_name(tensor.name)
            if name in layers:
                weight = _read_weight(layers[name], tensor, tensors, mapped)
                for piece in _merged(weight, parts.get(name), lora.scaling, parameters):
                    data.write(piece.data)
                shape, kind = list(weight.shape[::-1]), onnx.TensorProto.FLOAT
            else:
                data.write(_bytes_of(tensor, mapped))
                shape, kind = list(tensor.dims), tensor.data_type
            written.append(_external(name, kind, shape, offset, data.tell() - offset))
    for node in layers.values():
        if node.op_type == "MatMulNBits":
            _make_fp32(node)
    del graph.initializer[:]
    graph.initializer.extend(written)
    for node in [node for node in graph.node if node.op_type == "Cast" and node.output[0] in layers]:
        graph.node.remove(node)
    onnx.save(model, str(output / MODEL))


def _merged(weight: Block, part: Part | None, scaling: float, parameters: Parameters) -> Iterator[NDArray[np.float32]]:
    """W transposed + scaling · (B·A) transposed, piece by piece along the inputs."""
    outputs, inputs = weight.shape
    rows = max(_SMALLEST, _PIECE // (4 * outputs) // _SMALLEST * _SMALLEST)
    for start in range(0, inputs, rows):
        stop = min(start + rows, inputs)
        piece = _transposed(weight, start, stop)
        if part is not None:
            a, b = parameters[part.slot.a], parameters[part.slot.b][part.start : part.stop]
            piece += a[:, start:stop].T @ (b.T * np.float32(scaling))
        yield piece


def _transposed(weight: Block, start: int, stop: int) -> NDArray[np.float32]:
    """W transposed (stop − start, outputs), for the inputs from `start` to `stop`, both on block boundaries."""
    if weight.scales is None:
        return np.array(weight.values[:, start:stop].T, dtype=np.float32)
    packed, scales = (
        array[:, start * array.shape[1] // weight.shape[1] : stop * array.shape[1] // weight.shape[1]]
        for array in (weight.values, weight.scales)
    )
    return np.ascontiguousarray(dequantised(replace(weight, values=packed, scales=scales)).T)


def _read_weight(
    node: onnx.NodeProto, stored: onnx.TensorProto, tensors: dict[str, onnx.TensorProto], mapped: mmap.mmap
) -> Block:
    """The weight of a layer; `stored` is its tensor in the graph."""
    if node.op_type == "MatMul":
        dtype = np.float16 if stored.name.endswith(HALF) else np.float32
        return Block(_array(stored, dtype, mapped).T, None)
    attributes: dict[str, Any] = {attribute.name: attribute.i for attribute in node.attribute}
    k, n, bits = attributes["K"], attributes["N"], attributes["bits"]
    if bits not in QUANTISED or len(node.input) != 3 or attributes["block_size"] != BLOCK_SIZE or k % BLOCK_SIZE:
        raise IncompatibleError(f"{node.name}: not a symmetric int4 or int8 layer; prepare the bundle anew")
    packed = _array(stored, np.uint8, mapped).reshape(n, k * bits // 8)
    scales = _array(tensors[node.input[2]], np.float32, mapped).reshape(n, k // BLOCK_SIZE)
    return Block(packed, scales, bits=bits)


def _bytes_of(tensor: onnx.TensorProto, mapped: mmap.mmap) -> memoryview:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
    if entries.get("location") != WEIGHTS or not 0 <= offset <= offset + length <= len(mapped):
        raise IncompatibleError(f"{tensor.name}: not in {WEIGHTS}, or beyond its end; prepare the bundle anew")
    return memoryview(mapped)[offset : offset + length]


def _array(tensor: onnx.TensorProto, dtype: type[Any], mapped: mmap.mmap) -> NDArray[Any]:
    return np.frombuffer(_bytes_of(tensor, mapped), dtype).reshape(list(tensor.dims))


def _external(name: str, kind: int, shape: list[int], offset: int, length: int) -> onnx.TensorProto:
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _make_fp32(node: onnx.NodeProto) -> None:
    """Turn a `MatMulNBits` into the `MatMul` that the builder makes for an fp32 model."""
    node.op_type, node.domain, node.name = "MatMul", "", weight_name(node.name)
    inputs = [node.input[0], weight_name(node.input[1])]
    del node.input[:]
    node.input.extend(inputs)
    del node.attribute[:]
