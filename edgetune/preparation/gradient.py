"""ONNX Runtime Training differentiates the forward graph, in its side environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgetune.config import TrainConfig
from edgetune.errors import IncompatibleError
from edgetune.model.adamw import BETA1, BETA2, EPSILON
from edgetune.preparation.rewrites.operators import IR_VERSION, OPSET
from edgetune.side_environment import ensure_side_environment, run_worker

ARTIFACTS = {
    "training_model": "training_model.onnx",
    "eval_model": "eval_model.onnx",
    "optimizer_model": "optimizer_model.onnx",
}
"""ONNX Runtime Training's graphs under their own names; `checkpoint` lies beside them."""
_WORKER = Path(__file__).with_name("gradient_worker.py")


def differentiate(
    forward: ir.Model, parameters: Mapping[str, NDArray[np.float32]], output: Path, say: Callable[[str], None]
) -> dict[str, int]:
    """Write the four training artifacts of a forward graph.

    Args:
        forward: The graph of `resolve_shapes(export_forward(…))`; it is changed: the parameters become initializers.
        parameters: Initial values of the LoRA parameters, for the checkpoint.
        output: The folder to write to.
        say: Called with a line of text if the side environment has to be made first.

    Returns:
        The gradient-coverage report: how often each operator occurs between the parameters and the loss.

    Raises:
        IncompatibleError: Operators without a gradient; all of them are named, with the reason.
    """
    _make_trainable(forward, parameters)
    ensure_side_environment(say)
    with TemporaryDirectory(dir=output) as scratch:
        model, names, options = (Path(scratch) / name for name in ("forward.onnx", "trainable.json", "optimizer.json"))
        ir.save(forward, model)
        names.write_text(json.dumps(list(parameters)))
        defaults = TrainConfig()
        options.write_text(
            json.dumps(
                {
                    "betas": [BETA1, BETA2],
                    "eps": EPSILON,
                    "weight_decay": defaults.weight_decay,
                    "max_grad_norm": defaults.max_grad_norm,
                }
            )
        )
        run_worker(_WORKER, [str(model), str(names), str(options), scratch])
        report = json.loads((Path(scratch) / "coverage.json").read_text())
        if report["missing"]:
            reasons = "; ".join(f"{operator} ({reason})" for operator, reason in report["missing"].items())
            raise IncompatibleError(f"ONNX Runtime Training has no gradient for {reasons}")
        for name in [*ARTIFACTS.values(), "checkpoint"]:
            (output / name).write_bytes((Path(scratch) / name).read_bytes())
    operators: dict[str, int] = report["operators"]
    return operators


def _make_trainable(forward: ir.Model, parameters: Mapping[str, NDArray[np.float32]]) -> None:
    graph = forward.graph
    for value in list(graph.inputs):
        name = str(value.name)
        if name in parameters:
            value.const_value = ir.tensor(parameters[name], name=name)
            graph.inputs.remove(value)
            graph.initializers[name] = value
    for value in list(graph.outputs):
        if value.name == "logits":
            graph.outputs.remove(value)
    for node in graph:
        # The gradient reads the log-probabilities.
        if node.op_type == "SoftmaxCrossEntropyLoss" and len(node.outputs) == 1 and node.inputs[0] is not None:
            node.resize_outputs(2)
            node.outputs[1].name = "log_probabilities"
            node.outputs[1].shape, node.outputs[1].type = node.inputs[0].shape, node.inputs[0].type
    graph.opset_imports[""] = OPSET
    forward.ir_version = IR_VERSION
