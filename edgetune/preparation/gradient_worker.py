"""Runs in the side environment: differentiates a forward graph with ONNX Runtime Training.

Usage: gradient_worker.py FORWARD.onnx TRAINABLE.json OPTIMIZER.json OUTPUT_FOLDER

TRAINABLE.json lists the initializers to train; the graph's first output is the objective; OPTIMIZER.json holds betas,
eps, weight_decay and max_grad_norm of AdamW. Writes the four training artifacts and `coverage.json`: how often each
operator occurs between the parameters and the objective, and which of them have no gradient. Imports nothing of
edgetune, which is not installed there.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.training import artifacts, onnxblock

_USER_OUTPUTS = 2
"""Objective and loss come first among the outputs."""
_PROBE_SIZE = 2
"""What a symbolic dimension becomes while an operator is probed."""


def nodes_on_gradient_path(graph: onnx.GraphProto, trainable: set[str]) -> list[onnx.NodeProto]:
    """The nodes through which a gradient flows from the first output back to a trainable parameter."""
    reached = set(trainable)
    forward = []
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            forward.append(node)
    needed = {graph.output[0].name}
    path = []
    for node in reversed(forward):
        if needed.intersection(node.output):
            needed.update(reached.intersection(node.input))
            path.append(node)
    return path


def probe(model: onnx.ModelProto, node: onnx.NodeProto, reached: set[str]) -> str | None:
    """Differentiate one node on its own.

    Returns:
        None when it has a gradient, otherwise what ONNX Runtime Training says.
    """
    graph = model.graph
    shapes = {v.name: v.type.tensor_type for v in [*graph.value_info, *graph.input, *graph.output]}
    constants = {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    constants.update({i.name: i for i in graph.initializer})
    inputs, initializers, nodes = [], [], []
    for name in dict.fromkeys(filter(None, node.input)):
        if name in reached:
            dims = _dims(constants[name]) if name in constants else _static(shapes[name])
            leaf = f"{name}/leaf"
            initializers.append(numpy_helper.from_array(np.ones(dims, np.float32), leaf))
            # The gradients of a value that a node takes twice are added up, those of an initializer are not.
            nodes.append(helper.make_node("Identity", [leaf], [name]))
        elif name in constants:
            tensor = TensorProto()
            tensor.CopyFrom(constants[name])
            tensor.name = name
            initializers.append(tensor)
        else:
            inputs.append(helper.make_tensor_value_info(name, shapes[name].elem_type, _static(shapes[name])))
    trainable = [n.input[0] for n in nodes]
    nodes += [node, helper.make_node("ReduceSum", [node.output[0]], ["probe_total"], keepdims=0)]
    total = helper.make_tensor_value_info("probe_total", TensorProto.FLOAT, [])
    single = helper.make_graph(nodes, "probe", inputs, [total], initializers)
    probed = helper.make_model(single, opset_imports=model.opset_import, ir_version=model.ir_version)
    try:
        with TemporaryDirectory() as folder:
            artifacts.generate_artifacts(probed, requires_grad=trainable, frozen_params=[], artifact_directory=folder)
    except RuntimeError as error:
        # Place and condition in the source of ONNX Runtime, then what it says to people.
        return str(error).strip().rpartition(" was false. ")[2]
    return None


def _dims(tensor: TensorProto) -> list[int]:
    return list(tensor.dims)


def _static(tensor_type: onnx.TypeProto.Tensor) -> list[int]:
    return [d.dim_value if d.HasField("dim_value") else _PROBE_SIZE for d in tensor_type.shape.dim]


def coverage(model: onnx.ModelProto, trainable: set[str]) -> dict[str, object]:
    """Count the operators on the gradient path and name those without a gradient."""
    path = nodes_on_gradient_path(model.graph, trainable)
    reached = trainable.union(*(node.output for node in path))
    missing = {}
    for op_type, node in {node.op_type: node for node in path}.items():
        reason = probe(model, node, reached)
        if reason is not None:
            missing[op_type] = f"{node.name}: {reason}"
    return {"operators": dict(Counter(node.op_type for node in path)), "missing": missing}


def add_grad_norm(path: Path) -> None:
    """Give the training model an output `grad_norm`: the global 2-norm of the gradient accumulated so far."""
    model = onnx.load(path)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "grad_norm/axes"))
    sums = []
    for node in list(graph.node):
        if node.op_type == "InPlaceAccumulatorV2":
            accumulated = f"{node.input[1]}.accumulated"
            node.output.append(accumulated)
            square, total = f"{accumulated}.square", f"{accumulated}.square_sum"
            graph.node.append(helper.make_node("Mul", [accumulated, accumulated], [square]))
            graph.node.append(helper.make_node("ReduceSum", [square, "grad_norm/axes"], [total], keepdims=0))
            sums.append(total)
    graph.node.append(helper.make_node("Sum", sums, ["grad_norm/square"]))
    graph.node.append(helper.make_node("Sqrt", ["grad_norm/square"], ["grad_norm"]))
    graph.output.insert(_USER_OUTPUTS, helper.make_tensor_value_info("grad_norm", TensorProto.FLOAT, []))
    onnx.save(model, path)


def use_torch_adamw(path: Path) -> None:
    """Adam mode 0 adds epsilon after the bias correction, as torch does; the block can only write mode 1."""
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "adam_mode":
                attribute.i = 0
    onnx.save(model, path)


def main(forward: Path, trainable: list[str], optimizer: dict[str, Any], output: Path) -> None:
    """Write the coverage report and, when every operator has a gradient, the artifacts."""
    model = onnx.load(forward)
    report = coverage(model, set(trainable))
    (output / "coverage.json").write_text(json.dumps(report))
    if report["missing"]:
        return
    block = onnxblock.optim.AdamW(
        bias_correction=True,
        betas=tuple(optimizer["betas"]),
        eps=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        clip_grad=onnxblock.optim.ClipGradNorm(optimizer["max_grad_norm"]),
    )
    artifacts.generate_artifacts(
        model, requires_grad=trainable, frozen_params=[], optimizer=block, artifact_directory=output
    )
    add_grad_norm(output / "training_model.onnx")
    use_torch_adamw(output / "optimizer_model.onnx")


if __name__ == "__main__":
    model_path, names_path, options_path, output_path = map(Path, sys.argv[1:])
    main(model_path, json.loads(names_path.read_text()), json.loads(options_path.read_text()), output_path)
