"""What the graph rewrites share: operators written onto a tape, a node replaced by them, and unused ones removed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes import common as rewrites

OPSET, IR_VERSION = 21, 10
"""Of every graph: the oldest opset with int4 blocks, and the newest IR that ONNX Runtime Training 1.19.2 reads."""
CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


class Operators(tape.Tape):
    """Standard operators, and constants of the types that these graphs use."""

    def floats(self, *numbers: float) -> ir.Value:
        """A float32 constant of shape (len(numbers),): never of rank 0."""
        return self.constant(np.array(numbers, dtype=np.float32))

    def integers(self, *numbers: int) -> ir.Value:
        """An int64 constant of shape (len(numbers),)."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def constant(self, array: np.ndarray) -> ir.Value:
        """A constant of the array's type and shape."""
        return self.op("Constant", [], attributes={"value": ir.tensor(array)})

    def swap_last(self, value: ir.Value, rank: int) -> ir.Value:
        """Transpose the last two dimensions of a value of this rank."""
        permutation = [*range(rank - 2), rank - 1, rank - 2]
        return self.op("Transpose", [value], attributes={"perm": permutation})

    def replace(self, graph: ir.Graph, node: ir.Node, results: Mapping[ir.Value, ir.Value]) -> None:
        """Put the nodes of this tape in the place of `node`, named after it.

        Args:
            graph: Contains the node; it is changed.
            node: The node that goes.
            results: For each output of the node that is replaced, the value that takes over its uses.
        """
        for number, fresh in enumerate(self.nodes):
            fresh.name = f"{node.name or node.outputs[0].name}/{number}_{fresh.op_type}"
        ir.convenience.replace_nodes_and_values(graph, node, [node], self.nodes, list(results), list(results.values()))


def remove_unused(model: ir.Model) -> None:
    """Remove nodes, initializers and graph inputs that nothing uses."""
    rewrites.RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if not value.uses():
            model.graph.inputs.remove(value)
