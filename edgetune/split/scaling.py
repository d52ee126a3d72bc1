"""Positions and channels of like size around the products with frozen weights, so that one int8 scale suits them all.

Trained language models have a few enormous activations: a channel of the first token is a thousand times larger than
all others (Sun et al. 2024, "Massive Activations in Large Language Models"). A scale for the whole tensor, which is all
that Vitis AI allows, would round the others to zero. So what enters a product is divided at each position by its
largest magnitude there, and the result multiplied by that; each output channel of a weight is divided by a power of
two, and its result multiplied by it. In float nothing changes. It comes near to a scale for each position and each
channel (Dettmers et al. 2022, "LLM.int8()"), under a rule of one scale for each tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgetune.runtimes.onnx_session import open_graph
from edgetune.split.graph import TrunkGraph
from edgetune.split.quantise import Feed

Floats = NDArray[np.float32]
_LEAST = 2.0**-24
"""Stands in for the largest magnitude of a position or channel of zeros."""


def even_positions(trunk: TrunkGraph) -> None:
    """Divide what a frozen weight multiplies by its largest magnitude at each position, and multiply the results by it.

    Args:
        trunk: As `build_trunk` gives it. Its graph is changed; `modules` still names the products' results, which are
            relative to these magnitudes now.
    """
    graph = trunk.model.graph
    even: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for product in _products(trunk):
        states = product.inputs[0]
        assert states is not None
        if states not in even:
            even[states] = _even(graph, product, states)
        divided, largest = even[states]
        product.replace_input_with(0, divided)
        _multiply(graph, product, largest, "whole")


def largest_results(trunk: TrunkGraph, feeds: Iterable[Feed]) -> dict[str, Floats]:
    """The largest magnitude (out,) of each channel of each product with a frozen weight, by the result's name.

    Args:
        trunk: After `even_positions`.
        feeds: The graph's inputs for each calibration row.
    """
    model = ir.from_proto(ir.to_proto(trunk.model))
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    names = list(trunk.modules)
    model.graph.outputs.extend(values[name] for name in names)
    session = open_graph(ir.to_proto(model).SerializeToString())
    found: dict[str, Floats] = {}
    for feed in feeds:
        for name, array in zip(names, session.run(names, dict(feed)), strict=True):
            largest = np.abs(array).reshape(-1, array.shape[-1]).max(axis=0)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found


def even_channels(trunk: TrunkGraph, results: Mapping[str, Floats]) -> None:
    """Divide the output channels of the frozen weights by powers of two, and multiply the results by them.

    The power of two is what the channel's largest weight or its largest result has over the mean of all channels,
    whichever is more: a channel that is small in both gets finer steps on both sides of the product.

    Args:
        trunk: After `even_positions`. Its graph is changed.
        results: What `largest_results` found.
    """
    graph = trunk.model.graph
    for product in _products(trunk):
        weight, name = product.inputs[1], str(product.outputs[0].name)
        assert weight is not None and weight.const_value is not None
        matrix = weight.const_value.numpy()
        sizes = np.maximum(_beside_mean(np.abs(matrix).max(axis=0)), _beside_mean(results[name]))
        factors = np.exp2(np.ceil(np.log2(sizes))).astype(np.float32)
        weight.const_value = ir.tensor(matrix / factors, name=weight.name)
        _multiply(graph, product, _constant(graph, f"{name}.channels", factors), "even")


def _products(trunk: TrunkGraph) -> list[ir.Node]:
    """Those with a frozen weight."""
    return [node for node in trunk.model.graph if node.outputs[0].name in trunk.modules]


def _even(graph: ir.Graph, before: ir.Node, states: ir.Value) -> tuple[ir.Value, ir.Value]:
    """States (…, in) divided by the largest magnitudes (…, 1) of their positions, and these."""
    assert states.shape is not None
    name, single = str(states.name), ir.Shape([*states.shape[:-1], 1])
    size = _node("Abs", [states], f"{name}.size", states.shape)
    top = _node("ReduceMax", [size.outputs[0]], f"{name}.top", single, [ir.AttrInt64s("axes", [-1])])
    least = _constant(graph, f"{name}.least", np.array([_LEAST], np.float32))
    largest = _node("Max", [top.outputs[0], least], f"{name}.largest", single)
    divided = _node("Div", [states, largest.outputs[0]], f"{name}.even", states.shape)
    graph.insert_before(before, [size, top, largest, divided])
    return divided.outputs[0], largest.outputs[0]


def _multiply(graph: ir.Graph, product: ir.Node, by: ir.Value, kind: str) -> None:
    """Multiply a product's result before anything else uses it."""
    result = product.outputs[0]
    users = list(result.uses())
    scaled = _node("Mul", [result, by], f"{result.name}.{kind}", result.shape)
    graph.insert_after(product, scaled)
    for user, index in users:
        user.replace_input_with(index, scaled.outputs[0])


def _node(
    operator: str, inputs: list[ir.Value], result: str, shape: ir.Shape | None, attributes: Iterable[ir.Attr] = ()
) -> ir.Node:
    node = ir.Node("", operator, inputs, list(attributes), name=result)
    (out,) = node.outputs
    out.name, out.shape, out.type = result, shape, ir.TensorType(ir.DataType.FLOAT)
    return node


def _constant(graph: ir.Graph, name: str, array: Floats) -> ir.Value:
    value = ir.Value(
        name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )  # fmt: skip
    graph.register_initializer(value)
    return value


def _beside_mean(largest: Floats) -> Floats:
    """Magnitudes (out,) as shares of their mean."""
    largest = np.maximum(largest, np.float32(_LEAST))
    shares: Floats = largest / largest.mean()
    return shares
