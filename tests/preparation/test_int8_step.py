"""The step with int8 frozen weights: its files, its numbers on the CPU, and on Qualcomm's emulated NPU."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgetune.config import NpuKind
from edgetune.errors import DataError
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.roles import INT8_STEP
from edgetune.preparation import prepare
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes import qnn
from edgetune.runtimes.execution import Accelerator, WholePlan
from support.oracle import cosine
from support.prepared_bundles import CONFIG, prepare_tiny
from support.random_rows import rows_of
from support.tiny_phi3 import checkpoint, weights
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

MEAN_COSINE, LOSS = {"blocks": 0.9999, "qdq": 0.9993}, {"blocks": 5e-3, "qdq": 1e-2}
"""Blocks of int4 are taken over as they are, so that the forward pass loses nothing."""
PRODUCTS = 17
"""With frozen weights: four a layer and the head, forward and backward, but for the first layer's qkv backward."""
TWO_TERMS = 9
"""As `qdq`: forward, the four of each layer and the head."""


@pytest.fixture(scope="module", params=[("blocks", "grouped-query"), ("qdq", "grouped-query"), ("qdq", "longrope")])
def int8_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[NpuKind, Bundle]:
    form, variant = request.param
    config = replace(CONFIG, npu=form)
    return form, prepare_tiny(variant, tmp_path_factory.mktemp("int8") / "bundle", config)


def cosines(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[float]:
    return [cosine(found[name], value) for name, value in expected.items()]


def test_the_graphs_are_part_of_the_bundle(int8_bundle: tuple[NpuKind, Bundle]) -> None:
    form, bundle = int8_bundle
    manifest = load_bundle(bundle.path).manifest
    assert "int8.onnx.data" in {file.path for file in manifest.files}
    for role in ("step", "loss"):
        plain, int8 = manifest.graph(role), manifest.graph(f"{role}_int8")
        assert (int8.inputs, int8.outputs) == (plain.inputs, plain.outputs), "the same contract"
        model = onnx.load(bundle.file(f"{role}_int8"), load_external_data=False)
        onnx.checker.check_model(str(bundle.file(f"{role}_int8")))
        counts = Counter(node.op_type for node in model.graph.node)
        products = PRODUCTS if role == "step" else PRODUCTS // 2 + 1
        if form == "blocks":
            assert counts["MatMulNBits"] == products
            assert not counts["DequantizeLinear"]
        else:
            assert counts["QuantizeLinear"] <= 2 * products + TWO_TERMS
            assert counts["DequantizeLinear"] == counts["QuantizeLinear"] + products + TWO_TERMS
        floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
        assert not [name for name in floats if "_proj" in name and "MatMul" in name], "no linear weight is left"


def test_weights_are_what_the_bundle_stores(int8_bundle: tuple[NpuKind, Bundle]) -> None:
    _, bundle = int8_bundle
    frozen, expected = FrozenWeights(bundle.path, bundle.manifest.architecture), weights(bundle.path)
    np.testing.assert_allclose(
        frozen.whole("model.layers.1.self_attn.o_proj.weight"), expected["model.layers.1.attn.o_proj"], rtol=1e-6
    )
    halves = [expected[f"model.layers.0.mlp.{half}_proj"] for half in ("gate", "up")]
    np.testing.assert_allclose(
        frozen.whole("model.layers.0.mlp.gate_up_proj.weight"), np.concatenate(halves), rtol=1e-6
    )


@pytest.mark.own
@pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed")
def test_the_whole_step_is_one_node_with_good_gradients(int8_bundle: tuple[NpuKind, Bundle]) -> None:
    form, bundle = int8_bundle
    parameters = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(1, [17, 23]))
    with stock.open_session(bundle, parameters, OPTIMIZER, WholePlan()) as exact:
        expected = exact.step([batch], LEARNING_RATE)
        gradients = dict(exact.gradients())  # type: ignore[attr-defined]
    plan = WholePlan(precision="int8", accelerator=Accelerator(require=True))
    with qnn.RUNTIME.open_session(bundle, parameters, OPTIMIZER, plan) as session:
        result = session.step([batch], LEARNING_RATE)
        found = dict(session.gradients())  # type: ignore[attr-defined]
        (placement,) = session.placements()  # type: ignore[attr-defined]
    assert (placement.graph, placement.accelerator_partitions, placement.fallen_back) == (INT8_STEP, 1, [])
    assert result.loss == pytest.approx(expected.loss, abs=LOSS[form])
    assert np.mean(cosines(found, gradients)) >= MEAN_COSINE[form]
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=0.02)


CHAT = '{"messages": [{"role": "user", "content": "Is it on?"}, {"role": "assistant", "content": "Yes."}]}\n'


@pytest.mark.parametrize("template", ["file", "config"])
def test_a_bad_calibration_row_is_found_before_anything_is_built(tmp_path: Path, template: str) -> None:
    """Wherever the checkpoint keeps its chat template."""
    source = Path(shutil.copytree(checkpoint("multi-head"), tmp_path / "checkpoint"))
    if template == "config":
        config = source / "tokenizer_config.json"
        jinja = source / "chat_template.jinja"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": jinja.read_text()}))
        jinja.unlink()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(CHAT + CHAT.replace("assistant", "asistant"))
    with pytest.raises(DataError, match=r"^\S+rows\.jsonl:2: [^\n]*$"):
        prepare(str(source), tmp_path / "bundle", replace(CONFIG, npu="qdq", calibration=rows), say=pytest.fail)
    assert not (tmp_path / "bundle").exists()


def test_calibration_rows_decide_the_ranges(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the lamp in the kitchen is on"}\n' * 2)
    ranges = {}
    for name, calibration in (("given", rows), ("random", None)):
        config = replace(CONFIG, npu="qdq", calibration=calibration)
        bundle = prepare_tiny("multi-head", tmp_path / name, config)
        model = onnx.load(bundle.file(INT8_STEP), load_external_data=False)
        inside = [tensor for tensor in model.graph.initializer if not tensor.external_data]
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in inside}
        scales = [constants[node.input[1]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
        assert all(np.isfinite(scale) and scale > 0 for scale in scales)
        ranges[name] = [float(scale) for scale in scales]
    assert len(ranges["given"]) == len(ranges["random"])
    assert ranges["given"] != ranges["random"]
