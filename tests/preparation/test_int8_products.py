"""The int8 plan: its gradients against the float32 plan's, and its weights against numpy's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from edgetune.config import Base
from edgetune.formats import layered_graphs as pieces
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.roles import BACKWARD, FORWARD, SCALES
from edgetune.model.pieces import Pieces
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.execution import ExecutionPlan, LayeredPlan
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend
from support.oracle import cosine
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
    expected = backend.weight("", block, np.empty)[""]
    found = backend.weight(form, block, np.empty)
    weight, scales = found[""], found[SCALES]
    assert weight.dtype == np.int8
    assert weight.flags.c_contiguous
    matrix = expected.T if form == FORWARD else expected
    assert weight.shape == matrix.shape
    difference = np.abs(weight * scales - matrix)
    assert (difference <= 0.501 * scales).all()
    # Most of the 127 steps are used: by some weight of each row; by one of each 32 neighbours where columns are scaled.
    largest = np.abs(weight.astype(np.int32)).max(axis=0)
    used = largest if form == FORWARD or base == "fp32" else largest.reshape(-1, 32).max(axis=1)
    # Of int4 the scales say where the steps end, and the largest weight of a block may lie on -6 of -8.
    assert used.min() >= (110 if base == "fp32" else 95)


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
