"""The layered form: loss and gradients of every plan against PyTorch + PEFT, per tensor, and against the whole step."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import pytest
import torch

from edgetune.config import Base
from edgetune.formats import layered_graphs as pieces
from edgetune.formats.manifest import Graph
from edgetune.model.pieces import Pieces
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.execution import LayeredPlan, WholePlan
from edgetune.runtimes.layered.weights import ReusedMemory
from support import oracle
from support.oracle import relative
from support.prepared_bundles import InPieces, Prepared, each_bundle
from support.random_rows import lengths_of, rows_of
from support.tiny_phi3 import checkpoint
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

RECOMPUTE = LayeredPlan(kept_layers=0, resident=False, head_rows=16, head_tokens=100)
KEEP = LayeredPlan(kept_layers=2, resident=True, head_rows=1024)
LEAN = replace(RECOMPUTE, lean=True)
PLANS = {
    "recompute": RECOMPUTE,
    "keep": KEEP,
    "keep one of two": replace(KEEP, kept_layers=1),
    "lean": LEAN,
    "lean, keep one of two": replace(LEAN, kept_layers=1),
}
PRECISION = {False: 1e-4, True: 2e-3}
"""Largest relative error of a gradient, by whether states are kept in 16 bits."""
DEQUANTISE = ("layers/dequantise", "layers/int8/forward", "layers/int8/backward")
INT8 = tuple(f"layers/int8/{name}{suffix}" for name in ("attention", "mlp") for suffix in ("", "_grad", "_grad_kept"))
OPERATORS_BEYOND_ONNX = {
    **{role: {"GatherBlockQuantized"} for role in DEQUANTISE},
    **{role: {"MatMulIntegerToFloat"} for role in INT8},
}


@pytest.mark.parametrize("plan", PLANS)
@each_bundle
def test_loss_and_gradients_are_pytorchs(prepared: Prepared, variant: str, base: Base, plan: str) -> None:
    bundle = prepared(variant, base)
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of(variant, 1))
    model = oracle.peft_model(checkpoint(variant), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    with stock.open_session(bundle, parameters, OPTIMIZER, PLANS[plan]) as session:
        assert session.evaluate(batch_of(bundle, rows)) == pytest.approx(loss.item(), rel=1e-4)
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in oracle.trainable(model).items():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad.numpy()) <= PRECISION[PLANS[plan].lean], name


@pytest.mark.own
@each_bundle
def test_steps_are_those_of_the_whole_graph(prepared: Prepared, variant: str, base: Base) -> None:
    """Steps of several passes, clipping, decay, and batches of changing shape."""
    bundle = prepared(variant, base)
    parameters = adapter_of(bundle)
    learnt = {}
    for plan in (WholePlan(), RECOMPUTE, KEEP):
        with stock.open_session(bundle, parameters, OPTIMIZER, plan) as session:
            results = []
            for step in range(6):
                rows = rows_of(step, lengths_of(variant, step))
                groups = [rows[:1], rows[1:]] if step % 2 else [rows]
                results.append(session.step([batch_of(bundle, group) for group in groups], LEARNING_RATE))
            learnt[plan] = results, session.adapter()
    expected, adapter = learnt.pop(WholePlan())
    for results, found in learnt.values():
        np.testing.assert_allclose([r.loss for r in results], [r.loss for r in expected], rtol=1e-5)
        np.testing.assert_allclose([r.grad_norm for r in results], [r.grad_norm for r in expected], rtol=1e-4)
        for name, values in adapter.items():
            assert relative(found[name] - parameters[name], values - parameters[name]) <= 2e-3, name


def test_a_step_that_is_not_finite_changes_nothing(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "int4")
    parameters = adapter_of(bundle)
    name = next(iter(parameters))
    broken = parameters | {name: np.full_like(parameters[name], np.inf)}
    with stock.open_session(bundle, broken, OPTIMIZER, KEEP) as session:
        result = session.step([batch_of(bundle, rows_of(0, [9, 12]))], LEARNING_RATE)
        assert not result.applied
        for other, values in session.adapter().items():
            np.testing.assert_array_equal(values, broken[other])


def test_graphs_are_static_and_standard(prepared: Prepared) -> None:
    """No shape arithmetic, nothing of rank 0 comes out, and standard operators but for int4 and int8."""
    bundle = prepared("grouped-query", "int4")
    layers = [graph for graph in bundle.manifest.graphs if graph.role.startswith("layers/")]
    assert len(layers) == 19
    for graph in layers:
        model = onnx.load(bundle.path / graph.file)
        onnx.checker.check_model(model, full_check=graph.role not in OPERATORS_BEYOND_ONNX)
        operators = {(node.domain, node.op_type) for node in model.graph.node}
        foreign = {name for domain, name in operators if domain}
        assert foreign == OPERATORS_BEYOND_ONNX.get(graph.role, set())
        assert not {name for _, name in operators} & {"Shape", "Size", "Range", "ConstantOfShape", "Pad"}
        assert all(output.shape for output in graph.outputs)
        # The signs of a rotation are no weight.
        sizes = [len(i.raw_data) for i in model.graph.initializer if not (graph.role in INT8 and i.dims == [64, 64])]
        assert sum(sizes) < 4096, "weights are inputs"


def test_the_kept_form_computes_less(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "int4")

    def products(graph: Graph) -> int:
        return sum(node.op_type in ("MatMul", "Gemm") for node in onnx.load(bundle.path / graph.file).graph.node)

    kept_by = {"attention": {"query", "key", "value", "context"}, "mlp": {"gate", "up"}}
    for name, saved in (("attention", 7), ("mlp", 4)):
        whole, kept = (bundle.manifest.graph(f"layers/{name}_{suffix}") for suffix in ("grad", "grad_kept"))
        assert products(whole) - products(kept) >= saved, "projections, their adapters, and the context"
        assert {i.name for i in kept.inputs} - {i.name for i in whole.inputs} == kept_by[name]


@pytest.mark.parametrize("variant", ["grouped-query", "partial"])
def test_pieces_add_up(variant: str, in_pieces: InPieces) -> None:
    """Large layers are computed in pieces of two sizes; here the limits are set so low that tiny ones are, too."""
    bundle = in_pieces(variant)
    assert pieces.widths(bundle.manifest) == (False, True)
    assert pieces.pieces_of(bundle.manifest) == Pieces(2, 6)
    assert pieces.pieces_of(bundle.manifest, wide=True) == Pieces(1, 2)
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of(variant, 1))
    model = oracle.peft_model(checkpoint(variant), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    for plan, wide in product((RECOMPUTE, KEEP, LEAN), (False, True)):
        with stock.open_session(bundle, parameters, OPTIMIZER, replace(plan, wide=wide)) as session:
            result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
            gradients = session.gradients()
        assert result.loss == pytest.approx(loss.item(), rel=1e-4)
        for name, parameter in oracle.trainable(model).items():
            assert parameter.grad is not None
            assert relative(gradients[name], parameter.grad.numpy()) <= PRECISION[plan.lean], name


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def test_reused_memory_is_one_buffer() -> None:
    memory, floats, bytes_ = ReusedMemory(), np.dtype(np.float32), np.dtype(np.int8)
    for _ in range(2):
        memory.use_again()
        first, second = memory.allocate((3, 5), floats), memory.allocate((7,), bytes_)
        first[...], second[...] = 1.0, 2
        assert (first == 1).all()
    assert first.ctypes.data + 64 == second.ctypes.data
    memory.use_again()
    again = memory.allocate((7,), bytes_)
    assert again.ctypes.data == first.ctypes.data
    memory.release()
    memory.use_again()
    assert memory.allocate((7,), bytes_).ctypes.data != first.ctypes.data
    assert (first == 1).all(), "what was given stays what it was"
