"""The adapter folded into the weights: W + scaling · B·A, a piece of one weight in memory at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError
from edgetune.export.projections import Part, find_parts
from edgetune.genai import MODEL, QUANTISED, WEIGHTS
from edgetune.manifest import Lora
from edgetune.runtimes import Parameters

if TYPE_CHECKING:
    import onnx

_PIECE = 64 << 20
"""Bytes of fp32 weights that are worked on at once, about."""
_SMALLEST = 256
"""Inputs that are worked on at once, at least; a multiple of every block size."""
_ZERO_POINT = 8


@dataclass(frozen=True)
class _Weight:
    """A linear layer's weight, read as W transposed: (K inputs, N outputs)."""

    k: int
    n: int
    values: NDArray[np.float32] | None
    """fp32: (K, N)."""
    packed: NDArray[np.uint8] | None
    """int4: (N, blocks, block size / 2), the even element in the low half of a byte."""
    scales: NDArray[np.float32] | None
    """int4: (N, blocks)."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop`, both on a block's border, dequantised."""
        if self.values is not None:
            return np.array(self.values[start:stop])
        assert self.packed is not None and self.scales is not None  # for mypy: the other kind
        size = 2 * self.packed.shape[2]
        blocks = slice(start // size, -(-stop // size))
        packed = self.packed[:, blocks]
        values = np.empty((*packed.shape[:2], size), np.float32)
        values[..., 0::2] = packed & 0xF
        values[..., 1::2] = packed >> 4
        values -= _ZERO_POINT
        values *= self.scales[:, blocks, None]
        return np.ascontiguousarray(values.reshape(self.n, -1)[:, : stop - start].T)


def merge_adapter(source: Path, output: Path, lora: Lora, parameters: Parameters) -> None:
    """Write the fp32 GenAI graph and weights with the adapter folded in.

    Args:
        source: A verified GenAI folder, fp32 or int4.
        output: Folder for `model.onnx` and `model.onnx.data`.
        lora: The slots.
        parameters: A (rank, in_features) and B (out_features, rank), as `Lora.shapes` names them.

    Raises:
        IncompatibleError: The graph is not what GenAI's builder makes of a Phi-3.
    """
    import onnx

    model = onnx.load(str(source / MODEL), load_external_data=False)
    graph = model.graph
    parts = {part.node.input[1]: part for of_slot in find_parts(graph, lora) for part in of_slot}
    layers = {node.input[1]: node for node in graph.node if node.op_type in ("MatMul", "MatMulNBits")}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    scales = {node.input[2] for node in layers.values() if node.op_type == "MatMulNBits"}
    written: list[onnx.TensorProto] = []
    with (source / WEIGHTS).open("rb") as file, (output / WEIGHTS).open("wb") as data:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for tensor in graph.initializer:
            if tensor.name in scales:
                continue
            offset = data.tell()
            if tensor.name in layers:
                weight = _read_weight(layers[tensor.name], tensors, mapped)
                for piece in _merged(weight, parts.get(tensor.name), lora.scaling, parameters):
                    data.write(piece.data)
                shape, kind = [weight.k, weight.n], onnx.TensorProto.FLOAT
            else:
                data.write(_bytes_of(tensor, mapped))
                shape, kind = list(tensor.dims), tensor.data_type
            written.append(_external(tensor.name.removesuffix(QUANTISED), kind, shape, offset, data.tell() - offset))
    for node in layers.values():
        if node.op_type == "MatMulNBits":
            _make_fp32(node)
    del graph.initializer[:]
    graph.initializer.extend(written)
    onnx.save(model, str(output / MODEL))


def _merged(
    weight: _Weight, part: Part | None, scaling: float, parameters: Parameters
) -> Iterator[NDArray[np.float32]]:
    """W transposed + scaling · (B·A) transposed, piece by piece along the inputs."""
    rows = max(_SMALLEST, _PIECE // (4 * weight.n) // _SMALLEST * _SMALLEST)
    for start in range(0, weight.k, rows):
        stop = min(start + rows, weight.k)
        piece = weight.rows(start, stop)
        if part is not None:
            a, b = parameters[part.slot.a], parameters[part.slot.b][part.start : part.stop]
            piece += a[:, start:stop].T @ (b.T * np.float32(scaling))
        yield piece


def _read_weight(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], mapped: mmap.mmap) -> _Weight:
    if node.op_type == "MatMul":
        values = _array(tensors[node.input[1]], np.float32, mapped)
        return _Weight(k=values.shape[0], n=values.shape[1], values=values, packed=None, scales=None)
    attributes: dict[str, Any] = {attribute.name: attribute.i for attribute in node.attribute}
    k, n, size = attributes["K"], attributes["N"], attributes["block_size"]
    if attributes["bits"] != 4 or len(node.input) != 3 or _SMALLEST % size:
        raise IncompatibleError(f"{node.name}: not a symmetric int4 layer; prepare the bundle anew")
    blocks = -(-k // size)
    packed = _array(tensors[node.input[1]], np.uint8, mapped).reshape(n, blocks, size // 2)
    scales = _array(tensors[node.input[2]], np.float32, mapped).reshape(n, blocks)
    return _Weight(k, n, values=None, packed=packed, scales=scales)


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
    node.op_type, node.domain, node.name = "MatMul", "", node.name.removesuffix(QUANTISED)
    inputs = [node.input[0], node.input[1].removesuffix(QUANTISED)]
    del node.input[:]
    node.input.extend(inputs)
    del node.attribute[:]
