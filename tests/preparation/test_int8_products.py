"""The int8 plan: its gradients against the float32 plan's, and its weights against numpy's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgetune.config import Base
from edgetune.formats import layered_graphs as pieces
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.roles import BACKWARD, FORWARD, SCALES
from edgetune.model.blocks import Block, dequantised
from edgetune.model.pieces import Pieces
from edgetune.model.rotation import rotated_weight
from edgetune.preparation.graphs.dequantise import build_requantise
from edgetune.preparation.rewrites.int8_products import quantise_products
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.execution import ExecutionPlan, LayeredPlan
from edgetune.runtimes.layered.onnxruntime import requantise
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend, OrtGraph
from edgetune.runtimes.layered.onnxruntime.requantise import Requantiser
from edgetune.runtimes.onnx_session import open_graph
from support.oracle import cosine, relative
from support.prepared_bundles import InPieces, Prepared, each_bundle
from support.random_rows import lengths_of, rows_of
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

KEEP = LayeredPlan(precision="int8", kept_layers=2, resident=True)
STREAM = LayeredPlan(precision="int8", kept_layers=1, resident=False, lean=True, head_tokens=100)
PROJECTION = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.own
@pytest.mark.parametrize("plan", [KEEP, STREAM], ids=["keep", "stream"])
@each_bundle
def test_gradients_are_near_those_of_float32(prepared: Prepared, variant: str, base: Base, plan: ExecutionPlan) -> None:
    assert_near_float32(prepared(variant, base), variant, plan)


@pytest.mark.own
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_pieces_are_as_near(wide: bool, in_pieces: InPieces) -> None:
    bundle = in_pieces("grouped-query")
    assert pieces.pieces_of(bundle.manifest, wide=wide) == (Pieces(1, 2) if wide else Pieces(2, 6))
    assert_near_float32(bundle, "grouped-query", replace(STREAM, wide=wide))


def assert_near_float32(bundle: Bundle, variant: str, plan: ExecutionPlan) -> None:
    """Loss and gradients of an int8 plan, against those of the same plan in float32."""
    parameters = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(1, lengths_of(variant, 1)))
    losses, gradients = [], []
    for chosen in (replace(plan, precision="fp32"), plan):
        with stock.open_session(bundle, parameters, OPTIMIZER, chosen) as session:
            losses.append(session.step([batch], LEARNING_RATE).loss)
            gradients.append(session.gradients())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1] != losses[0], "nothing was quantised"
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert cosine(found, expected) >= 0.99, name
        assert np.linalg.norm(found) / np.linalg.norm(expected) == pytest.approx(1, abs=0.03), name


@pytest.mark.own
@pytest.mark.parametrize("plan", [KEEP, STREAM], ids=["keep", "stream"])
def test_the_lowest_layers_can_be_exact(prepared: Prepared, plan: ExecutionPlan) -> None:
    """Their forward pass is float32's: of the first alone, nearer; of both, the loss is float32's."""
    bundle = prepared("grouped-query", "int4")
    parameters, batch = adapter_of(bundle), batch_of(bundle, rows_of(1, [17, 23]))
    losses, worst = [], []
    exact: dict[str, np.ndarray] = {}
    for chosen in (replace(plan, precision="fp32"), *(replace(plan, exact_layers=count) for count in (2, 1, 0))):
        with stock.open_session(bundle, parameters, OPTIMIZER, chosen) as session:
            losses.append(session.step([batch], LEARNING_RATE).loss)
            found = {name: np.array(values) for name, values in session.gradients().items()}
        exact = exact or found
        worst.append(min(cosine(found[name], exact[name]) for name in exact))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert len(set(losses[1:])) == 3
    assert worst[0] > worst[1] > worst[2] > worst[3], worst


@pytest.mark.parametrize("columns", [None, (64, 160)], ids=["whole", "part"])
@pytest.mark.parametrize("form", [FORWARD, BACKWARD])
@pytest.mark.parametrize("base", ["int4", "fp32"])
def test_weights_are_rounded_to_a_step(
    prepared: Prepared, base: Base, form: str, columns: tuple[int, int] | None
) -> None:
    bundle = prepared("grouped-query", base)
    block = FrozenWeights(bundle.path, bundle.manifest.architecture).linear(PROJECTION, columns=columns)
    backend = OrtBackend(bundle, "int8")
    expected = rotated_weight(backend.weight("", block, np.empty)[""])
    found = backend.weight(form, block, np.empty)
    weight, scales = found[""], found[SCALES]
    assert weight.dtype == np.int8
    assert weight.flags.c_contiguous
    matrix = expected.T if form == FORWARD else expected
    assert weight.shape == matrix.shape
    assert (np.abs(weight * scales - matrix) <= 0.501 * scales).all()
    np.testing.assert_array_equal(np.abs(weight.astype(np.int32)).max(axis=0), 127)
    again = backend.weight(form, block, np.empty, scales)
    np.testing.assert_array_equal(again[""], weight)
    assert again[SCALES] is scales


@pytest.mark.parametrize("form", [FORWARD, BACKWARD])
@pytest.mark.parametrize("columns", [96, 288, 576])
def test_parts_of_a_weight_make_the_whole(
    prepared: Prepared, form: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    values, scales = generator.integers(0, 256, (100, columns // 2)), generator.uniform(0.5, 1, (100, columns // 32))
    block = Block(values.astype(np.uint8), scales.astype(np.float32), bits=4)
    backend = OrtBackend(prepared("grouped-query", "int4"), "int8")
    whole = backend.weight(form, block, np.empty)
    monkeypatch.setattr(requantise, "_AT_ONCE", 33 * columns)
    parts = backend.weight(form, block, np.empty)
    np.testing.assert_array_equal(parts[SCALES], whole[SCALES])
    np.testing.assert_array_equal(parts[""], whole[""])
    matrix = rotated_weight(dequantised(block))
    matrix = matrix.T if form == FORWARD else matrix
    assert (np.abs(parts[""] * parts[SCALES] - matrix) <= 0.501 * parts[SCALES]).all()


@pytest.mark.parametrize("form", [FORWARD, BACKWARD])
def test_graphs_of_older_bundles_do_not_rotate(form: str, tmp_path: Path) -> None:
    """They take no rotation, and their products expect none."""
    generator = np.random.default_rng(0)
    values, scales = generator.integers(0, 256, (64, 48)), generator.uniform(0.5, 1, (64, 3))
    block = Block(values.astype(np.uint8), scales.astype(np.float32), bits=4)
    graphs = {form: OrtGraph(open_graph(older_graph(tmp_path / "older.onnx", form)))}
    found = Requantiser(graphs[form], graphs).weight(form, block, np.empty, None)
    matrix = dequantised(block).T if form == FORWARD else dequantised(block)
    assert (np.abs(found[""] * found[SCALES] - matrix) <= 0.501 * found[SCALES]).all()


def older_graph(path: Path, form: str) -> Path:
    """As bundles had it before rows were rotated."""
    take = helper.make_node(
        "GatherBlockQuantized",
        ["packed", "rows", "scales"],
        ["exact"],
        domain="com.microsoft",
        bits=4,
        block_size=32,
        gather_axis=0,
        quantize_axis=1,
    )
    turn = helper.make_node("Transpose", ["rounded"], ["weight"], perm=[1, 0] if form == FORWARD else [0, 1])
    nodes = [take, helper.make_node("QuantizeLinear", ["exact", "unit", "zero"], ["rounded"]), turn]
    types = {"packed": TensorProto.UINT8, "rows": TensorProto.INT64, "scales": TensorProto.FLOAT}
    shapes = {"packed": ["out", "packed_in"], "rows": ["out"], "scales": ["out", "blocks"]}
    graph = helper.make_graph(
        nodes,
        form,
        [helper.make_tensor_value_info(name, types[name], shapes[name]) for name in types],
        [helper.make_tensor_value_info("weight", TensorProto.INT8, [None, None])],
        [helper.make_tensor("unit", TensorProto.FLOAT, [], [1]), helper.make_tensor("zero", TensorProto.INT8, [], [0])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize("width", [96, 576])
def test_products_keep_what_is_beside_an_enormous_number(width: int, tmp_path: Path) -> None:
    """Forward and backward, against float64; the enormous number meets weights of zero: it is not in the sum."""
    generator = np.random.default_rng(0)
    shapes = ((1, 40, width), (1, 40, 128), (128, width))
    x, dy, weight = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    x[..., 7], weight[:, 7] = 50, 0
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in (("x", x), ("dy", dy), ("q_proj.weight", weight), ("y", dy), ("dx", x))
    ]
    nodes = [
        helper.make_node("Transpose", ["q_proj.weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
        helper.make_node("MatMul", ["dy", "q_proj.weight"], ["dx"]),
    ]
    graph = helper.make_graph(nodes, "products", values[:3], values[3:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = quantise_products(ir.from_proto(proto))
    ir.save(model, tmp_path / "products.onnx")
    for layout in (FORWARD, BACKWARD):
        ir.save(build_requantise(layout, 4), tmp_path / f"{layout}.onnx")
    graphs = {layout: OrtGraph(open_graph(tmp_path / f"{layout}.onnx")) for layout in (FORWARD, BACKWARD)}
    inputs = {"x": x, "dy": dy}
    for layout in graphs:
        made = Requantiser(graphs[layout], graphs).weight(layout, Block(weight, None), np.empty, None)
        inputs |= {f"q_proj.weight.{layout}{suffix}": array for suffix, array in made.items()}
    found = {"y": np.empty_like(dy), "dx": np.empty_like(x)}
    OrtGraph(open_graph(tmp_path / "products.onnx")).run(inputs, found)
    exact = weight.astype(np.float64)
    assert relative(found["y"], x @ exact.T) <= 0.06
    assert relative(found["dx"], dy @ exact) <= 0.02


def test_every_frozen_product_is_quantised(prepared: Prepared) -> None:
    bundle = prepared("grouped-query", "int4")
    for sublayer, weights in (("attention", 4), ("mlp", 3)):
        for suffix, forward, backward in (
            ("", weights, 0),
            ("_grad", weights - 1, weights),
            ("_grad_kept", 0, weights),
        ):
            graph = bundle.manifest.graph(f"layers/int8/{sublayer}{suffix}")
            model = onnx.load(bundle.path / graph.file)
            products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
            matrices = [node.input[1] for node in products]
            assert len([name for name in matrices if name.endswith(FORWARD)]) == forward
            assert len([name for name in matrices if name.endswith(BACKWARD)]) == backward
            assert not [value.name for value in graph.inputs if value.name.endswith("_proj.weight")]
            quantised = {node.input[0] for node in products}
            rows = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
            assert len(rows) == len(quantised), "what several products take is quantised once"
