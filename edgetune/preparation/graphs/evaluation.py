"""The evaluation graph, and the inputs and outputs of graphs as the manifest lists them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from edgetune.formats.manifest import TensorSpec
from edgetune.preparation.rewrites.lowering import lower
from edgetune.preparation.rewrites.operators import IR_VERSION, OPSET, Operators


def evaluation_graph(forward: ir.Model, parameters: Sequence[str], *, half: bool = False) -> ir.Model:
    """The forward graph with outputs `loss` (1) and `predictions` (batch, sequence): the likeliest next tokens.

    Args:
        forward: The graph of `resolve_shapes(export_forward(…))`; it is left as it is.
        parameters: The LoRA parameters, which stay inputs.
        half: Write norms for float16.
    """
    model = ir.from_proto(ir.to_proto(forward))
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    op = Operators()
    predictions = op.op("ArgMax", [logits], attributes={"axis": -1, "keepdims": 0})
    predictions.name = "predictions"
    predictions.dtype, predictions.shape = ir.DataType.INT64, ir.Shape(["batch", "sequence"])
    op.nodes[0].name = "predictions"
    graph.extend(op.nodes)
    graph.outputs.append(predictions)
    graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    return lower(model, parameters, half=half)


def describe_graph(path: Path) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of an ONNX file."""
    graph = ir.load(path).graph
    return [_spec(value) for value in graph.inputs], [_spec(value) for value in graph.outputs]


def _spec(value: ir.Value) -> TensorSpec:
    element = value.dtype.name.lower() if value.dtype is not None else type(value.type).__name__
    shape = [d if isinstance(d, int) else str(d) for d in value.shape] if value.shape is not None else []
    return TensorSpec(str(value.name), element, shape)
