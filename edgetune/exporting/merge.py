"""The adapter folded into the weights: W + scaling · B·A in fp32, int8 or int4, a piece of one in memory at a time.

With DoRA it is g ⊙ (W + scaling · B·A): a row of a weight on a grid that is multiplied with its gain lies on the
grid whose scales are, and only the update is rounded.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgetune.config import MergedPrecision
from edgetune.errors import IncompatibleError
from edgetune.exporting.projections import Product, products_of
from edgetune.exporting.quantise import fresh_scales, generator_of, on_grid
from edgetune.formats.genai import BLOCKS_DOMAIN, HALF, MODEL, QUANTISED, WEIGHTS, block_attributes, weight_name
from edgetune.model.blocks import BITS, BLOCK_SIZE, Block, dequantised
from edgetune.model.lora import Lora, Parameters

if TYPE_CHECKING:
    import onnx

_PIECE = 16 << 20
"""Bytes of fp32 weights that are processed at once, roughly; a handful of arrays of this size are in memory."""
_SMALLEST = 256
"""Fewest inputs that are processed at once; a multiple of every block size."""


@dataclass(frozen=True)
class _Update:
    """What one weight becomes: gain ⊙ W + B·A."""

    a: NDArray[np.float32]
    """(rank, in)"""
    b: NDArray[np.float32]
    """(out, rank), times scaling and gain."""
    gain: NDArray[np.float32]
    """(out, 1); ones without DoRA."""


def merge_adapter(
    source: Path,
    output: Path,
    lora: Lora,
    parameters: Parameters,
    precision: MergedPrecision,
    gains: Parameters = MappingProxyType({}),
) -> None:
    """Write the GenAI graph and weights with the adapter folded in.

    Args:
        source: A verified GenAI folder, however its weights are stored.
        output: Folder for `model.onnx` and `model.onnx.data`.
        lora: The slots.
        parameters: A (rank, in_features) and B (out_features, rank), as `Lora.shapes` names them.
        precision: How linear layers and the head are stored; everything else is copied. A weight that is stored
            so and gets no update stays as it is, to the byte.
        gains: Of every slot (out_features,), as `Slot.gain` names them, where slots have magnitudes.

    Raises:
        IncompatibleError: The graph is not what GenAI's builder makes of a Phi-3.
    """
    import onnx

    model = onnx.load(str(source / MODEL), load_external_data=False)
    graph = model.graph
    of_slots = products_of(graph, lora)
    products = {weight_name(product.node.input[1]): product for of_slot in of_slots for product in of_slot}
    layers = {weight_name(node.input[1]): node for node in graph.node if node.op_type in ("MatMul", "MatMulNBits")}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    scales = {node.input[2] for node in layers.values() if node.op_type == "MatMulNBits"}
    write_layer = _write_fp32 if precision == "fp32" else partial(_write_blocks, bits=BITS[precision])
    written: list[onnx.TensorProto] = []
    with (source / WEIGHTS).open("rb") as file, (output / WEIGHTS).open("wb") as data:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for tensor in graph.initializer:
            name = weight_name(tensor.name)
            if name in layers:
                weight = _read_weight(layers[name], tensor, tensors, mapped)
                update = _update_of(products[name], lora, parameters, gains) if name in products else None
                written += write_layer(data, layers[name], name, weight, update)
            elif tensor.name not in scales:
                written.append(_append(data, tensor.name, tensor.data_type, tensor.dims, [_bytes_of(tensor, mapped)]))
    del graph.initializer[:]
    graph.initializer.extend(written)
    for node in [node for node in graph.node if node.op_type == "Cast" and node.output[0] in layers]:
        graph.node.remove(node)
    onnx.save(model, str(output / MODEL))


def _update_of(product: Product, lora: Lora, parameters: Parameters, gains: Parameters) -> _Update:
    slot, rows = product.slot, slice(product.start, product.stop)
    gain = gains[slot.gain][rows, None] if gains else np.ones((product.stop - product.start, 1), np.float32)
    scaling = np.float32(lora.scaling_of(slot.module))
    return _Update(parameters[slot.a], parameters[slot.b][rows] * scaling * gain, gain)


def _write_fp32(
    data: BinaryIO, node: onnx.NodeProto, name: str, weight: Block, update: _Update | None
) -> list[onnx.TensorProto]:
    """Append W transposed, and turn the node into the `MatMul` that the builder makes for an fp32 model."""
    import onnx

    if node.op_type == "MatMulNBits":
        node.op_type, node.domain, node.name = "MatMul", "", weight_name(node.name)
        del node.attribute[:]
    _take(node, name)
    return [_append(data, name, onnx.TensorProto.FLOAT, weight.shape[::-1], _merged(weight, update))]


def _merged(weight: Block, update: _Update | None) -> Iterator[NDArray[np.float32]]:
    """W transposed + scaling · (B·A) transposed, piece by piece along the inputs."""
    outputs, inputs = weight.shape
    rows = max(_SMALLEST, _PIECE // (4 * outputs) // _SMALLEST * _SMALLEST)
    for start in range(0, inputs, rows):
        stop = min(start + rows, inputs)
        piece = _transposed(weight, start, stop)
        if update is not None:
            piece *= update.gain.T
            piece += update.a[:, start:stop].T @ update.b.T
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


def _write_blocks(
    data: BinaryIO, node: onnx.NodeProto, name: str, weight: Block, update: _Update | None, *, bits: int
) -> list[onnx.TensorProto]:
    """Append W and its scales, and turn the node into the `MatMulNBits` that the builder makes of so many bits."""
    import onnx
    from onnx import helper

    outputs, inputs = weight.shape
    if inputs % BLOCK_SIZE:
        raise IncompatibleError(f"{name}: {inputs} inputs, expected a multiple of {BLOCK_SIZE}; use --precision fp32")
    blocks = inputs // BLOCK_SIZE
    scales = np.empty((outputs, blocks), np.float32)
    stored, scales_name = name + QUANTISED[bits], f"{name}_scales"
    if weight.bits != bits:
        node.op_type, node.domain, node.name = "MatMulNBits", BLOCKS_DOMAIN, weight_name(node.name) + QUANTISED[bits]
        sizes = block_attributes(outputs, inputs, bits)
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(key, value) for key, value in sizes.items())
    _take(node, stored, scales_name)
    shape = (outputs, blocks, BLOCK_SIZE * bits // 8)
    packed = _append(data, stored, onnx.TensorProto.UINT8, shape, _rounded(name, weight, update, scales, bits))
    return [packed, _append(data, scales_name, onnx.TensorProto.FLOAT, scales.shape, [scales])]


def _rounded(
    name: str, weight: Block, update: _Update | None, scales: NDArray[np.float32], bits: int
) -> Iterator[NDArray[np.uint8]]:
    """W + scaling · B·A in points of so many bits, piece by piece along the outputs; fills `scales` (out, in / 32)."""
    outputs, inputs = weight.shape
    rows, generator = max(1, _PIECE // (4 * inputs)), generator_of(name)
    for start in range(0, outputs, rows):
        piece = replace(
            weight,
            values=weight.values[start : start + rows],
            scales=None if weight.scales is None else weight.scales[start : start + rows],
        )
        if update is None and piece.bits == bits:
            assert piece.scales is not None  # for mypy: a weight in blocks has them
            scales[start : start + rows] = piece.scales
            yield piece.values
            continue
        values = np.ascontiguousarray(dequantised(piece) if piece.bits else piece.values, dtype=np.float32)
        change = np.zeros_like(values)
        gain = np.ones((len(values), 1), np.float32)
        if update is not None:
            gain, change = update.gain[start : start + rows], update.b[start : start + rows] @ update.a
            values = gain * values
        stored = piece.scales if piece.bits == bits else None
        base = fresh_scales(values, bits) if stored is None else stored * np.abs(gain)
        draws = generator.random(values.shape, dtype=np.float32)
        packed, scales[start : start + rows] = on_grid(values, base, change, draws, bits)
        yield packed


def _take(node: onnx.NodeProto, *weights: str) -> None:
    """Let a product take these tensors beside its activation."""
    inputs = [node.input[0], *weights]
    del node.input[:]
    node.input.extend(inputs)


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


def _append(
    data: BinaryIO, name: str, kind: int, shape: Iterable[int], pieces: Iterable[NDArray[Any]] | list[memoryview]
) -> onnx.TensorProto:
    """Write the pieces of a tensor; returns what the graph says of it."""
    import onnx

    offset = data.tell()
    for piece in pieces:
        data.write(piece if isinstance(piece, memoryview) else piece.data)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", data.tell() - offset)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
