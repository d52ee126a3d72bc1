"""Whole graphs on a device of OpenVINO: its CPU, GPU or NPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino.passes import ConstantFolding, Manager

from edgetune.errors import EdgetuneError, IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.runtimes.openvino_core import properties_of
from edgetune.runtimes.placement import Node, Partition, Placement
from edgetune.runtimes.whole.compiled import Arrays
from edgetune.runtimes.whole.contexts import ContextKey, ContextStore
from edgetune.runtimes.whole.error_line import last_line

_NO_WORK = ("Parameter", "Constant", "Result")
"""Nodes that nobody computes."""


class OpenVinoCompiler:
    """See `edgetune.runtimes.whole.compiled.Compiler`.

    Args:
        bundle: Has the graphs.
        core: OpenVINO's.
        device: Such as `CPU`.
        version: Of the package.
    """

    def __init__(self, bundle: Bundle, core: Any, device: str, version: str) -> None:
        self._bundle, self._core, self._device, self._version = bundle, core, device, version
        self._store = ContextStore(bundle.path)
        self._provider = f"OpenVINO {device}"
        self._properties = properties_of(device)

    def compile(self, role: str, batch: int, length: int) -> OpenVinoGraph:
        """See `Compiler.compile`. A device of OpenVINO takes a graph whole or not at all.

        Raises:
            IncompatibleError: The device does not take the graph.
        """
        try:
            compiled, partitions, kept = self._compile(role, batch, length)
        except RuntimeError as error:
            raise IncompatibleError(
                f"OpenVINO's {self._device} cannot compile the graph {role!r} "
                f"({last_line(error)}); train with --runtime onnxruntime"
            ) from error
        devices = ", ".join(compiled.get_property("EXECUTION_DEVICES"))
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        placement = Placement(role, batch, length, self._provider, f"{devices}, {precision}", partitions, cached=kept)
        return OpenVinoGraph(compiled, placement)

    def _compile(self, role: str, batch: int, length: int) -> tuple[ov.CompiledModel, list[Partition], bool]:
        """The compiled graph, where its nodes run, and whether it was kept from an earlier start."""
        key = ContextKey.of(
            self._bundle.manifest,
            role,
            batch,
            length,
            runtime=f"openvino {self._version}",
            device=f"{self._device} {self._core.get_property(self._device, 'FULL_DEVICE_NAME')}, "
            f"{' '.join(sorted(self._core.get_property(self._device, 'OPTIMIZATION_CAPABILITIES')))}",
            options={name: str(value) for name, value in self._properties.items()},
        )
        if (kept := self._store.load(key)) is not None:
            # A driver may have changed that no version tells of.
            with suppress(RuntimeError):
                compiled = self._core.import_model(BytesIO(kept.data), self._device, self._properties)
                return compiled, kept.partitions, True
        model = self._model(role, batch, length)
        compiled = self._core.compile_model(model, self._device, self._properties)
        nodes = [Node(op.get_type_name(), op.get_friendly_name()) for op in model.get_ordered_ops()]
        partitions = [Partition(self._provider, [node for node in nodes if node.operator not in _NO_WORK])]
        self._store.save(key, compiled.export_model().getvalue(), partitions)
        return compiled, partitions, False

    def _model(self, role: str, batch: int, length: int) -> ov.Model:
        graph = self._bundle.manifest.graph(role)
        sizes = {"batch": batch, "sequence": length}
        shapes = {spec.name: [sizes[d] if isinstance(d, str) else d for d in spec.shape] for spec in graph.inputs}
        model = self._core.read_model(self._bundle.path / graph.file)
        model.reshape(shapes)
        # The likeliest tokens are for who evaluates; to find them takes a third of a small model's forward pass.
        read = [value for value in model.outputs if "predictions" not in value.get_names()]
        model = ov.Model(read, model.get_parameters())
        # Int4 weights become floats: the device's own pass for packed weights does not take their backward product.
        passes = Manager()
        passes.register_pass(ConstantFolding())
        passes.run_passes(model)
        return model


class OpenVinoGraph:
    """See `edgetune.runtimes.whole.compiled.CompiledGraph`."""

    def __init__(self, compiled: ov.CompiledModel, placement: Placement) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = [value.get_names() for value in compiled.inputs]
        self.placement = placement

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """See `CompiledGraph.run`."""
        try:
            # A value may have several names.
            given = [next(inputs[name] for name in names if name in inputs) for names in self._inputs]
            # Their memory stays where it is until the request is done.
            self._request.infer(dict(enumerate(map(np.ascontiguousarray, given))), share_inputs=True)
        except RuntimeError as error:
            raise EdgetuneError(
                f"{self.placement.provider} failed in the graph {self.placement.graph!r} "
                f"({last_line(error)}); the step was not applied"
            ) from error
        return [self._request.get_tensor(name).data.copy() for name in outputs]
