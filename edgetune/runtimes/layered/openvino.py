"""OpenVINO as a backend of the layered form: bfloat16 where the processor has it, otherwise float32.

Hidden states, kept activations and frozen weights are held as bfloat16, which numpy sees as uint16; adapters, their
gradients and what the head gives are float32. A byte of an int4 block holds an even and an odd weight; what comes out
fastest is all even ones, then all odd ones of a block. So weights are held in that order, and the graphs put the few
activations into it instead of the many weights out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op
from openvino.preprocess import PrePostProcessor

from edgetune.frozen import BLOCK_SIZE, LAYERS, Block
from edgetune.runtimes.layered.backend import Allocate, Arrays

_BFLOAT16 = np.dtype(np.uint16)
_STATES = {"hidden", "residual", "output", "hidden.grad", "output.grad", "carry"}
_KEPT = {"query", "key", "value", "context", "gate", "up"}
_MOST_SHAPES = 6
"""Compiled forms of one graph that are held at a time; a batch of another shape needs another."""
_HALF = BLOCK_SIZE // 2


class OpenVinoGraph:
    """A graph, compiled for every shape of its inputs that occurs.

    Args:
        path: The ONNX file.
        compile_model: Compiles a model whose shapes are known.
        element: The type that stands for storage.
    """

    def __init__(self, path: Path, compile_model: Callable[[ov.Model], ov.CompiledModel], element: ov.Type) -> None:
        self._compile = compile_model
        self._element = element
        self._model = ov.Core().read_model(path)
        self.inputs = tuple(value.any_name for value in self._model.inputs)
        self.outputs = tuple(value.any_name for value in self._model.outputs)
        self._requests: dict[tuple[tuple[int, ...], ...], ov.InferRequest] = {}
        # The head's hidden rows are float32.
        states = _KEPT | (_STATES if len(self._model.input("hidden").partial_shape) > 2 else set())
        self._stored = {n for n in (*self.inputs, *self.outputs) if n in states or _is_linear(n)}

    def run(self, inputs: Arrays, outputs: Arrays) -> None:
        """See `LayeredGraph.run`."""
        given = [inputs[name] for name in self.inputs]
        request = self._request(tuple(array.shape for array in given))
        # A tensor does not own the array's memory, and the request does not own the tensor.
        tensors = [_tensor(array) for array in given]
        results = {place: _tensor(outputs[name]) for place, name in enumerate(self.outputs) if name in outputs}
        for place, tensor in enumerate(tensors):
            request.set_input_tensor(place, tensor)
        for place, tensor in results.items():
            request.set_output_tensor(place, tensor)
        # `infer` would copy every result.
        request.start_async()
        request.wait()

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> ov.InferRequest:
        if shapes not in self._requests:
            if len(self._requests) == _MOST_SHAPES:
                del self._requests[next(iter(self._requests))]
            model = self._model.clone()
            model.reshape({name: list(shape) for name, shape in zip(self.inputs, shapes, strict=True)})
            for parameter in model.get_parameters():
                if _is_linear(parameter.output(0).any_name):
                    _reorder_channels(parameter)
            steps = PrePostProcessor(model)
            for name in self._stored.intersection(self.inputs):
                steps.input(name).tensor().set_element_type(self._element)
            for name in self._stored.intersection(self.outputs):
                steps.output(name).tensor().set_element_type(self._element)
            self._requests[shapes] = self._compile(steps.build()).create_infer_request()
        return self._requests[shapes]


class OpenVinoBackend:
    """Runs graphs on an OpenVINO device.

    Args:
        device: Such as `CPU`.
        cache: Folder in which compiled models are kept for the next start; none is kept without it.
    """

    fixed_shapes = True

    sublayers = LAYERS

    def __init__(self, device: str, cache: Path | None) -> None:
        self._core = ov.Core()
        self._device = device
        self._short = "BF16" in self._core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        self.storage = _BFLOAT16 if self._short else np.dtype(np.float32)
        self._element = ov.Type.bf16 if self._short else ov.Type.f32
        self._dequantisers: dict[tuple[int, ...], ov.InferRequest] = {}
        if cache is not None:
            self._core.set_property({"CACHE_DIR": str(cache)})

    def load(self, graph: Path) -> OpenVinoGraph:
        """See `Backend.load`."""
        precision = ov.Type.bf16 if self._short else ov.Type.f32
        return OpenVinoGraph(graph, lambda model: self._compile(model, precision), self._element)

    def weight(self, form: str, block: Block, allocate: Allocate) -> dict[str, NDArray[Any]]:
        """See `Backend.weight`; the channels of each block come even ones first."""
        out = allocate(block.shape, self.storage)
        if block.scales is None:
            self.store(_evens_first(block.values), out)
        else:
            self._dequantise(block.values, block.scales, out)
        return {"": out}

    def _dequantise(self, packed: NDArray[Any], scales: NDArray[np.float32], out: NDArray[Any]) -> None:
        rows, blocks = scales.shape
        if (rows, blocks) not in self._dequantisers:
            model = _dequantise_model(rows, blocks, self._element)
            self._dequantisers[rows, blocks] = self._compile(model, ov.Type.f32).create_infer_request()
        request = self._dequantisers[rows, blocks]
        arrays = (packed.reshape(rows, blocks, 1, _HALF), scales.reshape(rows, blocks, 1, 1))
        tensors = [_tensor(array) for array in arrays]
        for place, tensor in enumerate(tensors):
            request.set_input_tensor(place, tensor)
        result = _tensor(out.reshape(rows, blocks, 2, _HALF))
        request.set_output_tensor(0, result)
        request.start_async()
        request.wait()

    def store(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        """See `Backend.store`; rounds to the nearest, ties to even."""
        if not self._short:
            out[...] = values
            return
        bits = np.ascontiguousarray(values).view(np.uint32)
        out[...] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16

    def restore(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """See `Backend.restore`."""
        return (values.astype(np.uint32) << 16).view(np.float32) if self._short else values

    def _compile(self, model: ov.Model, precision: ov.Type) -> ov.CompiledModel:
        return self._core.compile_model(model, self._device, {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1})


def _is_linear(name: str) -> bool:
    """Whether an input is a frozen linear weight."""
    return name.endswith(("_proj.weight", "lm_head.weight"))


def _tensor(array: NDArray[Any]) -> ov.Tensor:
    """The array's own memory as a tensor; uint16 is bfloat16."""
    if array.dtype == _BFLOAT16:
        return ov.Tensor(array, ov.Shape(array.shape), ov.Type.bf16)
    return ov.Tensor(array, shared_memory=True)


def _dequantise_model(rows: int, blocks: int, element: ov.Type) -> ov.Model:
    """(q − 8) · scale: bytes (rows, blocks, 1, 16), scales (rows, blocks, 1, 1) to (rows, blocks, 2, 16).

    With t = ⌊byte · (1, 1/16)⌋ the nibble is t − 16⌊t/16⌋, for the low and the high half at once: one pass over memory.
    """
    packed = op.parameter([rows, blocks, 1, _HALF], ov.Type.u8)
    scales = op.parameter([rows, blocks, 1, 1], ov.Type.f32)
    shifts = op.constant(np.array([1, 1 / 16], np.float32).reshape(1, 1, 2, 1))
    shifted = op.floor(op.multiply(op.convert(packed, "f32"), shifts))
    above = op.multiply(op.floor(op.multiply(shifted, op.constant(np.float32(1 / 16)))), op.constant(np.float32(16)))
    value = op.subtract(op.subtract(shifted, above), op.constant(np.float32(8)))
    return ov.Model([op.convert(op.multiply(value, scales), element)], [packed, scales], "dequantise")


def _evens_first(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights (rows, channels) in the order in which int4 blocks come out."""
    rows, channels = values.shape
    if channels % BLOCK_SIZE:
        return values
    return np.ascontiguousarray(values).reshape(rows, -1, _HALF, 2).swapaxes(2, 3).reshape(rows, channels)


def _reorder_channels(weight: ov.Node) -> None:
    """Let the products with a weight (out, in) take and give activations whose channels are in the usual order."""
    if weight.shape[1] % BLOCK_SIZE:
        return
    for user in list(weight.output(0).get_target_inputs()):
        node = user.get_node()
        transposed = node.get_type_name() == "Transpose"
        for use in list(node.output(0).get_target_inputs()) if transposed else [user]:
            product = use.get_node()
            if product.get_type_name() == "MatMul" and (transposed or product.get_attributes()["transpose_b"]):
                product.input(0).replace_source_output(_regrouped(product.input_value(0), _HALF, 2))
            else:
                targets = product.output(0).get_target_inputs()
                restored = _regrouped(product.output(0), 2, _HALF)
                for target in targets:
                    target.replace_source_output(restored)


def _regrouped(value: ov.Output, inner: int, outer: int) -> ov.Output:
    """The last axis, in blocks of inner · outer channels, with these two turned round."""
    shape = list(value.shape)
    rank = len(shape)
    split = op.reshape(value, op.constant([*shape[:-1], shape[-1] // BLOCK_SIZE, inner, outer]), False)
    turned = op.transpose(split, op.constant([*range(rank), rank + 1, rank]))
    return op.reshape(turned, op.constant(shape), False).output(0)
