"""OpenVINO as a backend of the layered form: bfloat16 where the processor has it, otherwise float32.

What goes from graph to graph, adapters and gradients are float32. Hidden states and activations that are kept, and
frozen weights, are held as bfloat16. Products with the sublayers' frozen weights are int8 where asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino.preprocess import PrePostProcessor

from edgetune.formats.roles import INT8, LAYERS
from edgetune.machine.memory import give_back_freed
from edgetune.model.bfloat16 import BFLOAT16, from_bfloat16, to_bfloat16
from edgetune.model.blocks import Block
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.layered.backend import Allocate, Arrays
from edgetune.runtimes.layered.bindings import Bindings
from edgetune.runtimes.layered.channels import Channels
from edgetune.runtimes.layered.openvino.products import Products, is_linear
from edgetune.runtimes.layered.openvino.sums import sums_as_products
from edgetune.runtimes.layered.openvino.tensor import tensor
from edgetune.runtimes.layered.openvino.weights import OpenVinoWeights
from edgetune.runtimes.openvino_core import MOST_SHAPES, properties_of

_KEPT = {"query", "key", "value", "context", "gate", "up", "result"}
_Shapes = tuple[tuple[int, ...], ...]


class OpenVinoGraph:
    """A graph, compiled for every shape of its inputs that occurs.

    Args:
        model: As it was read from its ONNX file.
        compile_model: Compiles a model whose shapes are known.
        element: The type that stands for storage.
        products: With frozen weights.
    """

    def __init__(
        self,
        model: ov.Model,
        compile_model: Callable[[ov.Model], ov.CompiledModel],
        element: ov.Type,
        products: Products,
    ) -> None:
        self._compile = compile_model
        self._element = element
        self._products = products
        self._model = model
        self._plain = [value.any_name for value in self._model.inputs]
        self.inputs = tuple(name for plain in self._plain for name in products.inputs(plain))
        self.outputs = tuple(value.any_name for value in self._model.outputs)
        self._models: dict[_Shapes, _CompiledGraph] = {}
        self._stored = {name for name in (*self.inputs, *self.outputs) if name in _KEPT or is_linear(name)}

    def run(self, inputs: Arrays, outputs: Arrays, bound_as: Hashable = None) -> None:
        """See `LayeredGraph.run`."""
        shapes = tuple(inputs[name].shape for name in self.inputs)
        if shapes not in self._models:
            if len(self._models) == MOST_SHAPES:
                del self._models[next(iter(self._models))]
            self._models[shapes] = _CompiledGraph(self._compile(self._of_shapes(shapes)))
        request, bound = self._models[shapes].request(bound_as)
        # A request holds its tensors, and these no arrays.
        for index, name in enumerate(self.inputs):
            if not bound.has(name, array := inputs[name]):
                request.set_input_tensor(index, tensor(array))
                bound.note(name, array)
        for index, name in enumerate(self.outputs):
            if not bound.has(name, array := outputs[name]):
                request.set_output_tensor(index, tensor(array))
                bound.note(name, array)
        # Results are where they belong already. Started asynchronously, every graph would have a thread of its own.
        request.infer(share_outputs=True)

    def _of_shapes(self, shapes: _Shapes) -> ov.Model:
        model = self._model.clone()
        given = dict(zip(self.inputs, shapes, strict=True))
        # Those that `adapt` replaces are weights, whose shapes are known.
        model.reshape({name: list(given[name]) for name in self._plain if name in given})
        self._products.adapt(model)
        if self._products.short:
            sums_as_products(model)
        parameters = {parameter.output(0).any_name: parameter for parameter in model.get_parameters()}
        model = ov.Model(model.get_results(), [parameters[name] for name in self.inputs])
        steps = PrePostProcessor(model)
        for name in self._stored.intersection(self.inputs):
            steps.input(name).tensor().set_element_type(self._element)
        for name in self._stored.intersection(self.outputs):
            steps.output(name).tensor().set_element_type(self._element)
        return steps.build()


class _CompiledGraph:
    """A graph for inputs of known shapes, and a request for every place at which it runs."""

    def __init__(self, model: ov.CompiledModel) -> None:
        self._model = model
        self._requests: dict[Hashable, tuple[ov.InferRequest, Bindings]] = {}

    def request(self, bound_as: Hashable) -> tuple[ov.InferRequest, Bindings]:
        if bound_as not in self._requests:
            self._requests[bound_as] = self._model.create_infer_request(), Bindings()
        return self._requests[bound_as]


class OpenVinoBackend:
    """Runs graphs on an OpenVINO device.

    Args:
        core: OpenVINO's, shared with others.
        device: Such as `CPU`.
        cache: Folder in which compiled models are kept for the next start; none is kept without it.
        plan: How the step is executed.
        channels: The order of channels.
    """

    fixed_shapes = True
    sublayers = LAYERS

    def __init__(self, core: ov.Core, device: str, cache: Path | None, plan: LayeredPlan, channels: Channels) -> None:
        self._core, self._device, self._cache, self._plan = core, device, cache, plan
        # Not a property of the core, which others use as well.
        self._properties = {**properties_of(device), **({} if cache is None else {"CACHE_DIR": str(cache)})}
        self._short = "BF16" in self._core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        self.storage = BFLOAT16 if self._short else np.dtype(np.float32)
        self.channels = channels
        self._products = Products(plan.precision == "int8", self._short)
        self._weights = OpenVinoWeights(self._compile, self.storage)

    def exact(self) -> OpenVinoBackend:
        """See `Backend.exact`."""
        plan = replace(self._plan, precision="bf16" if self._short else "fp32")
        return OpenVinoBackend(self._core, self._device, self._cache, plan, self.channels)

    def load(self, graph: Path) -> OpenVinoGraph:
        """See `Backend.load`."""
        element = ov.Type.bf16 if self._short else ov.Type.f32
        model = self._core.read_model(graph)
        return OpenVinoGraph(model, lambda model: self._compile(model, element), element, self._products)

    def begin(self, positions: int, scores: int) -> None:
        """See `Backend.begin`: graphs have memory of their own for each shape."""

    def weight(
        self, layout: str, block: Block, allocate: Allocate, scales: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See `Backend.weight`."""
        if layout == INT8:
            return self._weights.int8(block, allocate, scales)
        return {"": self._weights.exact(block, allocate)}

    def store(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        """See `Backend.store`."""
        out[...] = to_bfloat16(values) if self._short else values

    def restore(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """See `Backend.restore`."""
        return from_bfloat16(values) if self._short else values

    def _compile(self, model: ov.Model, precision: ov.Type) -> ov.CompiledModel:
        properties = {"INFERENCE_PRECISION_HINT": precision, **self._properties}
        compiled = self._core.compile_model(model, self._device, properties)
        give_back_freed()
        return compiled
