"""Symbolic shapes made explicit: afterwards no node computes a shape at run time.

Accelerators want static shapes and compilers stumble over shape arithmetic. With batch and sequence symbolic,
every Reshape target is a constant (0 copies a dimension, −1 infers one), every Expand broadcasts with ones, and every
Slice has constant bounds. ONNX Runtime's symbolic shape inference supplies the shapes.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as rewrites
from onnxscript import optimizer

from edgetune.errors import IncompatibleError

Dimensions = list[int | str]
_FOLD_LIMIT = 4096
"""Elements up to which a constant may be folded: shapes and scalars, never weights."""


def infer_shapes(model: ir.Model) -> ir.Model:
    """The same model with the symbolic shape of every value.

    Raises:
        IncompatibleError: ONNX Runtime's inference gives up.
    """
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    proto = ir.to_proto(model)
    # Shapes of an earlier inference may name dimensions that are equal by now.
    del proto.graph.value_info[:]
    # It does not read the axes of a ReduceMax, whose result has the shape of a mean's.
    largest = {node.output[0] for node in proto.graph.node if node.op_type == "ReduceMax"}
    _rename(proto, largest, "ReduceMean")
    try:
        proto = SymbolicShapeInference.infer_shapes(proto, auto_merge=True)
    except Exception as error:  # it raises Exception itself, and AssertionError without a word
        reason = str(error) or type(error).__name__
        raise IncompatibleError(f"shapes cannot be inferred ({reason}); this architecture is not supported") from error
    _rename(proto, largest, "ReduceMax")
    inferred: ir.Model = ir.from_proto(proto)
    return inferred


def _rename(proto: onnx.ModelProto, results: Collection[str], operator: str) -> None:
    """Let the nodes with these results have another operator."""
    for node in proto.graph.node:
        if node.output[0] in results:
            node.op_type = operator


def resolve_shapes(model: ir.Model) -> ir.Model:
    """Replace shape arithmetic by constants.

    Precondition: standard operators; inputs carry the symbolic dimensions `batch` and `sequence`.
    Postcondition: no Shape, Size, Range or ConstantOfShape is left.

    Raises:
        IncompatibleError: Some shape cannot be expressed without arithmetic; names the node.
    """
    model = infer_shapes(model)
    for node in list(model.graph):
        if node.op_type == "Gather":
            _static_dimension(model.graph, node)
        elif node.op_type == "Reshape":
            _constant_target(model.graph, node, _reshape_target(node))
        elif node.op_type == "Expand":
            _constant_target(model.graph, node, _expand_target(node))
    fold(model)
    model = infer_shapes(model)
    for node in list(model.graph):
        if node.op_type in ("Slice", "Reshape", "Expand") and _changes_nothing(node):
            _bypass(model.graph, node)
    fold(model)
    left = [node for node in model.graph if node.op_type in ("Shape", "Size", "Range", "ConstantOfShape")]
    if left:
        raise IncompatibleError(
            "the graph computes shapes at run time in " + ", ".join(f"{n.name} ({n.op_type})" for n in left[:5])
        )
    return infer_shapes(model)


def fold(model: ir.Model) -> None:
    """Fold small constants, share what is equal and remove what nothing uses.

    Without onnxscript's rewrite rules: they triple the time that `prepare` takes and save one node.
    """
    optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT
    )
    ir.passes.Sequential(
        rewrites.IdentityEliminationPass(),
        rewrites.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        rewrites.DeduplicateInitializersPass(),
        rewrites.CommonSubexpressionEliminationPass(),
        rewrites.RemoveUnusedNodesPass(),
        rewrites.NameFixPass(),
    )(model)


def dimensions(value: ir.Value | None) -> Dimensions:
    """Symbolic shape of a value.

    Raises:
        IncompatibleError: It is unknown.
    """
    if value is None or value.shape is None:
        name = value.name if value is not None else "an empty input"
        raise IncompatibleError(f"the shape of {name} cannot be inferred; this architecture is not supported")
    return [d if isinstance(d, int) else str(d) for d in value.shape]


def constant(graph: ir.Graph, before: ir.Node, array: np.ndarray, name: str) -> ir.Value:
    """A new Constant in front of `before`."""
    node = ir.node("Constant", [], attributes={"value": ir.tensor(array)}, name=name)
    node.outputs[0].name = name
    node.outputs[0].shape = ir.Shape(array.shape)
    node.outputs[0].dtype = ir.DataType.from_numpy(array.dtype)
    graph.insert_before(before, node)
    return node.outputs[0]


def _static_dimension(graph: ir.Graph, node: ir.Node) -> None:
    """Gather(Shape(x), i) of a known dimension is that number."""
    shape = node.inputs[0].producer() if node.inputs[0] is not None else None
    index = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    if shape is None or shape.op_type != "Shape" or index is None:
        return
    dimension = dimensions(shape.inputs[0])[int(index.numpy().item())]
    if isinstance(dimension, int):
        array = np.full(index.numpy().shape, dimension, dtype=np.int64)
        node.outputs[0].replace_all_uses_with(constant(graph, node, array, f"{node.name}_dimension"))


def _reshape_target(node: ir.Node) -> list[int]:
    source, target = dimensions(node.inputs[0]), dimensions(node.outputs[0])
    resolved = [
        d if isinstance(d, int) else 0 if i < len(source) and source[i] == d else -1 for i, d in enumerate(target)
    ]
    if resolved.count(-1) > 1:
        raise IncompatibleError(f"{node.name}: reshaping {source} to {target} needs more than one unknown dimension")
    return resolved


def _expand_target(node: ir.Node) -> list[int]:
    source, target = dimensions(node.inputs[0]), dimensions(node.outputs[0])
    aligned: Dimensions = [*[1] * (len(target) - len(source)), *source]
    resolved = [1 if have == want else want for have, want in zip(aligned, target, strict=True)]
    if not all(isinstance(d, int) for d in resolved):
        raise IncompatibleError(f"{node.name}: expanding {source} to {target} repeats a symbolic dimension")
    return [int(d) for d in resolved]


def _constant_target(graph: ir.Graph, node: ir.Node, target: list[int]) -> None:
    known = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    if known is not None and known.numpy().tolist() == target:
        return
    node.replace_input_with(1, constant(graph, node, np.array(target, dtype=np.int64), f"{node.name}_target"))


def _changes_nothing(node: ir.Node) -> bool:
    """Whether the result has the argument's shape; a Slice of the same shape may still turn an axis round."""
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    if steps is not None:
        known = ir.convenience.get_const_tensor(steps)
        if known is None or (known.numpy() < 0).any():
            return False
    return dimensions(node.inputs[0]) == dimensions(node.outputs[0])


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    if source is not None and node.outputs[0] not in graph.outputs:
        node.outputs[0].replace_all_uses_with(source)
